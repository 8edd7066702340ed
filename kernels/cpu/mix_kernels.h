// Norms, embedding, and what the products of a mix read. Only for the kernels_*.cc files.
#pragma once

#include <cstdint>

#include "kernels/api/embed.h"
#include "kernels/api/layer_norm.h"
#include "kernels/api/mix_input.h"
#include "kernels/api/sequence_span.h"
#include "kernels/api/state_tensor.h"
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

// StateTensor::of(), as code that is this file's own.
RWKV_INLINE float* StateOf(const StateTensor& state, int32_t slot) { return state.data + slot * state.stride; }

RWKV_INLINE void CopyFloats(const float* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kLanes) StoreSome(to + i, LoadSome(from + i, count - i), count - i);
}

RWKV_INLINE void ZeroFloats(float* to, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) StoreSome(to + i, F32{}, count - i);
}

void LayerNorm(const LayerNormArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    Normalize(args.x + row * args.width, args.weight, args.bias, args.width, args.epsilon, nullptr,
              args.y + row * args.width);
  }
}

void Embed(const EmbedArgs& args, int64_t begin, int64_t end) {
  const MatrixView& embedding = args.embedding->matrix;
  const int64_t width = embedding.cols;
  VisitWeights(embedding, [&](auto weights) {
    for (int64_t row = begin; row < end; ++row) {
      float* const x = args.x + row * width;
      WidenRow<decltype(weights)>(embedding, args.tokens[row], x);
      if (args.weight != nullptr) Normalize(x, args.weight, args.bias, width, args.epsilon, nullptr, x);
    }
  });
}

// --- MixInput ---

// Where the normalised input of a row is: x itself, or `to` after the norm.
RWKV_INLINE const float* NormedRow(const MixInputArgs& args, int64_t row, float* to) {
  const float* const x = args.x + row * args.width;
  if (args.weight == nullptr) return x;
  Normalize(x, args.weight, args.bias, args.width, args.epsilon, nullptr, to);
  return to;
}

RWKV_INLINE void PadMixInput(const MixInputArgs& args, int64_t row) {
  if (args.normed != nullptr) ZeroFloats(args.normed + row * args.width, args.width);
  for (int64_t m = 0; m < args.outputs; ++m) ZeroFloats(args.y[m] + row * args.width, args.width);
}

RWKV_INLINE void MixRow(const MixInputArgs& args, int64_t row, const float* now_row, const float* before_row) {
  const int64_t width = args.width;
  for (int64_t c = 0; c < width; c += kLanes) {
    const int64_t left = width - c;
    const F32 now = LoadSome(now_row + c, left);
    const F32 difference = LoadSome(before_row + c, left) - now;
    for (int64_t m = 0; m < args.outputs; ++m) {
      F32 mix = LoadSome(args.mix[m] + c, left);
      if (args.mix_delta[m] != nullptr) mix += LoadSome(args.mix_delta[m] + row * width + c, left);
      StoreSome(args.y[m] + row * width + c, Fma(difference, mix, now), left);
    }
  }
}

void MixInput(const MixInputArgs& args, int64_t begin, int64_t end, float* scratch) {
  const SequenceSpan* span = args.step->spans;
  while (span->row_begin + span->row_count <= begin) ++span;
  // Two places, so that the row before is still there; the place behind the one in use is free.
  float* places[2] = {scratch, scratch + args.width};
  const float* before = nullptr;
  for (int64_t row = begin; row < end; ++row) {
    if (row == span->row_begin + span->row_count) ++span;
    if (span->slot == kPaddingSlot) {
      PadMixInput(args, row);
      continue;
    }
    if (row == span->row_begin) {
      before = StateOf(args.shift, span->slot);
    } else if (row == begin) {
      before = NormedRow(args, row - 1, places[(row - 1) & 1]);  // Another part's row: made once more, with its bits.
    }
    const float* const now = NormedRow(args, row, places[row & 1]);
    if (args.normed != nullptr) CopyFloats(now, args.width, args.normed + row * args.width);
    MixRow(args, row, now, before);
    const bool is_last = row + 1 == span->row_begin + span->row_count;
    if (is_last && span->row_begin >= begin && !args.keep_state)
      CopyFloats(now, args.width, StateOf(args.shift, span->slot));
    before = now;
  }
}

void MixInputState(const MixInputArgs& args, const SequenceSpan& span) {
  float* const state = StateOf(args.shift, span.slot);
  const float* const last = NormedRow(args, span.row_begin + span.row_count - 1, state);
  if (last != state) CopyFloats(last, args.width, state);
}

}  // namespace
}  // namespace rwkv::kernels::cpu
