// Pairs of bf16 numbers, which an instruction multiplies and adds up: what inputs rounded to bf16 become. 32 of them
// take the place of 16 floats. Only for the kernels_*.cc files; RWKV_HAS_PAIRS: this one has the instruction, behind a
// target attribute, for processors that say so.
#pragma once

#include <cstdint>

#include "kernels/base/matrix.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cpu/simd.h"

namespace rwkv::kernels::cpu {
namespace {

// The nearest bf16, ties to even, as the upper half of a float.
RWKV_INLINE F32 RoundToBFloat16(F32 x) {
  const U32 bits = (U32)x;
  const F32 rounded = (F32)((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
  return Select((I32)((bits & 0x7fffffffu) > 0x7f800000u), Broadcast(__builtin_nanf("")), rounded);
}

// Of floats whose lower halves are zero: lane i has numbers 2 i (low) and 2 i + 1 of a's and then b's.
RWKV_INLINE F32 JoinPairs(F32 a, F32 b) {
  const U32 u = (U32)a, v = (U32)b;
  const U32 even = __builtin_shufflevector(u, v, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const U32 odd = __builtin_shufflevector(u, v, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return (F32)(even >> 16 | odd);
}

// At most 32 of `left` inputs, rounded; the others are zero.
RWKV_INLINE F32 LoadAsPairs(const float* x, int64_t left) {
  const F32 low = LoadSome(x, left);
  const F32 high = left > kLanes ? LoadSome(x + kLanes, left - kLanes) : F32{};
  return JoinPairs(RoundToBFloat16(low), RoundToBFloat16(high));
}

#if defined(RWKV_HAS_PAIRS)
// A matrix of bf16 that is not widened.
struct BFloat16Pairs {};

RWKV_INLINE F32 LoadPairs(const uint16_t* weights) { return Load(reinterpret_cast<const float*>(weights)); }

// The first `count` < 32; the others are zero.
RWKV_INLINE F32 LoadPairsTail(const uint16_t* weights, int64_t count) {
  return (F32)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1u << count) - 1u), weights);
}

RWKV_INLINE bool ArePairs(const MatmulArgs& args) {
  return args.round_inputs && args.weight.quantization == Quantization::kNone && args.weight.dtype == DType::kBFloat16;
}
#else
RWKV_INLINE bool ArePairs(const MatmulArgs&) { return false; }
#endif

}  // namespace
}  // namespace rwkv::kernels::cpu
