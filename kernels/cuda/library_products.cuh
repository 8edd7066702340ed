// What goes before and behind a product that another library computes: inputs rounded to the weights' type, in rows
// that are padded with zeros; and the epilogue.
#pragma once

#include "kernels/cuda/products.cuh"

namespace rwkv::kernels::cuda {
inline namespace RWKV_CUDA_BUILD {

constexpr int kPieceThreads = 256;
constexpr int kPieceInputs = 4;  // of a thread

struct RoundParameters {
  const float* x;
  uint16_t* to;
  int64_t rows;     // Of x; zeros behind them.
  int64_t to_rows;  // And there.
  int32_t inputs;
  int32_t pitch;  // Numbers from row to row of `to`, a multiple of four.
  bool is_half;
};

// With `wide` x is aligned and has a multiple of four inputs.
RWKV_KERNEL(kPieceThreads) RoundInputsKernel(RoundParameters p, bool wide) {
  BeginKernel();
  const int64_t at = (int64_t{BlockIndexX()} * kPieceThreads + ThreadIndex()) * kPieceInputs;
  const int64_t row = at / p.pitch;
  const int k = static_cast<int>(at - row * p.pitch);
  if (row >= p.to_rows) return;
  Float4 v = {0.0f, 0.0f, 0.0f, 0.0f};
  if (row < p.rows && k < p.inputs) v = LoadChannels(p.x + row * p.inputs, k, p.inputs, wide);
  const auto pair = [&](float low, float high) {
    return p.is_half ? FloatToHalf(low) | FloatToHalf(high) << 16 : FloatToBFloat16(low) | FloatToBFloat16(high) << 16;
  };
  Store8(p.to + at, {pair(v.x, v.y), pair(v.z, v.w)});
}

struct FinishParameters {
  ProductParameters product;
  int64_t rows;
  const float* sums;
  int64_t pitch;  // Sums from row to row.
};

// The sums may be what is written.
RWKV_KERNEL(kPieceThreads) FinishProductKernel(FinishParameters p) {
  BeginKernel();
  const int64_t at = int64_t{BlockIndexX()} * kPieceThreads + ThreadIndex();
  const int64_t row = at / p.product.weight.rows;
  const int output = static_cast<int>(at - row * p.product.weight.rows);
  if (row < p.rows) FinishProduct(p.product, row, output, p.sums[row * p.pitch + output]);
}

}  // namespace RWKV_CUDA_BUILD
}  // namespace rwkv::kernels::cuda
