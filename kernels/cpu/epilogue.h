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

// The lanes are the outputs first + i * step, those behind the last one are nobody's.
RWKV_INLINE void Finish(const MatmulArgs& args, int64_t row, int64_t first, int64_t step, F32 z) {
  const int64_t outputs = args.weight.rows;
  const int64_t count = first < outputs ? (outputs - first + step - 1) / step : 0;
  const int64_t at = row * outputs + first;
  const bool together = step == 1 && count >= kLanes;
  const auto load = [&](const float* from) {
    if (together) return Load(from);
    F32 v = {};
    for (int64_t i = 0; i < kLanes && i < count; ++i) v[i] = from[i * step];
    return v;
  };
  if (args.bias != nullptr) z += load(args.bias + first);
  z = Activate(args.activation, z);
  if (args.gate != nullptr) z = z * load(args.gate + at);
  if (args.accumulate) z = load(args.y + at) + z;
  if (together) return Store(args.y + at, z);
  for (int64_t i = 0; i < kLanes && i < count; ++i) args.y[at + i * step] = z[i];
}

}  // namespace
}  // namespace rwkv::kernels::cpu
