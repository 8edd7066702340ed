// Products with int8 and int4 weights, in fixed point (kernels/base/fixed_point.h): a warp has one output of kRows
// rows. Each lane takes a group of inputs, makes whole numbers of them and multiplies them exactly. What follows is
// added group after group, as the contract says, by a lane for each row.
#pragma once

#include "kernels/base/fixed_point.h"
#include "kernels/cuda/products.cuh"

namespace rwkv::kernels::cuda {
inline namespace RWKV_CUDA_BUILD {

template <int kRows>
struct FixedShared {
  struct Terms {
    float products[kWarpThreads];
    float sums[kWarpThreads];
  };
  Terms terms[kProductWarps][kRows];
};

// (sum of code * q) * scale and (sum of q) * scale of one group of inputs.
struct FixedGroup {
  float products;
  float sum;
};

// Code `index` of 16 bytes.
template <WeightKind kKind>
RWKV_DEVICE int CodeOf(const Bits4& bits, int index) {
  constexpr int kBits = kKind == WeightKind::kInt8 ? 8 : 4;
  constexpr int kCodes = 32 / kBits;
  const uint32_t part = index / kCodes == 0   ? bits.x
                        : index / kCodes == 1 ? bits.y
                        : index / kCodes == 2 ? bits.z
                                              : bits.w;
  const uint32_t code = Field<kBits>(part, index % kCodes);
  return kKind == WeightKind::kInt8 ? static_cast<int8_t>(code) : static_cast<int>(code);
}

// Inputs [begin, end) of the row, which begin a group, with the codes from `codes` on.
template <WeightKind kKind>
RWKV_DEVICE FixedGroup MultiplyGroup(const float* x, const char* codes, int begin, int end, int n, bool wide) {
  float largest = 0.0f;
  bool finite = true;
  for (int k = begin; k < end; k += 4) {
    const Float4 v = LoadChannels(x, k, n, wide);
    const float values[4] = {Abs(v.x), Abs(v.y), Abs(v.z), Abs(v.w)};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      finite = finite && values[e] <= kLargestFloat;
      largest = values[e] > largest ? values[e] : largest;
    }
  }
  if (!finite) return {AsFloat(0x7fc00000u), AsFloat(0x7fc00000u)};
  if (largest < kSmallestFixedPointMaximum) return {0.0f, 0.0f};
  const float inverse = kLargestFixedPoint / largest;
  constexpr int kCodes = kKind == WeightKind::kInt8 ? 16 : 32;  // of a load
  int products = 0;
  int sum = 0;
  for (int chunk = begin; chunk < end; chunk += kCodes) {
    const Bits4 bits = LoadStreaming16(codes + (chunk - begin) / kCodes * 16);
#pragma unroll
    for (int e = 0; e < kCodes; e += 4) {
      if (chunk + e >= end) break;
      const Float4 v = LoadChannels(x, chunk + e, n, wide);
      const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // Adding and taking away 1.5 * 2^23 rounds to even. Behind the end of the row there are zeros.
        const float rounded = (values[i] * inverse + 12582912.0f) - 12582912.0f;
        const int q = static_cast<int>(rounded);
        products += CodeOf<kKind>(bits, e + i) * q;
        sum += q;
      }
    }
  }
  const float scale = largest / kLargestFixedPoint;
  return {static_cast<float>(products) * scale, static_cast<float>(sum) * scale};
}

template <WeightKind kKind, int kRows>
RWKV_KERNEL(kProductThreads)
FixedProductsKernel(ProductsParameters p, bool wide) {
  const uint32_t tile = static_cast<uint32_t>(BlockIndexX()) % p.row_tiles;
  const uint32_t block = static_cast<uint32_t>(BlockIndexX()) / p.row_tiles;
  int index = 0;
  while (index + 1 < p.count && block >= p.products[index + 1].first_block) ++index;
  const ProductParameters& product = p.products[index];
  constexpr int kBlockOutputs = kProductWarps;
  PrefetchRows(product.weight, static_cast<int>(block - product.first_block) * kBlockOutputs, kBlockOutputs);
  BeginKernel();
  const DeviceWeight& weight = product.weight;
  const int lane = ThreadIndex() % kWarpThreads;
  const int warp = ThreadIndex() / kWarpThreads;
  const int output = static_cast<int>(block - product.first_block) * kProductWarps + warp;
  const int64_t first_row = int64_t{tile} * kRows;
  const int rows = p.rows - first_row < kRows ? static_cast<int>(p.rows - first_row) : kRows;
  if (output >= weight.rows) return;  // The whole warp.

  auto& terms = BlockShared<FixedShared<kRows>>().terms[warp];
  const char* const codes = static_cast<const char*>(weight.data) + output * weight.pitch;
  float y = 0.0f;  // Of the row of this lane.
  for (int base = 0; base < weight.groups; base += kWarpThreads) {
    const int group = base + lane;
    if (group < weight.groups) {
      const float* x = product.x + first_row * weight.cols;
      const int begin = group * weight.group;
      const int end = begin + weight.group < weight.cols ? begin + weight.group : weight.cols;
      const char* const from = codes + (kKind == WeightKind::kInt8 ? begin : begin / 2);
#pragma unroll 1
      for (int r = 0; r < rows; ++r, x += weight.cols) {
        const FixedGroup result = MultiplyGroup<kKind>(x, from, begin, end, weight.cols, wide);
        const int64_t at = int64_t{output} * weight.groups + group;
        terms[r].products[lane] = result.products * HalfToFloat(weight.scales[at]);
        if (weight.minimums != nullptr) terms[r].sums[lane] = result.sum * HalfToFloat(weight.minimums[at]);
      }
    }
    SyncWarp();
    if (lane < rows) {
      const int count = weight.groups - base < kWarpThreads ? weight.groups - base : kWarpThreads;
      for (int g = 0; g < count; ++g) {
        y = y + terms[lane].products[g];
        if (weight.minimums != nullptr) y = y + terms[lane].sums[g];
      }
    }
    SyncWarp();
  }
  if (lane < rows) FinishProduct(product, first_row + lane, output, y);
}

}  // namespace RWKV_CUDA_BUILD
}  // namespace rwkv::kernels::cuda
