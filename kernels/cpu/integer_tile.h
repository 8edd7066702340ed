// Sixteen outputs of a matrix of whole numbers: where their codes are, and their scales. Only for the kernels_*.cc
// files.
#pragma once

#include <cstdint>

#include "kernels/cpu/columns.h"
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

// The codes and scales of 16 outputs. By columns they are neighbours, the first one's number a multiple of 16.
struct IntegerTile {
  IntegerTile(const MatmulArgs& args, const IntegerMatrix& matrix, int64_t first, int64_t step, uint16_t* halves) {
    const int64_t outputs = args.weight.rows;
    if (args.by_columns) {
      const Columns all(args.weight);
      const int64_t output = first < outputs ? first : outputs - 1;  // As below.
      const int64_t block = output / Columns::kOutputs;
      const auto* const memory = static_cast<const uint8_t*>(args.weight.data);
      columns = memory + all.codes(block);
      quarter = output % Columns::kOutputs / kLanes;
      scales = {halves, nullptr};
      const auto* const from = reinterpret_cast<const uint16_t*>(memory + all.scales(block)) + quarter * kLanes;
      for (int64_t g = 0; g < all.groups; ++g) {
        __builtin_memcpy(halves + g * kLanes, from + g * Columns::kOutputs, 2 * kLanes);
      }
      return;
    }
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
  const uint8_t* columns = nullptr;  // Where it has codes instead of `rows`: a quarter of each line.
  int64_t quarter = 0;
  TileScales scales;
};

// What a group adds to the sums, each operation rounded: its products times both scales, then its part of the minimums.
// `products`: exact; scale, sum: the row's of that group.
RWKV_INLINE F32 AddScaled(F32 sums, I32 products, float scale, const uint16_t* halves) {
  return sums + (__builtin_convertvector(products, F32) * Broadcast(scale)) * LoadHalves(halves);
}
RWKV_INLINE F32 AddGroup(F32 sums, I32 products, float scale, float sum, const TileScales& tile, int64_t g) {
  sums = AddScaled(sums, products, scale, tile.scales + g * kLanes);
  if (tile.minimums == nullptr) return sums;
  return sums + Broadcast(sum) * LoadHalves(tile.minimums + g * kLanes);
}

constexpr int64_t kIntegerPartBytes = 64 * 1024;  // Of weights, some.

RWKV_INLINE int64_t TilesOfPart(const MatmulArgs& args) {
  const int64_t tiles = kIntegerPartBytes / (kLanes * RowBytes(args.weight));
  return tiles < 1 ? 1 : tiles;
}

// Few rows: which outputs the i-th of `count` tiles has, first(i) + j * step for j < 16. A tile reads 16 streams, as
// far apart as there are tiles: an odd number of rows, because at powers of two they meet in the same sets of caches.
struct OutputTiles {
  explicit OutputTiles(const MatmulArgs& args, bool far = true) : count((args.weight.rows + kLanes - 1) / kLanes) {
    if (args.by_columns || !far) return;
    if (count >= 8) count |= 1;
    step = count;
    between = 1;
  }
  int64_t first(int64_t i) const { return i * between; }

  int64_t count;
  int64_t step = 1;
  int64_t between = kLanes;
};

}  // namespace
}  // namespace rwkv::kernels::cpu
