// Norms, token shift, embedding. Only for the kernels_*.cc files.
#pragma once

#include <cstdint>

#include "kernels/api/embed.h"
#include "kernels/api/group_norm.h"
#include "kernels/api/layer_norm.h"
#include "kernels/api/sequence_span.h"
#include "kernels/api/token_shift.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/weight_rows.h"

namespace rwkv::kernels::cpu {
namespace {

// (x - mean) / sqrt(var + eps) * weight + bias over `width` channels, and times the gate if there is one; y may be x or
// gate.
RWKV_INLINE void Normalize(const float* x, const float* weight, const float* bias, int64_t width, float epsilon,
                           const float* gate, float* y) {
  F32 sum = {};
  for (int64_t c = 0; c < width; c += kLanes) sum += LoadSome(x + c, width - c);
  const F32 mean = Broadcast(Sum(sum) / static_cast<float>(width));
  F32 squares = {};
  for (int64_t c = 0; c < width; c += kLanes) {
    const F32 distance = KeepFirst(LoadSome(x + c, width - c) - mean, width - c);
    squares = Fma(distance, distance, squares);
  }
  const F32 scale = Broadcast(1.0f / __builtin_sqrtf(Sum(squares) / static_cast<float>(width) + epsilon));
  for (int64_t c = 0; c < width; c += kLanes) {
    const int64_t left = width - c;
    const F32 normal = (LoadSome(x + c, left) - mean) * scale;
    F32 z = Fma(normal, LoadSome(weight + c, left), LoadSome(bias + c, left));
    if (gate != nullptr) z = z * LoadSome(gate + c, left);
    StoreSome(y + c, z, left);
  }
}

void LayerNorm(const LayerNormArgs& args) {
  for (int64_t row = 0; row < args.rows; ++row) {
    Normalize(args.x + row * args.width, args.weight, args.bias, args.width, args.epsilon, nullptr,
              args.y + row * args.width);
  }
}

void GroupNorm(const GroupNormArgs& args) {
  const int64_t n = args.head_size;
  for (int64_t row = 0; row < args.rows; ++row) {
    for (int64_t head = 0; head < args.heads; ++head) {
      const int64_t c = head * n;
      const int64_t at = row * args.heads * n + c;
      Normalize(args.y + at, args.weight + c, args.bias + c, n, args.epsilon,
                args.gate != nullptr ? args.gate + at : nullptr, args.out + at);
    }
  }
}

void Embed(const EmbedArgs& args) {
  const int64_t width = args.embedding.cols;
  VisitWeights(args.embedding, [&](auto weights) {
    for (int64_t row = 0; row < args.rows; ++row) {
      float* const x = args.x + row * width;
      WidenRow<decltype(weights)>(args.embedding, args.tokens[row], x);
      if (args.weight != nullptr) Normalize(x, args.weight, args.bias, width, args.epsilon, nullptr, x);
    }
  });
}

void TokenShift(const TokenShiftArgs& args) {
  const int64_t width = args.width;
  for (int64_t s = 0; s < args.span_count; ++s) {
    const SequenceSpan& span = args.spans[s];
    float* const state = args.state_pool + span.slot * args.state_stride;
    const float* previous_row = state;
    for (int64_t row = span.row_begin; row < span.row_begin + span.row_count; ++row) {
      const float* x_row = args.x + row * width;
      for (int64_t c = 0; c < width; c += kLanes) {
        const int64_t left = width - c;
        const F32 x = LoadSome(x_row + c, left);
        const F32 difference = LoadSome(previous_row + c, left) - x;
        for (int64_t m = 0; m < args.outputs; ++m) {
          F32 mix = LoadSome(args.mix[m] + c, left);
          if (args.mix_delta[m] != nullptr) mix += LoadSome(args.mix_delta[m] + row * width + c, left);
          StoreSome(args.y[m] + row * width + c, Fma(difference, mix, x), left);
        }
      }
      previous_row = x_row;
    }
    if (args.keep_state) continue;
    for (int64_t c = 0; c < width; c += kLanes) {
      StoreSome(state + c, LoadSome(previous_row + c, width - c), width - c);
    }
  }
}

}  // namespace
}  // namespace rwkv::kernels::cpu
