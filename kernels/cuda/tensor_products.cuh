// Products of rows and matrices on tensor cores: a block has 16 kOutTiles outputs of 8 kRowTiles rows; its warps take
// chunks of 32 inputs in turn, and their sums meet at the end. Inputs are cut into three bfloat16 parts, which hold all
// bits of a float, and weights of fp16 into two, so that every product is exact and only sums round. How many rows and
// outputs a block has changes no sum, so the bits of a row are the same whatever the launch (law N1); the order of the
// sum within 16 inputs is the hardware's.
//
// With kRounded an input becomes the nearest number of the weights' type, ties to even, and is one part, as a weight of
// fp16 is: a third of the products, a sixth with fp16. An input beyond fp16 is infinite then.
//
// Weights go past shared memory: a lane reads 16 bytes of two rows, neighbouring lanes the 64 bytes of a row's chunk,
// and which input is which in the product does not matter as long as both factors agree.
#pragma once

#include "kernels/cuda/products.cuh"

namespace rwkv::kernels::cuda {
inline namespace RWKV_CUDA_BUILD {

constexpr int kTensorWarps = 8;
constexpr int kTensorThreads = kTensorWarps * kWarpThreads;
constexpr int kTensorInputs = 32;  // of a warp's chunk
constexpr int kFloatParts = 3;

template <int kOutTiles, int kRowTiles>
struct TensorShared {
  static constexpr int kOutputs = 16 * kOutTiles;
  static constexpr int kRows = 8 * kRowTiles;
  float sums[kTensorWarps][kRows][kOutputs + 4];  // So that the four rows of a store lie in different banks.
};

// x as a sum of bfloat16 values, whose bits are in the upper half of `parts`: exact with three, down to the subnormals.
template <int kParts>
RWKV_DEVICE void SplitFloat(float x, uint32_t (&parts)[kParts]) {
  const uint32_t bits = AsBits(x);
  const bool is_finite = (bits & 0x7f800000u) != 0x7f800000u;
  const bool is_nan = !is_finite && (bits & 0x007fffffu) != 0;
  parts[0] = is_nan ? 0x7fc00000u : bits & 0xffff0000u;
  float rest = is_finite ? x - AsFloat(parts[0]) : 0.0f;
#pragma unroll
  for (int part = 1; part < kParts; ++part) {
    parts[part] = AsBits(rest) & 0xffff0000u;
    rest = rest - AsFloat(parts[part]);
  }
}

// The nearest number of the weights' type.
template <WeightKind kKind>
RWKV_DEVICE uint32_t RoundInput(float x) {
  return kKind == WeightKind::kFloat16 ? FloatToHalf(x) : FloatToBFloat16(x);
}

// Inputs [k, k + 8) of a row as pairs, by part.
template <WeightKind kKind, int kInputParts>
RWKV_DEVICE void SplitInputs(const float (&x)[kChunk], uint32_t (&to)[kInputParts][kChunk / 2]) {
#pragma unroll
  for (int pair = 0; pair < kChunk / 2; ++pair) {
    if constexpr (kInputParts == 1) {
      to[0][pair] = RoundInput<kKind>(x[2 * pair]) | RoundInput<kKind>(x[2 * pair + 1]) << 16;
    } else {
      uint32_t low[kInputParts];
      uint32_t high[kInputParts];
      SplitFloat(x[2 * pair], low);
      SplitFloat(x[2 * pair + 1], high);
#pragma unroll
      for (int part = 0; part < kInputParts; ++part) to[part][pair] = low[part] >> 16 | high[part];
    }
  }
}

// Weights [k, k + 8) of a row as pairs, by part; zeros behind the end, where the row's memory ends as well.
template <WeightKind kKind, int kParts>
RWKV_DEVICE void LoadWeightPairs(const char* row, int k, int inputs, uint32_t (&to)[kParts][kChunk / 2]) {
  const Bits4 v = k < inputs ? LoadStreaming16(row + 2 * k) : Bits4{0, 0, 0, 0};
  const uint32_t words[kChunk / 2] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int pair = 0; pair < kChunk / 2; ++pair) {
    if constexpr (kParts == 1) {
      to[0][pair] = words[pair];
    } else {
      uint32_t low[2];
      uint32_t high[2];
      SplitFloat(HalfToFloat(words[pair] & 0xffffu), low);
      SplitFloat(HalfToFloat(words[pair] >> 16), high);
      to[0][pair] = low[0] >> 16 | high[0];
      to[1][pair] = low[1] >> 16 | high[1];
    }
  }
}

// With `wide` every x is aligned and has a multiple of four inputs.
template <WeightKind kKind, int kOutTiles, int kRowTiles, bool kRounded>
RWKV_KERNEL(kTensorThreads)
TensorProductsKernel(ProductsParameters p, bool wide) {
  using Shared = TensorShared<kOutTiles, kRowTiles>;
  constexpr int kInputParts = kRounded ? 1 : kFloatParts;
  constexpr int kParts = kKind == WeightKind::kFloat16 && !kRounded ? 2 : 1;
  constexpr int kSteps = 2 * kParts * kInputParts;  // of a chunk: 16 inputs each
  // Blocks that run side by side have the same weights for other rows.
  const uint32_t tile = static_cast<uint32_t>(BlockIndexX()) % p.row_tiles;
  const uint32_t block = static_cast<uint32_t>(BlockIndexX()) / p.row_tiles;
  int index = 0;
  while (index + 1 < p.count && block >= p.products[index + 1].first_block) ++index;
  const ProductParameters& product = p.products[index];
  constexpr int kBlockOutputs = Shared::kOutputs;
  PrefetchRows(product.weight, static_cast<int>(block - product.first_block) * kBlockOutputs, kBlockOutputs);
  BeginKernel();
  const int inputs = product.weight.cols;
  const int lane = ThreadIndex() % kWarpThreads;
  const int warp = ThreadIndex() / kWarpThreads;
  const int g = lane / 4;
  const int t = lane % 4;
  const int first_output = static_cast<int>(block - product.first_block) * Shared::kOutputs;
  const int64_t first_row = int64_t{tile} * Shared::kRows;

  // Outputs behind the last one repeat it, and are not stored; rows there are zeros.
  const char* weights[kOutTiles][2];
#pragma unroll
  for (int o = 0; o < kOutTiles; ++o) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int output = first_output + 16 * o + 8 * half + g;
      const int64_t row = output < product.weight.rows ? output : product.weight.rows - 1;
      weights[o][half] = static_cast<const char*>(product.weight.data) + row * product.weight.pitch;
    }
  }
  float sums[kOutTiles][kRowTiles][4] = {};
#pragma unroll(kRowTiles == 1 ? 4 : 1)
  for (int begin = warp * kTensorInputs; begin < inputs; begin += kTensorWarps * kTensorInputs) {
    const int k = begin + kChunk * t;
    uint32_t a[kOutTiles][2][kParts][kChunk / 2];
#pragma unroll
    for (int o = 0; o < kOutTiles; ++o) {
#pragma unroll
      for (int half = 0; half < 2; ++half) LoadWeightPairs<kKind>(weights[o][half], k, inputs, a[o][half]);
    }
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const int64_t row = first_row + 8 * r + g;
      float x[kChunk] = {};
      if (row < p.rows) {
        const float* const from = product.x + row * inputs;
        if (wide && k + kChunk <= inputs) {
          LoadWideInputs(from, k, x);
        } else {
          LoadInputs(from, k, inputs, x);
        }
      }
      uint32_t b[kInputParts][kChunk / 2];
      SplitInputs<kKind>(x, b);
#pragma unroll
      for (int o = 0; o < kOutTiles; ++o) {
        uint32_t step_a[kSteps][4];
        uint32_t step_b[kSteps][2];
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          const int part = s % kInputParts;
          const int weight_part = s / kInputParts % kParts;
          const int pair = s / (kInputParts * kParts) * 2;
          step_a[s][0] = a[o][0][weight_part][pair];
          step_a[s][1] = a[o][1][weight_part][pair];
          step_a[s][2] = a[o][0][weight_part][pair + 1];
          step_a[s][3] = a[o][1][weight_part][pair + 1];
          step_b[s][0] = b[part][pair];
          step_b[s][1] = b[part][pair + 1];
        }
        if constexpr (kRounded && kKind == WeightKind::kFloat16) {
          MmaHalf(sums[o][r], step_a, step_b);
        } else {
          MmaBf16(sums[o][r], step_a, step_b);
        }
      }
    }
  }

  auto& shared = BlockShared<Shared>();
#pragma unroll
  for (int o = 0; o < kOutTiles; ++o) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) shared.sums[warp][8 * r + 2 * t + i % 2][16 * o + g + i / 2 * 8] = sums[o][r][i];
    }
  }
  SyncBlock();
  for (int i = ThreadIndex(); i < Shared::kRows * Shared::kOutputs; i += kTensorThreads) {
    const int row = i / Shared::kOutputs;
    const int output = i % Shared::kOutputs;
    if (first_row + row >= p.rows || first_output + output >= product.weight.rows) continue;
    float z = 0.0f;
#pragma unroll
    for (int w = 0; w < kTensorWarps; ++w) z += shared.sums[w][row][output];
    FinishProduct(product, first_row + row, first_output + output, z);
  }
}

}  // namespace RWKV_CUDA_BUILD
}  // namespace rwkv::kernels::cuda
