// RWKV-7b's attention: a block has one row, takes cached token after cached token, rebuilds its key and value, and adds
// it to the mean. A thread keeps what belongs to its channels of the token before in shared memory, where no other
// reaches. What rows of the same step before this one will have put into the caches is taken from the step itself; the
// caches are written by a kernel behind this one.
#pragma once

#include "kernels/api/deep_embed_attention.h"
#include "kernels/api/state_tensor.h"
#include "kernels/cuda/fixed_products.cuh"

namespace rwkv::kernels::cuda {
inline namespace RWKV_CUDA_BUILD {

struct AttentionParameters {
  DeepEmbedAttentionArgs args;
  StepRows step;
  DeviceWeight k2;
  DeviceWeight v2;
};

// kChannels: at least query width and width.
template <int kChannels>
struct AttentionShared {
  float query[kChannels];  // As they meet keys; behind them the weighted sums of values.
  float now[kChannels];    // Unshifted: keys, behind them values.
  float before[kChannels];
  float sums[5][kRowThreads / kWarpThreads];
};

// Of a row of int8 or int4 weights, as FixedProductsKernel has it.
template <WeightKind kKind>
RWKV_DEVICE float FixedDot(const DeviceWeight& weight, int output, const float* x) {
  const char* const codes = static_cast<const char*>(weight.data) + output * weight.pitch;
  float y = 0.0f;
  for (int group = 0; group < weight.groups; ++group) {
    const int begin = group * weight.group;
    const int end = begin + weight.group < weight.cols ? begin + weight.group : weight.cols;
    const FixedGroup result = MultiplyGroup<kKind>(x, codes + (kKind == WeightKind::kInt8 ? begin : begin / 2), begin,
                                                   end, weight.cols, false);
    const int64_t at = int64_t{output} * weight.groups + group;
    y = y + result.products * HalfToFloat(weight.scales[at]);
    if (weight.minimums != nullptr) y = y + result.sum * HalfToFloat(weight.minimums[at]);
  }
  return y;
}

RWKV_DEVICE float DotOfWeights(const DeviceWeight& weight, int output, const float* x) {
  if (weight.kind == WeightKind::kInt8) return FixedDot<WeightKind::kInt8>(weight, output, x);
  if (weight.kind == WeightKind::kInt4) return FixedDot<WeightKind::kInt4>(weight, output, x);
  float sum = 0.0f;
  for (int k = 0; k < weight.cols; k += kChunk) {
    const WeightChunk chunk = LoadChunk(weight, output, k);
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
      if (k + e < weight.cols) sum = Fma(x[k + e], chunk.w[e], sum);
    }
  }
  return sum;
}

// The moments of n channels; value(c) of this thread's, in any order of calls.
template <typename Value>
RWKV_DEVICE Moments ChannelMoments(const Value& value, int n, float epsilon, float* sums, float* squares) {
  float sum = 0.0f;
  for (int c = ThreadIndex(); c < n; c += BlockThreads()) sum += value(c);
  const float mean = BlockSum(sum, sums) / static_cast<float>(n);
  float square = 0.0f;
  for (int c = ThreadIndex(); c < n; c += BlockThreads()) {
    const float distance = value(c) - mean;
    square = Fma(distance, distance, square);
  }
  return {mean, 1.0f / Sqrt(BlockSum(square, squares) / static_cast<float>(n) + epsilon)};
}

RWKV_DEVICE float Normalize(float x, const Moments& m, float weight, float bias) {
  return Fma((x - m.mean) * m.scale, weight, bias);
}

RWKV_DEVICE float* OfSlot(const StateTensor& state, const SequenceSpan& span) {
  return state.data + span.slot * state.stride;
}

// Tokens that the span's slot has cached; -1: no such number, or too many for what the step adds.
RWKV_DEVICE int64_t CachedTokens(const DeepEmbedAttentionArgs& args, const SequenceSpan& span) {
  const float length = *OfSlot(args.length, span);
  if (!(length >= 0.0f && length <= static_cast<float>(args.capacity))) return -1;
  const auto cached = static_cast<int64_t>(length);
  return static_cast<float>(cached) == length && span.row_count <= args.capacity - cached ? cached : -1;
}

template <int kChannels>
RWKV_KERNEL(kRowThreads)
AttentionKernel(AttentionParameters p) {
  BeginKernel();
  const DeepEmbedAttentionArgs& args = p.args;
  const int64_t row = BlockIndexX();
  const SequenceSpan span = SpanOf(p.step, row);
  if (span.slot == kPaddingSlot) return;
  const int query_width = p.k2.rows;
  const int width = p.v2.rows;
  const int rank = p.k2.cols;
  auto& shared = BlockShared<AttentionShared<kChannels>>();
  float* const keys_now = shared.now;
  float* const keys_before = shared.before;
  float* const values_now = shared.now + query_width;
  float* const values_before = shared.before + query_width;
  float* const mean = shared.query + query_width;

  const float* const q = args.q + row * query_width;
  const float* const q_before = row > span.row_begin ? q - query_width : OfSlot(args.q_previous, span);
  const auto shifted_query = [&](int c) { return Fma(q_before[c] - q[c], args.x_q[c], q[c]); };
  const Moments query_moments =
      ChannelMoments(shifted_query, query_width, args.epsilon, shared.sums[0], shared.sums[1]);
  for (int c = ThreadIndex(); c < query_width; c += BlockThreads()) {
    shared.query[c] = Normalize(shifted_query(c), query_moments, args.lnq_weight[c], args.lnq_bias[c]);
    keys_before[c] = 0.0f;
  }
  for (int c = ThreadIndex(); c < width; c += BlockThreads()) mean[c] = values_before[c] = 0.0f;

  const int64_t cached = CachedTokens(args, span);
  float total = cached < 0 ? AsFloat(0x7fc00000u) : 0.0f;  // What cannot be known is no number.
  const int64_t end = cached < 0 ? 0 : cached + row - span.row_begin + 1;
  for (int64_t t = 0; t < end; ++t) {
    const bool is_cached = t < cached;
    const int64_t at = is_cached ? t : span.row_begin + t - cached;
    const float* const key = (is_cached ? OfSlot(args.key_cache, span) : args.key) + at * rank;
    const float* const value = (is_cached ? OfSlot(args.value_cache, span) : args.value) + at * rank;
    int64_t token = 0;
    if (is_cached) {
      const float id = OfSlot(args.token_cache, span)[t];
      const bool is_id = id >= 0.0f && id < static_cast<float>(args.vocabulary);
      token = is_id ? static_cast<int64_t>(id) : 0;
      if (!is_id || static_cast<float>(token) != id) total = AsFloat(0x7fc00000u);
    } else {
      token = p.step.tokens[at];
    }

    for (int c = ThreadIndex(); c < query_width; c += BlockThreads()) {
      keys_now[c] = DotOfWeights(p.k2, c, key) * args.k_emb[token * query_width + c];
    }
    const auto shifted_key = [&](int c) { return Fma(keys_before[c] - keys_now[c], args.x_k[c], keys_now[c]); };
    const Moments key_moments = ChannelMoments(shifted_key, query_width, args.epsilon, shared.sums[0], shared.sums[1]);
    float product = 0.0f;
    for (int c = ThreadIndex(); c < query_width; c += BlockThreads()) {
      const float normed = Normalize(shifted_key(c), key_moments, args.lnk_weight[c], args.lnk_bias[c]);
      product = Fma(shared.query[c], normed, product);
      keys_before[c] = keys_now[c];
    }
    product = BlockSum(product, shared.sums[2]);
    const float weight = Exp(64.0f * Tanh(product / 1024.0f));  // In [e^-64, e^64].
    total += weight;

    for (int c = ThreadIndex(); c < width; c += BlockThreads()) {
      values_now[c] = Tanh(DotOfWeights(p.v2, c, value)) * args.v_emb[token * width + c];
    }
    const auto shifted_value = [&](int c) { return Fma(values_before[c] - values_now[c], args.x_v[c], values_now[c]); };
    const Moments value_moments = ChannelMoments(shifted_value, width, args.epsilon, shared.sums[3], shared.sums[4]);
    for (int c = ThreadIndex(); c < width; c += BlockThreads()) {
      const float normed = Normalize(shifted_value(c), value_moments, args.lnv_weight[c], args.lnv_bias[c]);
      mean[c] = Fma(weight, normed, mean[c]);
      values_before[c] = values_now[c];
    }
  }
  for (int c = ThreadIndex(); c < width; c += BlockThreads()) args.y[row * width + c] += mean[c] / total;
}

// What the step leaves in the caches: a block a span.
RWKV_KERNEL(kRowThreads) AttentionStateKernel(AttentionParameters p) {
  BeginKernel();
  const DeepEmbedAttentionArgs& args = p.args;
  const SequenceSpan span = p.step.spans[BlockIndexX()];
  if (span.slot == kPaddingSlot) return;
  const int64_t cached = CachedTokens(args, span);
  if (cached < 0) return;
  SyncBlock();  // All have read the length.
  const int query_width = p.k2.rows;
  const int64_t rank = p.k2.cols;
  for (int64_t i = ThreadIndex(); i < span.row_count * rank; i += BlockThreads()) {
    OfSlot(args.key_cache, span)[cached * rank + i] = args.key[span.row_begin * rank + i];
    OfSlot(args.value_cache, span)[cached * rank + i] = args.value[span.row_begin * rank + i];
  }
  for (int64_t i = ThreadIndex(); i < span.row_count; i += BlockThreads()) {
    OfSlot(args.token_cache, span)[cached + i] = static_cast<float>(p.step.tokens[span.row_begin + i]);
  }
  const float* const last = args.q + (span.row_begin + span.row_count - 1) * query_width;
  for (int c = ThreadIndex(); c < query_width; c += BlockThreads()) OfSlot(args.q_previous, span)[c] = last[c];
  if (ThreadIndex() == 0) *OfSlot(args.length, span) = static_cast<float>(cached + span.row_count);
}

}  // namespace RWKV_CUDA_BUILD
}  // namespace rwkv::kernels::cuda
