// What follows a product's sums (products.h). Only for the kernels_*.cc files.
#pragma once

#include <cstdint>

#include "kernels/cpu/matmul.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/simd_math.h"

namespace rwkv::kernels::cpu {
namespace {

RWKV_INLINE F32 Activate(Activation activation, F32 z) {
  switch (activation) {
    case Activation::kNone:
      return z;
    case Activation::kSigmoid:
      return Sigmoid(z);
    case Activation::kTanh:
      return Tanh(z);
    case Activation::kSquaredRelu: {
      const F32 positive = Select(z < F32{}, F32{}, z);  // NaN stays
      return positive * positive;
    }
    case Activation::kSilu:
      return z * Sigmoid(z);
    case Activation::kDecay:
      return Exp(-Exp(z));
  }
  return z;
}

// What follows the sums z of `row`: `load` and `store` reach the lanes' places from the first one's on.
template <typename LoadLanes, typename StoreLanes>
RWKV_INLINE void FinishLanes(const MatmulArgs& args, int64_t row, int64_t first, F32 z, LoadLanes load,
                             StoreLanes store) {
  const int64_t at = row * args.weight.rows + first;
  if (args.bias != nullptr) z += load(args.bias + first);
  z = Activate(args.activation, z);
  if (args.gate != nullptr) z = z * load(args.gate + at);
  if (args.accumulate) z = load(args.y + at) + z;
  store(args.y + at, z);
}

// The first `most` lanes are the outputs from `first` on, those behind the last one are nobody's.
RWKV_INLINE void FinishRun(const MatmulArgs& args, int64_t row, int64_t first, int64_t most, F32 z) {
  const int64_t left = args.weight.rows - first;
  const int64_t count = most < left ? most : left;
  if (count <= 0) return;
  FinishLanes(
      args, row, first, z, [&](const float* from) RWKV_INLINE_LAMBDA { return LoadSome(from, count); },
      [&](float* to, F32 v) RWKV_INLINE_LAMBDA { StoreSome(to, v, count); });
}

// The lanes are the outputs first + i * step, those behind the last one are nobody's.
RWKV_INLINE void Finish(const MatmulArgs& args, int64_t row, int64_t first, int64_t step, F32 z) {
  if (step == 1) return FinishRun(args, row, first, kLanes, z);
  const int64_t outputs = args.weight.rows;
  const int64_t count = first < outputs ? (outputs - first + step - 1) / step : 0;
  FinishLanes(
      args, row, first, z,
      [&](const float* from) RWKV_INLINE_LAMBDA {
        F32 v = {};
        for (int64_t i = 0; i < kLanes && i < count; ++i) v[i] = from[i * step];
        return v;
      },
      [&](float* to, F32 v) RWKV_INLINE_LAMBDA {
        for (int64_t i = 0; i < kLanes && i < count; ++i) to[i * step] = v[i];
      });
}

}  // namespace
}  // namespace rwkv::kernels::cpu
