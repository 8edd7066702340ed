// A product's rows in fixed point (kernels/base/fixed_point.h). Only for the kernels_*.cc files.
#pragma once

#include <cstdint>

#include "kernels/base/fixed_point.h"
#include "kernels/cpu/integer_codes.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cpu/simd.h"

namespace rwkv::kernels::cpu {
namespace {

// What a row becomes: per group its inputs as pairs in the order of the codes, its scale, scale * sum of its inputs,
// and what the sum of products has too much when codes are not centred.
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

RWKV_INLINE int32_t SumOfLanes(I32 v) {
  int32_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

// A group of at most 64 inputs as whole numbers.
struct FixedGroup {
  I32 fixed[4];
  float scale;
  int32_t sum;  // of the whole numbers
};

// `count` inputs of a group; what is missing is zero.
RWKV_INLINE FixedGroup FixGroup(const float* x, int64_t count, int64_t group) {
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
  FixedGroup to;
  to.scale = none ? (finite ? 0.0f : __builtin_nanf("")) : maximum / kLargestFixedPoint;
  I32 total = {};
  for (int64_t i = 0; i < group / kLanes; ++i) {
    const F32 magic = Broadcast(0x1.8p23f);  // Adding it leaves the integer, rounded to even, in the low bits.
    const F32 scaled = none ? F32{} : inputs[i] * inverse;
    to.fixed[i] = (I32)((U32)(scaled + magic) - (U32)magic);
    total += to.fixed[i];
  }
  to.sum = SumOfLanes(total);
  return to;
}

// Rows [begin, end).
template <typename Codes>
RWKV_INLINE void FixRowsOf(const MatmulArgs& args, int64_t begin, int64_t end) {
  const IntegerRows rows(args.weight, args.prepared);
  const int64_t inputs = args.weight.cols;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t g = 0; g < rows.groups; ++g) {
      const int64_t left = inputs - g * rows.group;
      const FixedGroup group =
          FixGroup(args.x + row * inputs + g * rows.group, left < rows.group ? left : rows.group, rows.group);
      for (int64_t i = 0; i < rows.group / kLanes; i += 2) {
        const U32 both = Codes::Pairs(group.fixed[i], group.fixed[i + 1]);
        __builtin_memcpy(rows.pairs(row) + g * rows.group / 2 + i * (kLanes / 2), &both, sizeof both);
      }
      rows.scales(row)[g] = group.scale;
      rows.sums(row)[g] = static_cast<float>(group.sum) * group.scale;
      rows.excess(row)[g] = Codes::kCentre * group.sum;
    }
  }
}

}  // namespace
}  // namespace rwkv::kernels::cpu
