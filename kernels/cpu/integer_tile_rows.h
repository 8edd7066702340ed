// A product's rows in fixed point, as the tiles that integer_tiles.h multiplies. Only for the kernels_*.cc files.
#pragma once

#include <cstdint>

#include "kernels/cpu/integer_rows.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/tiles.h"

namespace rwkv::kernels::cpu {
namespace {

#if defined(RWKV_HAS_TILES)

constexpr int64_t kTileInputs = 64;
constexpr int64_t kWholeTileBytes = kLanes * kTileBytes;
// Up to so many rows have the products of their high and of their low bytes in one tile, side by side.
constexpr int64_t kMostJointRows = kLanes / 2;

// Rows by 16; per group the tile of their high bytes, that of their low ones, their scales, scale * sum of inputs. Joint
// rows have one tile, the low bytes behind the high ones of 8 rows. The rows that the last block has too much are zero.
// A tile is [four inputs][row][4]; weights by columns are the other factor, and a tile of rows is [row][input].
struct TileRows {
  explicit TileRows(const MatmulArgs& args)
      : joint(args.rows <= kMostJointRows),
        by_columns(args.by_columns),
        groups((args.weight.cols + kTileInputs - 1) / kTileInputs),
        block_rows(joint ? kMostJointRows : kLanes),
        blocks((args.rows + block_rows - 1) / block_rows),
        group_bytes((joint ? 1 : 2) * kWholeTileBytes + 2 * kLanes * 4),
        memory(static_cast<char*>(args.prepared)) {}

  int8_t* high(int64_t block, int64_t g) const {
    return reinterpret_cast<int8_t*>(memory + (block * groups + g) * group_bytes);
  }
  int8_t* low(int64_t block, int64_t g) const {
    return high(block, g) + (!joint ? kWholeTileBytes : by_columns ? kWholeTileBytes / 2 : kTileBytes / 2);
  }
  float* scales(int64_t block, int64_t g) const {
    return reinterpret_cast<float*>(high(block, g) + group_bytes) - 2 * kLanes;
  }
  float* sums(int64_t block, int64_t g) const { return scales(block, g) + kLanes; }
  int64_t Bytes() const { return blocks * groups * group_bytes; }
  int64_t RowsOf(int64_t block, int64_t rows) const {
    const int64_t left = rows - block * block_rows;
    return left < block_rows ? left : block_rows;
  }

  bool joint;
  bool by_columns;
  int64_t groups;
  int64_t block_rows;
  int64_t blocks;
  int64_t group_bytes;
  char* memory;
};

// Rows [begin, end), and what is behind the last one. Codes of four bits are widened with the inputs of even places
// first.
template <typename Codes>
RWKV_INLINE void FixTileRows(const MatmulArgs& args, int64_t begin, int64_t end) {
  const TileRows rows(args);
  const int64_t inputs = args.weight.cols;
  const int64_t stop = end == args.rows ? rows.blocks * rows.block_rows : end;
  for (int64_t row = begin; row < stop; ++row) {
    const int64_t block = row / rows.block_rows, column = row % rows.block_rows;
    for (int64_t g = 0; g < rows.groups; ++g) {
      const int64_t left = row < args.rows ? inputs - g * kTileInputs : 0;
      const float* const x = args.x + (left > 0 ? row * inputs + g * kTileInputs : 0);
      const FixedGroup group = FixGroup(x, left < kTileInputs ? left : kTileInputs, kTileInputs);
      const I32 ordered[4] = {
          Codes::kByteVectors == 1 ? group.fixed[0] : Codes::First(group.fixed[0], group.fixed[1]),
          Codes::kByteVectors == 1 ? group.fixed[1] : Codes::First(group.fixed[2], group.fixed[3]),
          Codes::kByteVectors == 1 ? group.fixed[2] : Codes::Second(group.fixed[0], group.fixed[1]),
          Codes::kByteVectors == 1 ? group.fixed[3] : Codes::Second(group.fixed[2], group.fixed[3])};
      for (int64_t i = 0; i < 4; ++i) {
        const I32 highs = (ordered[i] + 128) >> 8;
        const I8 high = __builtin_convertvector(highs, I8);
        const I8 low = __builtin_convertvector(ordered[i] - (highs << 8), I8);
        if (rows.by_columns) {
          __builtin_memcpy(rows.high(block, g) + column * kTileBytes + i * kLanes, &high, sizeof high);
          __builtin_memcpy(rows.low(block, g) + column * kTileBytes + i * kLanes, &low, sizeof low);
          continue;
        }
        for (int64_t j = 0; j < 4; ++j) {  // Fours of inputs, one below the other.
          const int64_t at = (4 * i + j) * kTileBytes + 4 * column;
          __builtin_memcpy(rows.high(block, g) + at, reinterpret_cast<const char*>(&high) + 4 * j, 4);
          __builtin_memcpy(rows.low(block, g) + at, reinterpret_cast<const char*>(&low) + 4 * j, 4);
        }
      }
      rows.scales(block, g)[column] = group.scale;
      rows.sums(block, g)[column] = static_cast<float>(group.sum) * group.scale;
    }
  }
}

#endif

}  // namespace
}  // namespace rwkv::kernels::cpu
