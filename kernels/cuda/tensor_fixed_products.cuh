// Products with int8 and int4 weights on tensor cores, with the bits of fixed_products.cuh. A block has 16 kOutTiles
// outputs of 8 kRowTiles rows. In a pass each of its warps has kGroups groups of inputs: makes whole numbers of them, two
// signed bytes each, and multiplies them with the codes, the upper bytes first. These sums are exact. After a barrier
// each thread adds up what belongs to its outputs, group after group, as the contract says (kernels/base/fixed_point.h).
//
// Codes go past shared memory: a lane reads eight of two outputs, or sixteen where a group is longer than a product of
// matrices, neighbouring lanes the next ones, and which input is which in the product does not matter as long as both
// factors agree.
#pragma once

#include "kernels/base/fixed_point.h"
#include "kernels/cuda/tensor_products.cuh"

namespace rwkv::kernels::cuda {
inline namespace RWKV_CUDA_BUILD {

constexpr int kFixedStepInputs = 32;  // of a product of matrices
constexpr int kFixedSteps = 2;        // of a group at most

template <int kOutTiles, int kRowTiles, int kGroups>
struct TensorFixedShared {
  static constexpr int kOutputs = 16 * kOutTiles;
  static constexpr int kRows = 8 * kRowTiles;
  static constexpr int kSlots = kTensorWarps * kGroups;  // groups of a pass
  int32_t products[kSlots][kRows][kOutputs + 4];         // So that the four rows of a store lie in different banks.
  float scales[kSlots][kRows];                           // of the inputs
  float sums[kSlots][kRows];                             // of the inputs in fixed point, times their scale
};

// A lane's codes from `k` on, eight for each of the steps, as the halves of a matrix' inputs. Of int4 the even ones are
// first.
template <WeightKind kKind>
RWKV_DEVICE void LoadCodes(const char* row, int k, int steps, Bits2 (&to)[kFixedSteps]) {
  if constexpr (kKind == WeightKind::kInt8) {
    if (steps > 1) {
      const Bits4 v = LoadStreaming16(row + k);
      to[0] = {v.x, v.y}, to[1] = {v.z, v.w};
    } else {
      to[0] = LoadStreaming8(row + k);
    }
  } else {
    Bits2 v = {0, 0};
    if (steps > 1) {
      v = LoadStreaming8(row + k / 2);
    } else {
      v.x = *reinterpret_cast<const uint32_t*>(row + k / 2);
    }
    to[0] = {v.x & 0x0f0f0f0fu, v.x >> 4 & 0x0f0f0f0fu};
    to[1] = {v.y & 0x0f0f0f0fu, v.y >> 4 & 0x0f0f0f0fu};
  }
}

// Eight inputs as whole numbers: their bytes in the order of LoadCodes(). Gives their sum, a whole number.
template <WeightKind kKind>
RWKV_DEVICE float SplitFixedPoint(const float (&x)[kChunk], float inverse, uint32_t (&high)[2], uint32_t (&low)[2]) {
  high[0] = high[1] = low[0] = low[1] = 0;
  float sum = 0.0f;
#pragma unroll
  for (int e = 0; e < kChunk; ++e) {
    // Adding and taking away 1.5 * 2^23 rounds to even.
    const float rounded = (x[e] * inverse + 12582912.0f) - 12582912.0f;
    sum += rounded;
    const int q = static_cast<int>(rounded);
    const int half = kKind == WeightKind::kInt8 ? e / 4 : e % 2;
    const int shift = 8 * (kKind == WeightKind::kInt8 ? e % 4 : e / 2);
    low[half] |= (static_cast<uint32_t>(q) & 0xffu) << shift;
    high[half] |= (static_cast<uint32_t>((q + 128) >> 8) & 0xffu) << shift;
  }
  return sum;
}

// With `wide` every x is aligned and has a multiple of four inputs.
template <WeightKind kKind, int kOutTiles, int kRowTiles, int kGroups>
RWKV_KERNEL(kTensorThreads)
TensorFixedProductsKernel(ProductsParameters p, bool wide) {
  using Shared = TensorFixedShared<kOutTiles, kRowTiles, kGroups>;
  constexpr int kProducts = Shared::kRows * Shared::kOutputs;
  constexpr int kMine = (kProducts + kTensorThreads - 1) / kTensorThreads;  // products of a thread
  static_assert(kTensorThreads % Shared::kOutputs == 0, "all of one output");
  // Blocks that run side by side have the same weights for other rows.
  const uint32_t tile = static_cast<uint32_t>(BlockIndexX()) % p.row_tiles;
  const uint32_t block = static_cast<uint32_t>(BlockIndexX()) / p.row_tiles;
  int index = 0;
  while (index + 1 < p.count && block >= p.products[index + 1].first_block) ++index;
  const ProductParameters& product = p.products[index];
  constexpr int kBlockOutputs = Shared::kOutputs;
  PrefetchRows(product.weight, static_cast<int>(block - product.first_block) * kBlockOutputs, kBlockOutputs);
  BeginKernel();
  const DeviceWeight& weight = product.weight;
  const int inputs = weight.cols;
  const int lane = ThreadIndex() % kWarpThreads;
  const int warp = ThreadIndex() / kWarpThreads;
  const int g = lane / 4;
  const int t = lane % 4;
  const int first_output = static_cast<int>(block - product.first_block) * Shared::kOutputs;
  const int64_t first_row = int64_t{tile} * Shared::kRows;
  auto& shared = BlockShared<Shared>();

  // Outputs behind the last one repeat it, and are not stored; rows there are zeros.
  uint32_t codes[kOutTiles][2];  // Where the row begins, in units of its alignment.
#pragma unroll
  for (int o = 0; o < kOutTiles; ++o) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int output = first_output + 16 * o + 8 * half + g;
      const int row = output < weight.rows ? output : weight.rows - 1;
      codes[o][half] = static_cast<uint32_t>(row) * static_cast<uint32_t>(weight.pitch / kWeightRowAlignment);
    }
  }
  const int my_output = first_output + ThreadIndex() % Shared::kOutputs;
  const int64_t my_groups = int64_t{my_output} * weight.groups;
  float y[kMine] = {};
  for (int base = 0; base < weight.groups; base += Shared::kSlots) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int slot = warp * kGroups + i;
      const int begin = (base + slot) * weight.group;
      if (begin >= inputs) break;  // The whole warp.
      const int end = begin + weight.group < inputs ? begin + weight.group : inputs;
      const int steps = end - begin > kFixedStepInputs ? 2 : 1;
      const int first = begin + kChunk * steps * t;  // Of the lane's inputs.
      uint32_t a[kFixedSteps][kOutTiles][4];
#pragma unroll
      for (int o = 0; o < kOutTiles; ++o) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const char* const from = static_cast<const char*>(weight.data) + kWeightRowAlignment * codes[o][half];
          Bits2 v[kFixedSteps] = {};
          LoadCodes<kKind>(from, first, steps, v);
#pragma unroll
          for (int s = 0; s < kFixedSteps; ++s) a[s][o][half] = v[s].x, a[s][o][half + 2] = v[s].y;
        }
      }
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        const int64_t row = first_row + 8 * r + g;
        float x[kFixedSteps][kChunk] = {};
        float largest = 0.0f;
#pragma unroll
        for (int s = 0; s < kFixedSteps; ++s) {
          if (s >= steps) break;
          const int k = first + kChunk * s;
          if (row < p.rows) {
            const float* const from = product.x + row * inputs;
            if (wide && k + kChunk <= end) {
              LoadWideInputs(from, k, x[s]);
            } else {
              LoadInputs(from, k, end, x[s]);
            }
          }
#pragma unroll
          for (int e = 0; e < kChunk; ++e) {
            // What is no finite number is larger than any.
            const float size = Abs(x[s][e]) <= kLargestFloat ? Abs(x[s][e]) : AsFloat(0x7f800000u);
            largest = size > largest ? size : largest;
          }
        }
#pragma unroll
        for (int mask = 1; mask < 4; mask *= 2) {  // The four lanes of a row.
          const float other = ShuffleXor(largest, mask);
          largest = other > largest ? other : largest;
        }
        const bool finite = largest <= kLargestFloat;
        const bool has_numbers = finite && largest >= kSmallestFixedPointMaximum;
        const float inverse = has_numbers ? kLargestFixedPoint / largest : 0.0f;
        uint32_t high[kFixedSteps][2];
        uint32_t low[kFixedSteps][2];
        float sum = 0.0f;
#pragma unroll
        for (int s = 0; s < kFixedSteps; ++s) {
#pragma unroll
          for (int e = 0; e < kChunk; ++e) x[s][e] = has_numbers ? x[s][e] : 0.0f;
          sum += SplitFixedPoint<kKind>(x[s], inverse, high[s], low[s]);
        }
        sum = WarpSum<4>(sum);  // Of whole numbers below 2^24.
        if (t == 0) {
          const float scale = !finite ? AsFloat(0x7fc00000u) : has_numbers ? largest / kLargestFixedPoint : 0.0f;
          shared.scales[slot][8 * r + g] = scale;
          shared.sums[slot][8 * r + g] = sum * scale;
        }
#pragma unroll
        for (int o = 0; o < kOutTiles; ++o) {
          int32_t c[4] = {};
          MmaInt8(c, a[0][o], high[0]);
          if (steps > 1) MmaInt8(c, a[1][o], high[1]);
#pragma unroll
          for (int e = 0; e < 4; ++e) c[e] *= 256;
          MmaInt8(c, a[0][o], low[0]);
          if (steps > 1) MmaInt8(c, a[1][o], low[1]);
#pragma unroll
          for (int e = 0; e < 4; ++e) shared.products[slot][8 * r + 2 * t + e % 2][16 * o + g + e / 2 * 8] = c[e];
        }
      }
    }
    SyncBlock();
    if (my_output < weight.rows) {
      const int count = weight.groups - base < Shared::kSlots ? weight.groups - base : Shared::kSlots;
      for (int slot = 0; slot < count; ++slot) {
        const float scale = HalfToFloat(weight.scales[my_groups + base + slot]);
        const float minimum = weight.minimums == nullptr ? 0.0f : HalfToFloat(weight.minimums[my_groups + base + slot]);
#pragma unroll
        for (int i = 0; i < kMine; ++i) {
          const int row = (ThreadIndex() + kTensorThreads * i) / Shared::kOutputs;
          if (row >= Shared::kRows) break;
          const int products = shared.products[slot][row][ThreadIndex() % Shared::kOutputs];
          y[i] = y[i] + static_cast<float>(products) * shared.scales[slot][row] * scale;
          if (weight.minimums != nullptr) y[i] = y[i] + shared.sums[slot][row] * minimum;
        }
      }
    }
    SyncBlock();  // Before the next pass writes.
  }
  if (my_output >= weight.rows) return;
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int row = (ThreadIndex() + kTensorThreads * i) / Shared::kOutputs;
    if (row < Shared::kRows && first_row + row < p.rows) FinishProduct(product, first_row + row, my_output, y[i]);
  }
}

}  // namespace RWKV_CUDA_BUILD
}  // namespace rwkv::kernels::cuda
