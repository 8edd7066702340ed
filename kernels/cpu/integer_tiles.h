// Rows times a matrix of whole numbers in groups of 64, on the processor's tiles: 16 outputs by 64 inputs times 64
// inputs by 16 rows, once for the high and once for the low bytes of the inputs. The sums are exact, so the bits are
// those of integer_kernels.h. Only for the kernels_*.cc files.
#pragma once

#include <cstdint>

#include "kernels/cpu/epilogue.h"
#include "kernels/cpu/integer_codes.h"
#include "kernels/cpu/integer_rows.h"
#include "kernels/cpu/integer_tile.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/tiles.h"

namespace rwkv::kernels::cpu {
namespace {

constexpr int64_t kTileInputs = 64;
constexpr int64_t kWholeTileBytes = kLanes * kTileBytes;

#if defined(RWKV_HAS_TILES)

// With fewer rows most of a tile would be empty.
constexpr int64_t kFewestTileRows = 5;

// Rows by 16; per group the tile of their high bytes, that of their low ones, their scales, scale * sum of inputs. The
// rows that the last block has too much are zero.
struct TileRows {
  TileRows(const MatrixView& matrix, int64_t rows, void* memory)
      : groups((matrix.cols + kTileInputs - 1) / kTileInputs),
        blocks((rows + kLanes - 1) / kLanes),
        memory(static_cast<char*>(memory)) {}

  static constexpr int64_t kGroupBytes = 2 * kWholeTileBytes + 2 * kLanes * 4;

  int8_t* high(int64_t block, int64_t g) const {
    return reinterpret_cast<int8_t*>(memory + (block * groups + g) * kGroupBytes);
  }
  int8_t* low(int64_t block, int64_t g) const { return high(block, g) + kWholeTileBytes; }
  float* scales(int64_t block, int64_t g) const { return reinterpret_cast<float*>(low(block, g) + kWholeTileBytes); }
  float* sums(int64_t block, int64_t g) const { return scales(block, g) + kLanes; }
  int64_t Bytes() const { return blocks * groups * kGroupBytes; }

  int64_t groups;
  int64_t blocks;
  char* memory;
};

// Rows [begin, end), and what is behind the last one. Codes of four bits are widened with the inputs of even places
// first.
template <typename Codes>
RWKV_INLINE void FixTileRows(const MatmulArgs& args, int64_t begin, int64_t end) {
  const TileRows rows(args.weight, args.rows, args.prepared);
  const int64_t inputs = args.weight.cols;
  const int64_t stop = end == args.rows ? rows.blocks * kLanes : end;
  for (int64_t row = begin; row < stop; ++row) {
    const int64_t block = row / kLanes, column = row % kLanes;
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

// The codes of group g as bytes with sign, a row an output; what the last group has not is zero.
template <typename Codes, int kDwords>
RWKV_INLINE void FillCodeTile(const IntegerTile& tile, const IntegerMatrix& matrix, int64_t g, uint8_t* to) {
  typedef uint8_t U8x32 __attribute__((vector_size(32)));
  constexpr int64_t kBytes = 4 * kDwords;
  const int64_t offset = g * matrix.group_bytes;
  const bool whole = g < matrix.groups - 1 || matrix.last_bytes == kBytes;
  if (Codes::kByteVectors == 1 && tile.columns != nullptr) {
    F32 dwords[kLanes];  // Bits that are only moved.
    for (int d = 0; d < kLanes; ++d) {
      dwords[d] = (F32)DwordsOfColumns(tile.columns + (g * kBytes + 4 * d) * Columns::kOutputs, tile.quarter);
    }
    Transpose(dwords);
    for (int i = 0; i < kLanes; ++i) __builtin_memcpy(to + i * kTileBytes, &dwords[i], sizeof dwords[i]);
    return;
  }
  for (int i = 0; i < kLanes; ++i) {
    const uint8_t* const from = tile.rows[i] + offset;
    __builtin_prefetch(from + kPrefetch);
    uint8_t codes[kBytes];
    if (whole) {
      __builtin_memcpy(codes, from, kBytes);
    } else {
      for (int64_t j = 0; j < kBytes; ++j) codes[j] = j < matrix.last_bytes ? from[j] : 0;
    }
    if constexpr (Codes::kByteVectors == 1) {
      __builtin_memcpy(to + i * kTileBytes, codes, kBytes);
    } else {
      U8x32 pairs;
      __builtin_memcpy(&pairs, codes, sizeof pairs);
      const U8x32 even = pairs & 0x0f, odd = pairs >> 4;
      __builtin_memcpy(to + i * kTileBytes, &even, sizeof even);
      __builtin_memcpy(to + i * kTileBytes + sizeof even, &odd, sizeof odd);
    }
  }
}

// Products of high and of low bytes, as a tile leaves them: [output][row].
struct alignas(64) TileProducts {
  I32 high[kLanes];
  I32 low[kLanes];
};

// Issues group g's products into the tiles kHigh and kHigh + 1.
template <int kHigh>
RWKV_INLINE void StartGroup(const TileRows& rows, int64_t block, int64_t g, const uint8_t* codes) {
  LoadTile<0>(codes + g * kWholeTileBytes);
  LoadTile<1>(rows.high(block, g));
  LoadTile<2>(rows.low(block, g));
  ZeroTile<kHigh>();
  ZeroTile<kHigh + 1>();
  MultiplyTiles<kHigh, 0, 1>();
  MultiplyTiles<kHigh + 1, 0, 2>();
}

// Adds group g's products, which are in the tiles kHigh and kHigh + 1, to sums [output][row].
template <int kHigh>
RWKV_INLINE void FinishGroup(const TileRows& rows, int64_t block, int64_t g, const TileScales& scales, F32* sums) {
  TileProducts products;
  StoreTile<kHigh>(products.high);
  StoreTile<kHigh + 1>(products.low);
  const F32 row_scales = Load(rows.scales(block, g));
  const F32 row_sums = Load(rows.sums(block, g));
  const F32 output_scales = LoadHalves(scales.scales + g * kLanes);
  const F32 minimums = scales.minimums != nullptr ? LoadHalves(scales.minimums + g * kLanes) : F32{};
#pragma clang loop unroll(full)
  for (int i = 0; i < kLanes; ++i) {
    const F32 product = __builtin_convertvector((products.high[i] << 8) + products.low[i], F32);
    sums[i] = sums[i] + (product * row_scales) * Broadcast(output_scales[i]);
    if (scales.minimums != nullptr) sums[i] = sums[i] + row_sums * Broadcast(minimums[i]);
  }
}

// All rows times the outputs first + i * step; `codes`: a tile a group.
template <typename Codes, int kDwords>
__attribute__((noinline)) void ComputeTileOutputs(const MatmulArgs& args, const IntegerMatrix& matrix, int64_t first,
                                                  int64_t step, uint8_t* codes, uint16_t* halves) {
  const IntegerTile tile(args, matrix, first, step, halves);
  const TileRows rows(args.weight, args.rows, args.prepared);
  for (int64_t g = 0; g < rows.groups; ++g) {
    FillCodeTile<Codes, kDwords>(tile, matrix, g, codes + g * kWholeTileBytes);
  }
  for (int64_t block = 0; block < rows.blocks; ++block) {
    F32 sums[kLanes] = {};
    // A group's products are computed while those of the one before are added.
    StartGroup<3>(rows, block, 0, codes);
    int64_t g = 1;
    for (; g + 1 < rows.groups; g += 2) {
      StartGroup<5>(rows, block, g, codes);
      FinishGroup<3>(rows, block, g - 1, tile.scales, sums);
      StartGroup<3>(rows, block, g + 1, codes);
      FinishGroup<5>(rows, block, g, tile.scales, sums);
    }
    if (g < rows.groups) {
      StartGroup<5>(rows, block, g, codes);
      FinishGroup<3>(rows, block, g - 1, tile.scales, sums);
      FinishGroup<5>(rows, block, g, tile.scales, sums);
    } else {
      FinishGroup<3>(rows, block, g - 1, tile.scales, sums);
    }
    Transpose(sums);
    for (int64_t i = 0; i < kLanes && block * kLanes + i < args.rows; ++i) {
      Finish(args, block * kLanes + i, first, step, sums[i]);
    }
  }
}

RWKV_INLINE int64_t CodeTilesBytes(const IntegerMatrix& matrix) { return matrix.groups * kWholeTileBytes; }

// Whether the rows are multiplied here.
RWKV_INLINE bool AreTiles(const MatmulArgs& args) {
  return args.rows >= kFewestTileRows && args.weight.quantization != Quantization::kBlocks &&
         args.weight.group == kTileInputs;
}

#else

RWKV_INLINE bool AreTiles(const MatmulArgs&) { return false; }

#endif

}  // namespace
}  // namespace rwkv::kernels::cpu
