// One row, or a few, times int8 weights that lie by their inputs (columns.h). Of one row zeros are skipped with all
// their weights. Only for the kernels_*.cc files.
#pragma once

#include <cstdint>

#include "kernels/cpu/columns.h"
#include "kernels/cpu/epilogue.h"
#include "kernels/cpu/integer_codes.h"
#include "kernels/cpu/integer_rows.h"
#include "kernels/cpu/integer_tile.h"
#include "kernels/cpu/integer_tiles.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cpu/simd.h"

namespace rwkv::kernels::cpu {
namespace {

constexpr int kQuarters = 4;  // of a line, 16 outputs each
constexpr int64_t kFewRowsOfColumns = 8;
constexpr int kTileRowsOfColumns = 4;

// Whether the rows are multiplied here.
RWKV_INLINE bool AreColumns(const MatmulArgs& args) {
  return args.by_columns && args.rows <= kFewRowsOfColumns && !AreTiles(args);
}

// Four inputs of a group that are not zero, where in the block their lines are, and the pairs that fit the codes: the
// first and third, the second and fourth. The last ones of a group may be zeros.
struct InputFour {
  uint32_t pairs[2];
  int32_t lines[4];  // bytes
};

// What the row becomes: its fours, and per group their end and its scale.
struct SparseRow {
  SparseRow(const MatrixView& matrix, void* memory)
      : groups((matrix.cols + matrix.group - 1) / matrix.group),
        scales(static_cast<float*>(memory)),
        ends(reinterpret_cast<int32_t*>(scales + groups)),
        fours(reinterpret_cast<InputFour*>(ends + groups)) {}

  static int64_t Bytes(const MatrixView& matrix) {
    const int64_t groups = (matrix.cols + matrix.group - 1) / matrix.group;
    return (groups * 8 + groups * matrix.group / 4 * static_cast<int64_t>(sizeof(InputFour)) + 63) / 64 * 64;
  }

  int64_t groups;
  float* scales;
  int32_t* ends;
  InputFour* fours;
};

RWKV_INLINE void FixSparseRow(const MatmulArgs& args) {
  const SparseRow row(args.weight, args.prepared);
  const int64_t size = args.weight.group;
  int32_t count = 0;
  for (int64_t g = 0; g < row.groups; ++g) {
    const int64_t left = args.weight.cols - g * size;
    const FixedGroup group = FixGroup(args.x + g * size, left < size ? left : size, size);
    alignas(64) int32_t fixed[64 + 1] = {};
    for (int64_t i = 0; i < size / kLanes; ++i) __builtin_memcpy(fixed + i * kLanes, &group.fixed[i], 64);
    int32_t places[64 + 4];
    int32_t found = 0;
    for (int32_t i = 0; i < size; ++i) {
      places[found] = i;
      found += fixed[i] != 0 ? 1 : 0;
    }
    for (int32_t i = found; i < found + 3; ++i) places[i] = 64;  // A zero.
    for (int32_t i = 0; i < found; i += 4) {
      InputFour& four = row.fours[count++];
      const auto value = [&](int32_t j) { return static_cast<uint32_t>(fixed[places[i + j]]); };
      four.pairs[0] = (value(0) & 0xffffu) | value(2) << 16;
      four.pairs[1] = (value(1) & 0xffffu) | value(3) << 16;
      for (int32_t j = 0; j < 4; ++j) {
        const int64_t input = g * size + (i + j < found ? places[i + j] : places[i]);
        four.lines[j] = static_cast<int32_t>(input * Columns::kOutputs);
      }
    }
    row.ends[g] = count;
    row.scales[g] = group.scale;
  }
}

// To the products of a quarter what four lines add.
template <int kQuarter>
RWKV_INLINE I32 AddLines(I32 products, const uint8_t* codes, const InputFour& four) {
  const U32 dwords = DwordsOfLines<kQuarter>(codes + four.lines[0], codes + four.lines[1], codes + four.lines[2],
                                             codes + four.lines[3]);
  products = AddPairs(products, SignedBytes::Widen<0>(dwords), U32{} + four.pairs[0]);
  return AddPairs(products, SignedBytes::Widen<1>(dwords), U32{} + four.pairs[1]);
}

// The row times a block of outputs.
__attribute__((noinline)) void ComputeSparseRow(const MatmulArgs& args, int64_t block) {
  // Fours from what is read to what is asked for, into the second-level cache: more can be on the way there.
  constexpr int64_t kAhead = 12;
  const Columns columns(args.weight);
  const auto* const memory = static_cast<const uint8_t*>(args.weight.data);
  const uint8_t* const codes = memory + columns.codes(block);
  const auto* const scales = reinterpret_cast<const uint16_t*>(memory + columns.scales(block));
  const SparseRow row(args.weight, args.prepared);
  const int32_t end = row.ends[row.groups - 1];
  F32 sums[kQuarters] = {};
  int32_t i = 0;
  for (int64_t g = 0; g < row.groups; ++g) {
    I32 products[kQuarters] = {};
    for (; i < row.ends[g]; ++i) {
      const InputFour& next = row.fours[i + kAhead < end ? i + kAhead : i];
      for (int j = 0; j < 4; ++j) __builtin_prefetch(codes + next.lines[j], 0, 2);
      products[0] = AddLines<0>(products[0], codes, row.fours[i]);
      products[1] = AddLines<1>(products[1], codes, row.fours[i]);
      products[2] = AddLines<2>(products[2], codes, row.fours[i]);
      products[3] = AddLines<3>(products[3], codes, row.fours[i]);
    }
#pragma clang loop unroll(full)
    for (int q = 0; q < kQuarters; ++q) {
      sums[q] = AddScaled(sums[q], products[q], row.scales[g], scales + g * Columns::kOutputs + q * kLanes);
    }
  }
  for (int q = 0; q < kQuarters; ++q) Finish(args, 0, block * Columns::kOutputs + q * kLanes, 1, sums[q]);
}

// kRows rows from `first` on, of which the last ones may be one again, times a block of outputs.
template <int kRows>
__attribute__((noinline)) void ComputeFewColumns(const MatmulArgs& args, int64_t first, int64_t block) {
  const Columns columns(args.weight);
  const auto* const memory = static_cast<const uint8_t*>(args.weight.data);
  const uint8_t* line = memory + columns.codes(block);
  const auto* const scales = reinterpret_cast<const uint16_t*>(memory + columns.scales(block));
  const IntegerRows rows(args.weight, args.prepared);
  const int64_t fours = args.weight.group / 4;
  F32 sums[kRows * kQuarters] = {};
  for (int64_t g = 0; g < columns.groups; ++g) {
    I32 products[kRows * kQuarters] = {};
    for (int64_t i = 0; i < fours; ++i, line += 4 * Columns::kOutputs) {
      __builtin_prefetch(line + 32 * Columns::kOutputs);
      __builtin_prefetch(line + 33 * Columns::kOutputs);
      __builtin_prefetch(line + 34 * Columns::kOutputs);
      __builtin_prefetch(line + 35 * Columns::kOutputs);
      const auto add = [&](auto quarter) {
        constexpr int q = decltype(quarter)::kDwords;
        const U32 dwords = DwordsOfLines<q>(line, line + 64, line + 128, line + 192);
        const U32 even = SignedBytes::Widen<0>(dwords), odd = SignedBytes::Widen<1>(dwords);
#pragma clang loop unroll(full)
        for (int r = 0; r < kRows; ++r) {
          const int64_t row = first + r < args.rows ? first + r : args.rows - 1;
          const uint32_t* const pairs = rows.pairs(row) + (g * fours + i) * 2;
          I32& sum = products[r * kQuarters + q];
          sum = AddPairs(AddPairs(sum, even, U32{} + pairs[0]), odd, U32{} + pairs[1]);
        }
      };
      add(Dwords<0>());
      add(Dwords<1>());
      add(Dwords<2>());
      add(Dwords<3>());
    }
#pragma clang loop unroll(full)
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first + r < args.rows ? first + r : args.rows - 1;
#pragma clang loop unroll(full)
      for (int q = 0; q < kQuarters; ++q) {
        F32& sum = sums[r * kQuarters + q];
        sum = AddScaled(sum, products[r * kQuarters + q], rows.scales(row)[g],
                        scales + g * Columns::kOutputs + q * kLanes);
      }
    }
  }
  for (int r = 0; r < kRows && first + r < args.rows; ++r) {
    for (int q = 0; q < kQuarters; ++q) {
      Finish(args, first + r, block * Columns::kOutputs + q * kLanes, 1, sums[r * kQuarters + q]);
    }
  }
}

RWKV_INLINE void ComputeColumns(const MatmulArgs& args, int64_t block) {
  if (args.rows == 1) return ComputeSparseRow(args, block);
  for (int64_t first = 0; first < args.rows; first += kTileRowsOfColumns) {
    if (args.rows - first <= 2) {
      ComputeFewColumns<2>(args, first, block);
    } else {
      ComputeFewColumns<kTileRowsOfColumns>(args, first, block);
    }
  }
}

}  // namespace
}  // namespace rwkv::kernels::cpu
