// Rows times a matrix of whole numbers in groups of 64, on the processor's tiles: 16 outputs by 64 inputs times 64
// inputs by 16 rows, once for the high and once for the low bytes of the inputs. The sums are exact, so the bits are
// those of integer_kernels.h. Only for the kernels_*.cc files.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/cpu/epilogue.h"
#include "kernels/cpu/integer_codes.h"
#include "kernels/cpu/integer_tile.h"
#include "kernels/cpu/integer_tile_rows.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cpu/output_runs.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/tiles.h"

namespace rwkv::kernels::cpu {
namespace {

#if defined(RWKV_HAS_TILES)

// With fewer rows most of a tile would be empty.
constexpr int64_t kFewestTileRows = 5;
// Up to so many blocks of rows take their weights from memory as they lie there, in 16 streams far apart.
constexpr int64_t kFewTileBlocks = 2;
// So many bytes of rows as tiles stay in the second-level cache while weights go by.
constexpr int64_t kTileRowsAtOnceBytes = 1 << 20;

// The codes of group g as bytes with sign, a row an output, or by columns [four inputs][output][4]; what the last group
// has not is zero. `ahead`: from what is read to what will be next.
template <typename Codes, int kDwords>
RWKV_INLINE void FillCodeTile(const IntegerTile& tile, const IntegerMatrix& matrix, int64_t g, int64_t ahead,
                              uint8_t* to) {
  typedef uint8_t U8x32 __attribute__((vector_size(32)));
  constexpr int64_t kBytes = 4 * kDwords;
  const int64_t offset = g * matrix.group_bytes;
  const bool whole = g < matrix.groups - 1 || matrix.last_bytes == kBytes;
  if (tile.columns != nullptr) {
    for (int d = 0; d < kLanes; ++d) {
      const U32 dwords = DwordsOfColumns(tile.columns + (g * kBytes + 4 * d) * Columns::kOutputs, tile.quarter);
      __builtin_memcpy(to + d * kTileBytes, &dwords, sizeof dwords);
    }
    return;
  }
  for (int i = 0; i < kLanes; ++i) {
    const uint8_t* const from = tile.rows[i] + offset;
    __builtin_prefetch(from + ahead);
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

// A part's memory: the runs of its blocks of rows, where there are few; of 16 outputs a tile a group, their scales and
// minimums as floats [group][output], and as halves.
struct TileWorkspace {
  TileWorkspace(const IntegerMatrix& matrix, void* memory)
      : runs(static_cast<OutputRuns*>(memory)),
        codes(reinterpret_cast<uint8_t*>(runs + kFewTileBlocks)),
        scales(reinterpret_cast<float*>(codes + matrix.groups * kWholeTileBytes)),
        minimums(scales + matrix.groups * kLanes),
        halves(reinterpret_cast<uint16_t*>(minimums + matrix.groups * kLanes)) {}
  static int64_t Bytes(const IntegerMatrix& matrix) {
    return kFewTileBlocks * static_cast<int64_t>(sizeof(OutputRuns)) +
           matrix.groups * (kWholeTileBytes + 2 * kLanes * (4 + 2));
  }

  OutputRuns* runs;
  uint8_t* codes;
  float* scales;
  float* minimums;
  uint16_t* halves;
};

// Sixteen outputs and what their products need; `in_place`: whether their codes are read where they lie, if they can be.
template <typename Codes, int kDwords, bool kMinimums>
struct OutputsOfTile {
  OutputsOfTile(const MatmulArgs& args, const IntegerMatrix& matrix, const TileWorkspace& to, int64_t first,
                int64_t step, bool in_place)
      : matrix(matrix),
        to(to),
        tile(args, matrix, first, step, to.halves),
        stride(step * matrix.row_bytes),
        ahead(step == 1 ? kLanes * matrix.row_bytes : kPrefetch) {
    for (int64_t g = 0; g < matrix.groups; ++g) {
      Store(to.scales + g * kLanes, LoadHalves(tile.scales.scales + g * kLanes));
      if (kMinimums) Store(to.minimums + g * kLanes, LoadHalves(tile.scales.minimums + g * kLanes));
    }
    const bool all_there = first + (kLanes - 1) * step < args.weight.rows;
    if (Codes::kByteVectors == 1 && in_place && all_there && tile.columns == nullptr) {
      groups_in_place = matrix.last_bytes == kTileInputs ? matrix.groups : matrix.groups - 1;
    }
  }

  // Brings group g's codes into tile 0; `anew`: for the first time.
  RWKV_INLINE void LoadCodes(int64_t g, bool anew) const {
    if (g < groups_in_place) {
      const uint8_t* const codes = tile.rows[0] + g * matrix.group_bytes;
      if (anew) {
        for (int64_t i = 0; i < kLanes; ++i) __builtin_prefetch(codes + i * stride + ahead);
      }
      return LoadTile<0>(codes, stride);
    }
    uint8_t* const codes = to.codes + g * kWholeTileBytes;
    if (anew) FillCodeTile<Codes, kDwords>(tile, matrix, g, ahead, codes);
    LoadTile<0>(codes);
  }

  const IntegerMatrix& matrix;
  const TileWorkspace& to;
  IntegerTile tile;
  int64_t stride;
  int64_t ahead;  // From what is read to what will be next.
  int64_t groups_in_place = 0;
};

// Issues group g's products, joint rows' into the tile kSums, others' into the tiles kSums and kSums + 1.
template <int kSums, bool kJoint, bool kColumns>
RWKV_INLINE void StartGroup(const TileRows& rows, int64_t block, int64_t g) {
  LoadTile<1>(rows.high(block, g));
  ZeroTile<kSums>();
  kColumns ? MultiplyTiles<kSums, 1, 0>() : MultiplyTiles<kSums, 0, 1>();
  if constexpr (!kJoint) {
    LoadTile<2>(rows.low(block, g));
    ZeroTile<kSums + 1>();
    kColumns ? MultiplyTiles<kSums + 1, 2, 0>() : MultiplyTiles<kSums + 1, 0, 2>();
  }
}

// Adds what StartGroup<kSums> has computed to sums [output][row]. Scales of outputs are broadcast from memory.
template <int kSums, bool kMinimums>
RWKV_INLINE void FinishGroup(const TileRows& rows, int64_t block, int64_t g, const TileWorkspace& outputs, F32* sums) {
  alignas(64) I32 high[kLanes], low[kLanes];
  StoreTile<kSums>(high);
  StoreTile<kSums + 1>(low);
  const F32 row_scales = Load(rows.scales(block, g));
  const F32 row_sums = Load(rows.sums(block, g));
#pragma clang loop unroll(full)
  for (int i = 0; i < kLanes; ++i) {
    const F32 product = __builtin_convertvector((high[i] << 8) + low[i], F32);
    sums[i] = sums[i] + (product * row_scales) * Broadcast(outputs.scales[g * kLanes + i]);
    if (kMinimums) sums[i] = sums[i] + row_sums * Broadcast(outputs.minimums[g * kLanes + i]);
  }
}

typedef float F32x8 __attribute__((vector_size(32)));
typedef int32_t I32x8 __attribute__((vector_size(32)));
RWKV_INLINE F32x8 Load8(const float* from) {
  F32x8 v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

// The same of joint rows.
template <int kSums, bool kMinimums>
RWKV_INLINE void FinishGroup(const TileRows& rows, int64_t block, int64_t g, const TileWorkspace& outputs,
                             F32x8* sums) {
  alignas(64) I32x8 products[2 * kLanes];  // [output][high, low]
  StoreTile<kSums>(products);
  const F32x8 row_scales = Load8(rows.scales(block, g));
  const F32x8 row_sums = Load8(rows.sums(block, g));
#pragma clang loop unroll(full)
  for (int i = 0; i < kLanes; ++i) {
    const F32x8 product = __builtin_convertvector((products[2 * i] << 8) + products[2 * i + 1], F32x8);
    sums[i] = sums[i] + (product * row_scales) * (F32x8{} + outputs.scales[g * kLanes + i]);
    if (kMinimums) sums[i] = sums[i] + row_sums * (F32x8{} + outputs.minimums[g * kLanes + i]);
  }
}

// The same by columns, sums being [row][output].
template <int kSums, bool kJoint>
RWKV_INLINE void FinishColumnGroup(const TileRows& rows, int64_t block, int64_t g, const TileWorkspace& outputs,
                                   F32* sums) {
  constexpr int kRows = kJoint ? kMostJointRows : kLanes;
  alignas(64) I32 products[2 * kRows];
  StoreTile<kSums>(products);
  if constexpr (!kJoint) StoreTile<kSums + 1>(products + kRows);
  const F32 output_scales = Load(outputs.scales + g * kLanes);
  const float* const row_scales = rows.scales(block, g);
#pragma clang loop unroll(full)
  for (int i = 0; i < kRows; ++i) {
    const F32 product = __builtin_convertvector((products[i] << 8) + products[kRows + i], F32);
    sums[i] = sums[i] + (product * Broadcast(row_scales[i])) * output_scales;
  }
}

RWKV_INLINE F32 Widen8(F32 v) { return v; }
RWKV_INLINE F32 Widen8(F32x8 v) {
  return __builtin_shufflevector(v, F32x8{}, 0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 8, 8, 8, 8, 8, 8);
}

// The parts of a product: as many blocks of rows as the cache holds, times some tiles of outputs. With few rows of a
// large matrix the outputs of a tile are far apart, and those of a part 16 runs.
struct TileParts {
  explicit TileParts(const MatmulArgs& args)
      : rows(args),
        few(rows.blocks <= kFewTileBlocks),
        far(few && !args.by_columns && args.weight.rows >= kFewestTilesOfRuns * kLanes),
        outputs(args, far),
        tiles(far ? TilesOfRun(outputs.count) : TilesOfPart(args)) {
    const int64_t bytes = rows.groups * rows.group_bytes;
    const int64_t at_once = kTileRowsAtOnceBytes / bytes < 1 ? 1 : kTileRowsAtOnceBytes / bytes;
    row_parts = few ? 1 : (rows.blocks + at_once - 1) / at_once;
    output_parts = (outputs.count + tiles - 1) / tiles;
  }
  int64_t count() const { return row_parts * output_parts; }

  TileRows rows;
  bool few;
  bool far;
  OutputTiles outputs;
  int64_t tiles;  // of a part
  int64_t row_parts;
  int64_t output_parts;
};

// The blocks [begin, end) of rows times the i-th tile of outputs, the `of_part`-th of its part. A group's products are
// computed while those of the one before are added.
template <typename Codes, int kDwords, bool kMinimums, bool kJoint, bool kColumns>
__attribute__((noinline)) void ComputeTileOutputs(const MatmulArgs& args, const IntegerMatrix& matrix,
                                                  const TileParts& parts, int64_t begin, int64_t end, int64_t i,
                                                  int64_t of_part, const TileWorkspace& workspace) {
  const TileRows& rows = parts.rows;
  const int64_t first = parts.outputs.first(i);
  const OutputsOfTile<Codes, kDwords, kMinimums> outputs(args, matrix, workspace, first, parts.outputs.step, parts.few);
  constexpr int kOther = kJoint ? 4 : 5;
  for (int64_t block = begin; block < end; ++block) {
    std::conditional_t<kJoint && !kColumns, F32x8, F32> sums[kLanes] = {};
    const bool anew = block == begin;
    const auto start = [&](auto tiles, int64_t g) RWKV_INLINE_LAMBDA {
      outputs.LoadCodes(g, anew);
      StartGroup<decltype(tiles)::kDwords, kJoint, kColumns>(rows, block, g);
    };
    const auto finish = [&](auto tiles, int64_t g) RWKV_INLINE_LAMBDA {
      if constexpr (kColumns) {
        FinishColumnGroup<decltype(tiles)::kDwords, kJoint>(rows, block, g, workspace, sums);
      } else {
        FinishGroup<decltype(tiles)::kDwords, kMinimums>(rows, block, g, workspace, sums);
      }
    };
    const Dwords<3> one;
    const Dwords<kOther> other;
    start(one, 0);
    int64_t g = 1;
    for (; g + 1 < rows.groups; g += 2) {
      start(other, g);
      finish(one, g - 1);
      start(one, g + 1);
      finish(other, g);
    }
    if (g < rows.groups) {
      start(other, g);
      finish(one, g - 1);
      finish(other, g);
    } else {
      finish(one, g - 1);
    }
    if (parts.far) {
      for (int64_t run = 0; run < kLanes; ++run) workspace.runs[block].sums[run][of_part] = Widen8(sums[run]);
      continue;
    }
    F32 by_row[kLanes];
    for (int64_t output = 0; output < kLanes; ++output) by_row[output] = Widen8(sums[output]);
    if (!kColumns) Transpose(by_row);
    const int64_t row = block * rows.block_rows;
    for (int64_t r = 0; r < rows.RowsOf(block, args.rows); ++r) FinishRun(args, row + r, first, kLanes, by_row[r]);
  }
}

template <typename Codes, int kDwords>
RWKV_INLINE void ComputeTilesOfPart(const MatmulArgs& args, const IntegerMatrix& matrix, int64_t part, void* memory) {
  const ScopedTiles tiles_are_ready;
  const TileWorkspace workspace(matrix, memory);
  const TileParts parts(args);
  const TileRows& rows = parts.rows;
  const int64_t row_part = part / parts.output_parts, output_part = part % parts.output_parts;
  const int64_t begin = row_part * rows.blocks / parts.row_parts;
  const int64_t end = (row_part + 1) * rows.blocks / parts.row_parts;
  const int64_t first = output_part * parts.tiles;
  const int64_t left = parts.outputs.count - first;
  const int64_t tiles = left < parts.tiles ? left : parts.tiles;
  for (int64_t i = 0; i < tiles; ++i) {
    const auto compute = [&](auto minimums, auto columns) RWKV_INLINE_LAMBDA {
      const auto compute_rows = rows.joint ? ComputeTileOutputs<Codes, kDwords, minimums(), true, columns()>
                                           : ComputeTileOutputs<Codes, kDwords, minimums(), false, columns()>;
      compute_rows(args, matrix, parts, begin, end, first + i, i, workspace);
    };
    constexpr bool kBytes = Codes::kByteVectors == 1;  // Have no minimums (AreTiles); others never lie by columns.
    if (kBytes ? args.by_columns : matrix.minimums != nullptr) {
      compute(std::bool_constant<!kBytes>(), std::bool_constant<kBytes>());
    } else {
      compute(std::false_type(), std::false_type());
    }
  }
  if (!parts.far) return;
  for (int64_t block = begin; block < end; ++block) {
    FinishRuns(args, workspace.runs[block], block * rows.block_rows, rows.RowsOf(block, args.rows),
               parts.outputs.first(first), parts.outputs.step, tiles);
  }
}

// Whether the rows are multiplied here. Codes of int8 with minimums, which no file of ours has, are not.
RWKV_INLINE bool AreTiles(const MatmulArgs& args) {
  const bool bytes = args.weight.quantization == Quantization::kInt8;
  return args.rows >= kFewestTileRows && args.weight.quantization != Quantization::kBlocks &&
         args.weight.group == kTileInputs && !(bytes && args.weight.minimums != nullptr);
}

#else

RWKV_INLINE bool AreTiles(const MatmulArgs&) { return false; }

#endif

}  // namespace
}  // namespace rwkv::kernels::cpu
