// RWKV-7a and 7b. Only for the kernels_*.cc files.
#pragma once

#include <cstdint>

#include "kernels/api/deep_embed.h"
#include "kernels/api/deep_embed_attention.h"
#include "kernels/api/sequence_span.h"
#include "kernels/base/matrix.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cpu/mix_kernels.h"
#include "kernels/cpu/product_kernels.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/simd_math.h"
#include "kernels/cpu/weight_rows.h"

namespace rwkv::kernels::cpu {
namespace {

void DeepEmbed(const DeepEmbedArgs& args, int64_t begin, int64_t end) {
  const int64_t n = args.width;
  for (int64_t row = begin; row < end; ++row) {
    const float* const matrix = args.matrices + row * n * n;
    for (int64_t j = 0; j < n; j += kLanes) {
      F32 sum = {};
      for (int64_t i = 0; i < n; ++i) {
        sum = Fma(Broadcast(args.x[row * n + i]), LoadSome(matrix + i * n + j, n - j), sum);
      }
      StoreSome(args.y + row * n + j, sum, n - j);
    }
  }
}

// What one sequence's keys, values, weights and query take, one after the other; then the workspace
// of the product that expands the caches.
struct AttentionWorkspace {
  float* keys;     // [tokens, Q]
  float* values;   // [tokens, D]
  float* weights;  // [tokens]
  float* row;      // [Q]
  void* matmul;
};

RWKV_INLINE int64_t Larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Tokens that a span's sequence has after it.
RWKV_INLINE int64_t TokensAfter(const DeepEmbedAttentionArgs& args, const SequenceSpan& span) {
  return static_cast<int64_t>(*StateOf(args.length, span.slot)) + span.row_count;
}

// The product that expands `tokens` cached rows.
RWKV_INLINE MatmulArgs ExpandArgs(const MatrixView& expand, int64_t tokens, const float* cache, float* y) {
  MatmulArgs args;
  args.rows = tokens;
  args.weight = expand;
  args.x = cache;
  args.y = y;
  return args;
}

RWKV_INLINE int64_t MostTokens(const DeepEmbedAttentionArgs& args) {
  int64_t most = 0;
  for (int64_t s = 0; s < args.step->span_count; ++s) {
    const SequenceSpan& span = args.step->spans[s];
    if (span.slot != kPaddingSlot) most = Larger(most, TokensAfter(args, span));
  }
  return most;
}

RWKV_INLINE AttentionWorkspace Divide(const DeepEmbedAttentionArgs& args, int64_t tokens, void* workspace) {
  AttentionWorkspace parts;
  parts.keys = static_cast<float*>(workspace);
  parts.values = parts.keys + RoundUpToLanes(tokens * args.k2->matrix.rows);
  parts.weights = parts.values + RoundUpToLanes(tokens * args.v2->matrix.rows);
  parts.row = parts.weights + RoundUpToLanes(tokens);
  parts.matmul = parts.row + RoundUpToLanes(args.k2->matrix.rows);
  return parts;
}

int64_t DeepEmbedAttentionWorkspaceBytes(const DeepEmbedAttentionArgs& args) {
  const int64_t tokens = MostTokens(args);
  const int64_t floats = RoundUpToLanes(tokens * args.k2->matrix.rows) + RoundUpToLanes(tokens * args.v2->matrix.rows) +
                         RoundUpToLanes(tokens) + RoundUpToLanes(args.k2->matrix.rows);
  return floats * static_cast<int64_t>(sizeof(float)) +
         Larger(WholeMatmulWorkspaceBytes(ExpandArgs(args.k2->matrix, tokens, nullptr, nullptr)),
                WholeMatmulWorkspaceBytes(ExpandArgs(args.v2->matrix, tokens, nullptr, nullptr)));
}

// rows[t] = LN(mix of rows[t] and rows[t-1]) with rows[t] times the table's row of the token.
RWKV_INLINE void FinishCachedRows(const float* table, int64_t width, const float* tokens, int64_t count,
                                  const float* mix, const float* norm_weight, const float* norm_bias, float epsilon,
                                  float* rows) {
  for (int64_t t = 0; t < count; ++t) {
    const float* const of_token = table + static_cast<int64_t>(tokens[t]) * width;
    for (int64_t c = 0; c < width; c += kLanes) {
      StoreSome(rows + t * width + c, LoadSome(rows + t * width + c, width - c) * LoadSome(of_token + c, width - c),
                width - c);
    }
  }
  for (int64_t t = count - 1; t >= 0; --t) {  // From the end, so that the row before is still what it was.
    float* const now_row = rows + t * width;
    for (int64_t c = 0; c < width; c += kLanes) {
      const F32 now = LoadSome(now_row + c, width - c);
      const F32 before = t > 0 ? LoadSome(now_row - width + c, width - c) : F32{};
      StoreSome(now_row + c, Fma(before - now, LoadSome(mix + c, width - c), now), width - c);
    }
    Normalize(now_row, norm_weight, norm_bias, width, epsilon, nullptr, now_row);
  }
}

// One row's query against the keys [count, Q], and the values [count, D] by what comes out, added to y [D].
RWKV_INLINE void Attend(const float* query, int64_t query_width, const AttentionWorkspace& parts, int64_t count,
                        int64_t width, float* y) {
  F32 sum = {};
  for (int64_t t = 0; t < count; t += kLanes) {
    alignas(64) float products[kLanes] = {};
    for (int64_t lane = 0; lane < kLanes && t + lane < count; ++lane) {
      const float* const key = parts.keys + (t + lane) * query_width;
      F32 product = {};
      for (int64_t c = 0; c < query_width; c += kLanes) {
        product = Fma(LoadSome(query + c, query_width - c), LoadSome(key + c, query_width - c), product);
      }
      products[lane] = Sum(product);
    }
    // Scores lie in [-64, 64], so their exp needs no maximum taken off.
    const F32 weights = Exp(Tanh(Load(products) * (1.0f / 1024.0f)) * 64.0f);
    sum += KeepFirst(weights, count - t);
    Store(parts.weights + t, weights);
  }
  const float total = Sum(sum);
  for (int64_t c = 0; c < width; c += kLanes) {
    F32 mean = {};
    for (int64_t t = 0; t < count; ++t) {
      mean = Fma(Broadcast(parts.weights[t]), LoadSome(parts.values + t * width + c, width - c), mean);
    }
    StoreSome(y + c, LoadSome(y + c, width - c) + mean / total, width - c);
  }
}

void DeepEmbedAttention(const DeepEmbedAttentionArgs& args, const SequenceSpan& span, void* workspace) {
  if (span.slot == kPaddingSlot) return;
  const int64_t query_width = args.k2->matrix.rows;
  const int64_t rank = args.k2->matrix.cols;
  const int64_t width = args.v2->matrix.rows;
  const int64_t after = TokensAfter(args, span);
  const int64_t before = after - span.row_count;
  const AttentionWorkspace parts = Divide(args, after, workspace);
  float* const tokens = StateOf(args.token_cache, span.slot);
  float* const key_cache = StateOf(args.key_cache, span.slot);
  float* const value_cache = StateOf(args.value_cache, span.slot);
  float* const q_previous = StateOf(args.q_previous, span.slot);
  for (int64_t t = 0; t < span.row_count; ++t) {
    tokens[before + t] = static_cast<float>(args.step->tokens[span.row_begin + t]);
  }
  CopyFloats(args.key + span.row_begin * rank, span.row_count * rank, key_cache + before * rank);
  CopyFloats(args.value + span.row_begin * rank, span.row_count * rank, value_cache + before * rank);
  *StateOf(args.length, span.slot) = static_cast<float>(after);

  WholeMatmul(ExpandArgs(args.k2->matrix, after, key_cache, parts.keys), parts.matmul);
  FinishCachedRows(args.k_emb, query_width, tokens, after, args.x_k, args.lnk_weight, args.lnk_bias, args.epsilon,
                   parts.keys);
  MatmulArgs expand_values = ExpandArgs(args.v2->matrix, after, value_cache, parts.values);
  expand_values.activation = Activation::kTanh;
  WholeMatmul(expand_values, parts.matmul);
  FinishCachedRows(args.v_emb, width, tokens, after, args.x_v, args.lnv_weight, args.lnv_bias, args.epsilon,
                   parts.values);

  const float* q_before = q_previous;
  for (int64_t t = 0; t < span.row_count; ++t) {
    const float* const q = args.q + (span.row_begin + t) * query_width;
    for (int64_t c = 0; c < query_width; c += kLanes) {
      const int64_t left = query_width - c;
      const F32 now = LoadSome(q + c, left);
      StoreSome(parts.row + c, Fma(LoadSome(q_before + c, left) - now, LoadSome(args.x_q + c, left), now), left);
    }
    Normalize(parts.row, args.lnq_weight, args.lnq_bias, query_width, args.epsilon, nullptr, parts.row);
    Attend(parts.row, query_width, parts, before + t + 1, width, args.y + (span.row_begin + t) * width);
    q_before = q;
  }
  CopyFloats(q_before, query_width, q_previous);
}

}  // namespace
}  // namespace rwkv::kernels::cpu
