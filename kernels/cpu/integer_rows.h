// A product's rows in fixed point (kernels/base/fixed_point.h). Only for the kernels_*.cc files.
#pragma once

#include <cstdint>

#include "kernels/base/fixed_point.h"
#include "kernels/cpu/integer_codes.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cpu/simd.h"

namespace rwkv::kernels::cpu {
namespace {

// What a row becomes: per group its inputs as pairs in the order of the codes, its scale, scale * sum of its inputs, and
// what the sum of products has too much when codes are not centred.
struct IntegerRows {
  IntegerRows(const MatrixView& matrix, void* memory)
      : group(matrix.quantization == Quantization::kBlocks ? 32 : matrix.group),
        groups((matrix.cols + group - 1) / group),
        stride((groups * (2 * group + 12) + 63) / 64 * 64),
        memory(static_cast<char*>(memory)) {}

  uint32_t* pairs(int64_t row) const { return reinterpret_cast<uint32_t*>(memory + row * stride); }
  float* scales(int64_t row) const { return reinterpret_cast<float*>(memory + row * stride + groups * 2 * group); }
  float* sums(int64_t row) const { return scales(row) + groups; }
  int32_t* excess(int64_t row) const { return reinterpret_cast<int32_t*>(sums(row) + groups); }

  int64_t group;
  int64_t groups;
  int64_t stride;  // bytes
  char* memory;
};

RWKV_INLINE int64_t IntegerRowsBytes(const MatmulArgs& args) {
  return args.rows * IntegerRows(args.weight, nullptr).stride;
}

RWKV_INLINE int32_t SumOfLanes(I32 v) {
  int32_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

// One group of `count` inputs, at most 64; what is missing is zero.
template <typename Codes>
RWKV_INLINE void FixGroup(const float* x, int64_t count, int64_t group, uint32_t* pairs, float* scale, float* sum,
                          int32_t* excess) {
  F32 inputs[4];
  U32 largest = {};
  for (int64_t i = 0; i < group / kLanes; ++i) {
    const int64_t left = count - i * kLanes;
    inputs[i] = left > 0 ? LoadSome(x + i * kLanes, left) : F32{};
    const U32 magnitude = (U32)inputs[i] & 0x7fffffffu;  // Of floats without sign the bits are in the same order.
    largest = (U32)Select((I32)(largest < magnitude), (F32)magnitude, (F32)largest);
  }
  uint32_t largest_bits = 0;
  for (int i = 0; i < kLanes; ++i) largest_bits = largest_bits < largest[i] ? largest[i] : largest_bits;
  float maximum;
  __builtin_memcpy(&maximum, &largest_bits, sizeof maximum);
  const bool finite = largest_bits < 0x7f800000u;
  const bool none = !finite || maximum < kSmallestFixedPointMaximum;
  const F32 inverse = Broadcast(none ? 0.0f : kLargestFixedPoint / maximum);
  *scale = none ? (finite ? 0.0f : __builtin_nanf("")) : maximum / kLargestFixedPoint;
  I32 fixed[4];
  I32 total = {};
  for (int64_t i = 0; i < group / kLanes; ++i) {
    const F32 magic = Broadcast(0x1.8p23f);  // Adding it leaves the integer, rounded to even, in the low bits.
    const F32 scaled = none ? F32{} : inputs[i] * inverse;
    fixed[i] = (I32)((U32)(scaled + magic) - (U32)magic);
    total += fixed[i];
  }
  for (int64_t i = 0; i < group / kLanes; i += 2) {
    const U32 both = Codes::Pairs(fixed[i], fixed[i + 1]);
    __builtin_memcpy(pairs + i * (kLanes / 2), &both, sizeof both);
  }
  const int32_t all = SumOfLanes(total);
  *sum = static_cast<float>(all) * *scale;
  *excess = Codes::kCentre * all;
}

// Rows [begin, end).
template <typename Codes>
RWKV_INLINE void FixRowsOf(const MatmulArgs& args, int64_t begin, int64_t end) {
  const IntegerRows rows(args.weight, args.fixed);
  const int64_t inputs = args.weight.cols;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t g = 0; g < rows.groups; ++g) {
      const int64_t left = inputs - g * rows.group;
      FixGroup<Codes>(args.x + row * inputs + g * rows.group, left < rows.group ? left : rows.group, rows.group,
                      rows.pairs(row) + g * rows.group / 2, rows.scales(row) + g, rows.sums(row) + g,
                      rows.excess(row) + g);
    }
  }
}

}  // namespace
}  // namespace rwkv::kernels::cpu
