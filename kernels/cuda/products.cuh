// Products of rows and matrices without tensor cores: a warp has kOutputs outputs of kRows rows; its lanes take chunks
// of eight inputs in turn, and their sums meet at the end. How many rows and outputs a warp has changes no sum, so the
// bits of a row are the same whatever the launch (law N1).
#pragma once

#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/weights.cuh"

namespace rwkv::kernels::cuda {
inline namespace RWKV_CUDA_BUILD {

constexpr int kProductThreads = 128;
constexpr int kProductWarps = kProductThreads / kWarpThreads;
constexpr int kProductsOfLaunch = 8;

struct ProductParameters {
  DeviceWeight weight;
  const float* x;
  const float* bias;
  const float* gate;
  float* y;
  uint32_t first_block;  // of those of one tile of rows
  Activation activation;
  bool accumulate;
};

struct ProductsParameters {
  ProductParameters products[kProductsOfLaunch];
  int32_t count;
  int64_t rows;
  uint32_t row_tiles;
};

// Inputs [k, k + 8), zeros behind the end.
RWKV_DEVICE void LoadInputs(const float* x, int k, int n, float (&to)[kChunk]) {
#pragma unroll
  for (int e = 0; e < kChunk; ++e) to[e] = k + e < n ? x[k + e] : 0.0f;
}

RWKV_DEVICE void LoadWideInputs(const float* x, int k, float (&to)[kChunk]) {
  const Float4 low = Load4(x + k);
  const Float4 high = Load4(x + k + 4);
  to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
  to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
}

// y = act(z + bias) * gate, or added to y.
RWKV_DEVICE void FinishProduct(const ProductParameters& p, int64_t row, int output, float z) {
  if (p.bias != nullptr) z += p.bias[output];
  z = Activate(p.activation, z);
  const int64_t at = row * p.weight.rows + output;
  if (p.gate != nullptr) z *= p.gate[at];
  p.y[at] = p.accumulate ? p.y[at] + z : z;
}

// With kWide every x is aligned and has a multiple of four inputs.
template <WeightKind kKind, int kRows, int kOutputs, bool kWide>
RWKV_KERNEL(kProductThreads)
ProductsKernel(ProductsParameters p) {
  static_assert(kRows * kOutputs <= kWarpThreads, "a lane finishes one product");
  // Blocks that run side by side have the same weights for other rows.
  const uint32_t tile = static_cast<uint32_t>(BlockIndexX()) % p.row_tiles;
  const uint32_t block = static_cast<uint32_t>(BlockIndexX()) / p.row_tiles;
  int index = 0;
  while (index + 1 < p.count && block >= p.products[index + 1].first_block) ++index;
  const ProductParameters& product = p.products[index];
  constexpr int kBlockOutputs = kProductWarps * kOutputs;
  PrefetchRows(product.weight, static_cast<int>(block - product.first_block) * kBlockOutputs, kBlockOutputs);
  BeginKernel();
  const int inputs = product.weight.cols;
  const int lane = ThreadIndex() % kWarpThreads;
  const int warp = ThreadIndex() / kWarpThreads;
  const int first_output = (static_cast<int>(block - product.first_block) * kProductWarps + warp) * kOutputs;
  const int64_t first_row = int64_t{tile} * kRows;
  // Rows and outputs behind the last one repeat it, and are not stored.
  const float* x[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first_row + r < p.rows ? first_row + r : p.rows - 1;
    x[r] = product.x + row * inputs;
  }
  int64_t output[kOutputs];
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    output[o] = first_output + o < product.weight.rows ? first_output + o : product.weight.rows - 1;
  }
  float sum[kRows][kOutputs] = {};
  const auto add = [&](int k, bool whole) {
    WeightChunk weights[kOutputs];
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) weights[o] = LoadChunk<kKind>(product.weight, output[o], k);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float in[kChunk];
      if (kWide && whole) {
        LoadWideInputs(x[r], k, in);
      } else {
        LoadInputs(x[r], k, inputs, in);
      }
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
        for (int e = 0; e < kChunk; ++e) sum[r][o] = Fma(in[e], weights[o].w[e], sum[r][o]);
      }
    }
  };
  int k = lane * kChunk;
#pragma unroll(kRows == 1 ? 4 : 1)
  for (; k + kChunk <= inputs; k += kWarpThreads * kChunk) add(k, true);
  if (k < inputs) add(k, false);

  float mine = 0.0f;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      const float all = WarpSum(sum[r][o]);
      if (lane == r * kOutputs + o) mine = all;
    }
  }
  const int64_t row = first_row + lane / kOutputs;
  const int out = first_output + lane % kOutputs;
  if (lane < kRows * kOutputs && row < p.rows && out < product.weight.rows) FinishProduct(product, row, out, mine);
}

}  // namespace RWKV_CUDA_BUILD
}  // namespace rwkv::kernels::cuda
