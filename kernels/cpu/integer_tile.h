// Sixteen outputs of a matrix of whole numbers: where their codes are, and their scales. Only for the kernels_*.cc
// files.
#pragma once

#include <cstdint>

#include "kernels/cpu/integer_codes.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cpu/simd.h"

namespace rwkv::kernels::cpu {
namespace {

// Scales of a tile, [groups][16 outputs] halves, and its minimums.
struct TileScales {
  uint16_t* scales;
  uint16_t* minimums;
};

RWKV_INLINE F32 LoadHalves(const uint16_t* halves) { return WidenHalf(*reinterpret_cast<const U16Unaligned*>(halves)); }

// to[g][i]: the half of group g of the i-th output.
RWKV_INLINE void GatherHalves(const uint8_t* from, int64_t row_bytes, int64_t step_bytes, const int64_t* outputs,
                              int64_t groups, uint16_t* to) {
  const uint8_t* rows[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    rows[i] = from + outputs[i] * row_bytes;
    __builtin_prefetch(rows[i] + kPrefetch / 4);
  }
  constexpr int64_t kTogether = 8;  // Groups in the 16 bytes that are transposed at once.
  if (step_bytes == 2 && groups >= kTogether) {
    for (int64_t g = 0; g < groups; g += kTogether) {
      const int64_t begin = g + kTogether <= groups ? g : groups - kTogether;
      U32 pairs[kTogether / 2];
      LoadTransposed(rows, 2 * begin, pairs);
      for (int64_t j = 0; j < kTogether; ++j) {
        const U16 halves = __builtin_convertvector(j % 2 == 0 ? pairs[j / 2] : pairs[j / 2] >> 16, U16);
        __builtin_memcpy(to + (begin + j) * kLanes, &halves, sizeof halves);
      }
    }
    return;
  }
  for (int i = 0; i < kLanes; ++i) {
    for (int64_t g = 0; g < groups; ++g) __builtin_memcpy(to + g * kLanes + i, rows[i] + g * step_bytes, 2);
  }
}

// The codes and scales of 16 outputs.
struct IntegerTile {
  IntegerTile(const MatmulArgs& args, const IntegerMatrix& matrix, int64_t first, int64_t step, uint16_t* halves) {
    const int64_t outputs = args.weight.rows;
    int64_t at[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const int64_t output = first + i * step;
      at[i] = output < outputs ? output : outputs - 1;  // Computed, but stored nowhere.
      rows[i] = matrix.codes + at[i] * matrix.row_bytes;
    }
    scales.scales = halves;
    scales.minimums = matrix.minimums != nullptr ? halves + matrix.groups * kLanes : nullptr;
    GatherHalves(matrix.scales, matrix.scale_row_bytes, matrix.scale_bytes, at, matrix.groups, scales.scales);
    if (scales.minimums == nullptr) return;
    GatherHalves(matrix.minimums, matrix.scale_row_bytes, matrix.scale_bytes, at, matrix.groups, scales.minimums);
  }

  const uint8_t* rows[kLanes];
  TileScales scales;
};

// What a group adds to the sums, each operation rounded: its products times both scales, then its part of the minimums.
// `products`: exact; scale, sum: the row's of that group.
RWKV_INLINE F32 AddGroup(F32 sums, I32 products, float scale, float sum, const TileScales& tile, int64_t g) {
  sums = sums + (__builtin_convertvector(products, F32) * Broadcast(scale)) * LoadHalves(tile.scales + g * kLanes);
  if (tile.minimums == nullptr) return sums;
  return sums + Broadcast(sum) * LoadHalves(tile.minimums + g * kLanes);
}

// How far apart the streams are, which is how many tiles there are: an odd number of rows, because at powers of two
// they meet in the same sets of the caches.
RWKV_INLINE int64_t StreamStep(int64_t outputs) {
  const int64_t step = (outputs + kLanes - 1) / kLanes;
  return step < 8 ? step : step | 1;
}

}  // namespace
}  // namespace rwkv::kernels::cpu
