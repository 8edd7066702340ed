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

// Group g of a row as pairs in the order of the codes.
template <typename Codes>
RWKV_INLINE FixedGroup FixPairs(const MatmulArgs& args, int64_t row, int64_t g, int64_t size, uint32_t* pairs) {
  const int64_t left = args.weight.cols - g * size;
  const FixedGroup group = FixGroup(args.x + row * args.weight.cols + g * size, left < size ? left : size, size);
  for (int64_t i = 0; i < size / kLanes; i += 2) {
    const U32 both = Codes::Pairs(group.fixed[i], group.fixed[i + 1]);
    __builtin_memcpy(pairs + i * (kLanes / 2), &both, sizeof both);
  }
  return group;
}

// Rows [begin, end).
template <typename Codes>
RWKV_INLINE void FixRowsOf(const MatmulArgs& args, int64_t begin, int64_t end) {
  const IntegerRows rows(args.weight, args.prepared);
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t g = 0; g < rows.groups; ++g) {
      const FixedGroup group = FixPairs<Codes>(args, row, g, rows.group, rows.pairs(row) + g * rows.group / 2);
      rows.scales(row)[g] = group.scale;
      rows.sums(row)[g] = static_cast<float>(group.sum) * group.scale;
      rows.excess(row)[g] = Codes::kCentre * group.sum;
    }
  }
}

// A few rows by turns, as one tile of them reads from one place: per group [pair][row], and of each row what IntegerRows
// has of it. Rows of the tile that nobody has are zero.
struct InterleavedRows {
  InterleavedRows(const MatrixView& matrix, int64_t rows, void* memory)
      : rows(rows),
        all(matrix, nullptr),
        group_bytes(rows * (2 * all.group + 12)),
        memory(static_cast<char*>(memory)) {}

  int64_t Bytes() const { return (all.groups * group_bytes + 63) / 64 * 64; }

  uint32_t* pairs(int64_t g) const { return reinterpret_cast<uint32_t*>(memory + g * group_bytes); }
  float* scales(int64_t g) const { return reinterpret_cast<float*>(pairs(g) + rows * all.group / 2); }
  float* sums(int64_t g) const { return scales(g) + rows; }
  int32_t* excess(int64_t g) const { return reinterpret_cast<int32_t*>(sums(g) + rows); }

  template <typename Codes>
  void Fix(const MatmulArgs& args) const {
    for (int64_t g = 0; g < all.groups; ++g) {
      for (int64_t row = 0; row < rows; ++row) {
        uint32_t of_row[32] = {};
        FixedGroup group = {};
        if (row < args.rows) group = FixPairs<Codes>(args, row, g, all.group, of_row);
        for (int64_t pair = 0; pair < all.group / 2; ++pair) pairs(g)[pair * rows + row] = of_row[pair];
        scales(g)[row] = group.scale;
        sums(g)[row] = static_cast<float>(group.sum) * group.scale;
        excess(g)[row] = Codes::kCentre * group.sum;
      }
    }
  }

  int64_t rows;
  IntegerRows all;  // Its sizes.
  int64_t group_bytes;
  char* memory;
};

}  // namespace
}  // namespace rwkv::kernels::cpu
