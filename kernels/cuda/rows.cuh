// What the kernels over rows of activations share: reading four channels, sums over a block, layer norm's moments, the
// span of a row. Every sum has an order that depends on its length alone.
#pragma once

#include "kernels/api/step_rows.h"
#include "kernels/cuda/device.cuh"

namespace rwkv::kernels::cuda {
inline namespace RWKV_CUDA_BUILD {

constexpr float kLargestFloat = 3.40282347e+38f;
constexpr int kRowThreads = 256;  // at most, of a block that works on one row

// Threads for a row of n channels, four each.
inline uint32_t RowThreads(int64_t n) {
  const int64_t threads = (n + 3) / 4;
  return threads >= kRowThreads ? kRowThreads
                                : static_cast<uint32_t>((threads + kWarpThreads - 1) / kWarpThreads) * kWarpThreads;
}

inline bool IsAligned16(const void* memory) { return reinterpret_cast<uintptr_t>(memory) % 16 == 0; }

// Channels [c, c + 4) of a row of n, zeros behind its end. With `wide`, n is a multiple of four and the row aligned.
RWKV_DEVICE Float4 LoadChannels(const float* row, int c, int n, bool wide) {
  if (wide) return Load4(row + c);
  Float4 v = {0.0f, 0.0f, 0.0f, 0.0f};
  v.x = row[c];
  if (c + 1 < n) v.y = row[c + 1];
  if (c + 2 < n) v.z = row[c + 2];
  if (c + 3 < n) v.w = row[c + 3];
  return v;
}

RWKV_DEVICE void StoreChannels(float* row, int c, int n, bool wide, const Float4& v) {
  if (wide) {
    Store4(row + c, v);
    return;
  }
  row[c] = v.x;
  if (c + 1 < n) row[c + 1] = v.y;
  if (c + 2 < n) row[c + 2] = v.z;
  if (c + 3 < n) row[c + 3] = v.w;
}

// The sum over the block, in all threads; `partials` has a float a warp and is not used again before another barrier.
RWKV_DEVICE float BlockSum(float value, float* partials) {
  value = WarpSum(value);
  if (ThreadIndex() % kWarpThreads == 0) partials[ThreadIndex() / kWarpThreads] = value;
  SyncBlock();
  float sum = 0.0f;
  for (int w = 0; w < BlockThreads() / kWarpThreads; ++w) sum += partials[w];
  return sum;
}

struct MomentsShared {
  float sums[kRowThreads / kWarpThreads];
  float squares[kRowThreads / kWarpThreads];
};

struct Moments {
  float mean;
  float scale;  // 1 / sqrt(var + eps)
};

// row(c): channels [c, c + 4), zeros behind the end.
template <typename Row>
RWKV_DEVICE Moments MomentsOf(const Row& row, int n, float epsilon, MomentsShared& shared) {
  float sum = 0.0f;
  for (int c = 4 * ThreadIndex(); c < n; c += 4 * BlockThreads()) {
    const Float4 v = row(c);
    sum += (v.x + v.y) + (v.z + v.w);
  }
  const float mean = BlockSum(sum, shared.sums) / static_cast<float>(n);
  float squares = 0.0f;
  for (int c = 4 * ThreadIndex(); c < n; c += 4 * BlockThreads()) {
    const Float4 v = row(c);
    squares = Fma(v.x - mean, v.x - mean, squares);
    if (c + 1 < n) squares = Fma(v.y - mean, v.y - mean, squares);
    if (c + 2 < n) squares = Fma(v.z - mean, v.z - mean, squares);
    if (c + 3 < n) squares = Fma(v.w - mean, v.w - mean, squares);
  }
  return {mean, 1.0f / Sqrt(BlockSum(squares, shared.squares) / static_cast<float>(n) + epsilon)};
}

RWKV_DEVICE Float4 Normalize(const Float4& x, const Moments& m, const Float4& weight, const Float4& bias) {
  return {Fma((x.x - m.mean) * m.scale, weight.x, bias.x), Fma((x.y - m.mean) * m.scale, weight.y, bias.y),
          Fma((x.z - m.mean) * m.scale, weight.z, bias.z), Fma((x.w - m.mean) * m.scale, weight.w, bias.w)};
}

// The span that has the row.
RWKV_DEVICE SequenceSpan SpanOf(const StepRows& step, int64_t row) {
  if (step.span_count == step.rows) return step.spans[row];  // One row each.
  int64_t low = 0;
  int64_t high = step.span_count - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (step.spans[middle].row_begin <= row) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return step.spans[low];
}

}  // namespace RWKV_CUDA_BUILD
}  // namespace rwkv::kernels::cuda
