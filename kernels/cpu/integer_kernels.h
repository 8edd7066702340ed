// Rows times a matrix of whole numbers, as products.h says: a lane is an output, and a group's sum is exact, so nothing
// but the order of the groups decides the bits. Only for the kernels_*.cc files.
#pragma once

#include <cstdint>

#include "kernels/cpu/epilogue.h"
#include "kernels/cpu/integer_codes.h"
#include "kernels/cpu/integer_columns.h"
#include "kernels/cpu/integer_dots.h"
#include "kernels/cpu/integer_rows.h"
#include "kernels/cpu/integer_tile.h"
#include "kernels/cpu/integer_tiles.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cpu/simd.h"

namespace rwkv::kernels::cpu {
namespace {

// With few rows the codes are read once, from memory, in 16 streams far apart (a core reads several faster than one);
// with many they are widened into a panel first, for which tiles of rows times vectors of outputs fit the registers.
#if defined(__AVX512F__)
constexpr int kFewIntegerRows = 8;
constexpr int kIntegerTileRows = 6;
constexpr int kIntegerTileVectors = 4;
#else
constexpr int kFewIntegerRows = 4;
constexpr int kIntegerTileRows = 3;
constexpr int kIntegerTileVectors = 1;
#endif

// Of 16 outputs the codes of a last group that is not whole, with zeros for what it has not.
struct LastGroup {
  // Pointers that reach it from `offset` on, as `rows` reach the other groups.
  __attribute__((noinline)) const uint8_t* const* Copy(const uint8_t* const* rows, int64_t offset, int64_t bytes) {
    for (int i = 0; i < kLanes; ++i) {
      for (int64_t j = 0; j < kMostBytes; ++j) codes[i][j] = j < bytes ? rows[i][offset + j] : 0;
      copies[i] = codes[i] - offset;
    }
    return copies;
  }

  static constexpr int64_t kMostBytes = 64;
  alignas(64) uint8_t codes[kLanes][kMostBytes];
  const uint8_t* copies[kLanes];
};

// Calls take(Dwords<d>(), dword d) for each dword of the group `offset` bytes behind `rows`. `ahead`: bytes from what is
// read to what will be read next.
template <int kDwords, typename Take>
RWKV_INLINE void ForEachDword(const uint8_t* const* rows, int64_t offset, int64_t ahead, Take take) {
  for (int i = 0; i < kLanes; ++i) __builtin_prefetch(rows[i] + offset + ahead);
  ForEachNumber<kDwords / 4>([&](auto four) RWKV_INLINE_LAMBDA {
    constexpr int kFirst = 4 * decltype(four)::kDwords;
    U32 dwords[4];
    LoadTransposed(rows, offset + 4 * kFirst, dwords);
    ForEachNumber<4>([&](auto j)
                         RWKV_INLINE_LAMBDA { take(Dwords<kFirst + decltype(j)::kDwords>(), dwords[j.kDwords]); });
  });
}

// The same of group g of outputs that lie by columns: nothing to transpose, and zeros behind the last input.
template <int kDwords, typename Take>
RWKV_INLINE void ForEachDwordOfColumns(const IntegerTile& tile, int64_t g, Take take) {
  ForEachNumber<kDwords>([&](auto d) RWKV_INLINE_LAMBDA {
    take(d, DwordsOfColumns(tile.columns + (g * kDwords + d.kDwords) * 4 * Columns::kOutputs, tile.quarter));
  });
}

// Rows of the tile that so few are: 1, 2, 4 or 8.
RWKV_INLINE int64_t FewTileRows(int64_t rows) { return rows <= 2 ? rows : rows <= 4 ? 4 : 8; }

template <int kRows>
__attribute__((noinline)) void FinishFewRows(const MatmulArgs& args, int64_t first, int64_t step, const F32* sums) {
  for (int64_t r = 0; r < args.rows; ++r) Finish(args, r, first, step, sums[r]);
}

// All rows, kRows or a few less, times the outputs first + i * step.
template <typename Codes, int kDwords, int kRows>
__attribute__((noinline)) void ComputeFewRows(const MatmulArgs& args, const IntegerMatrix& matrix, int64_t first,
                                              int64_t step, uint16_t* halves) {
  // Sums of a row: an addition takes some cycles. Large groups of bytes leave the registers no room for more.
  constexpr int kChains = kRows >= 8 && Codes::kPairs == 2 ? 1 : kRows >= 4 ? 2 : 4;
  constexpr bool kInOrder = Codes::kPairs > 2 || kDwords < 16;
  const IntegerTile tile(args, matrix, first, step, halves);
  const InterleavedRows rows(args.weight, kRows, args.prepared);
  F32 sums[kRows] = {};
  LastGroup last;
  const uint8_t* const* codes = tile.rows;
  for (int64_t g = 0; g < matrix.groups; ++g) {
    const int64_t offset = g * matrix.group_bytes;
    if (g == matrix.groups - 1 && matrix.last_bytes < 4 * kDwords) codes = last.Copy(codes, offset, matrix.last_bytes);
    const uint32_t* const pairs = rows.pairs(g);
    I32 products[kChains][kRows] = {};
    if constexpr (Codes::kCentre != 0) {
#pragma clang loop unroll(full)
      for (int r = 0; r < kRows; ++r) products[0][r] = I32{} - rows.excess(g)[r];
    }
    // Numbers of dwords and pairs are types: as variables that only unrolling makes known they kept the sums in memory.
    ForEachDword<kDwords>(codes, offset, kPrefetch, [&](auto d, U32 dword) RWKV_INLINE_LAMBDA {
      ForEachNumber<Codes::kPairs>([&](auto i) RWKV_INLINE_LAMBDA {
        constexpr int kPair = decltype(d)::kDwords * Codes::kPairs + decltype(i)::kDwords;
        U32 weights = Codes::template Widen<decltype(i)::kDwords>(dword);
        if constexpr (kInOrder) ComputeHere(weights);
        I32* const sum = products[kPair % kChains];
#pragma clang loop unroll(full)
        for (int r = 0; r < kRows; ++r) sum[r] = AddPairs(sum[r], weights, U32{} + pairs[kPair * kRows + r]);
      });
    });
#pragma clang loop unroll(full)
    for (int chain = 1; chain < kChains; ++chain) {
#pragma clang loop unroll(full)
      for (int r = 0; r < kRows; ++r) products[0][r] += products[chain][r];
    }
#pragma clang loop unroll(full)
    for (int r = 0; r < kRows; ++r) {
      sums[r] = AddGroup(sums[r], products[0][r], rows.scales(g)[r], rows.sums(g)[r], tile.scales, g);
    }
  }
  FinishFewRows<kRows>(args, first, step, sums);
}

template <typename Codes, int kDwords, int kRows = kFewIntegerRows>
RWKV_INLINE void ComputeFewRowsOf(const MatmulArgs& args, const IntegerMatrix& matrix, int64_t first, int64_t step,
                                  uint16_t* halves) {
  if constexpr (kRows > 1) {
    if (args.rows <= kRows / 2) return ComputeFewRowsOf<Codes, kDwords, kRows / 2>(args, matrix, first, step, halves);
  }
  ComputeFewRows<Codes, kDwords, kRows>(args, matrix, first, step, halves);
}

constexpr int64_t kPanelOutputs = kIntegerTileVectors * kLanes;

RWKV_INLINE int64_t PanelsOfPart(const MatmulArgs& args) {
  constexpr int64_t kFewestIntegerParts = 12, kMost = 8;
  const int64_t panels = args.weight.rows / kPanelOutputs / kFewestIntegerParts;
  return panels < 1 ? 1 : panels > kMost ? kMost : panels;
}

// Vectors of pairs, and floats of scales and minimums, of kIntegerTileVectors * 16 outputs.
struct IntegerPanel {
  IntegerPanel(const IntegerMatrix& matrix, void* memory)
      : groups(matrix.groups),
        pairs_of_group(matrix.group / 2),
        codes(static_cast<U32*>(memory)),
        scales(reinterpret_cast<F32*>(codes + kIntegerTileVectors * groups * pairs_of_group)),
        minimums(scales + kIntegerTileVectors * groups),
        halves(reinterpret_cast<uint16_t*>(minimums + kIntegerTileVectors * groups)) {}

  static int64_t Bytes(const IntegerMatrix& matrix) {
    const int64_t vectors = kIntegerTileVectors * matrix.groups * (matrix.group / 2 + 2);
    return vectors * static_cast<int64_t>(sizeof(U32)) + HalvesBytes(matrix);
  }
  static int64_t HalvesBytes(const IntegerMatrix& matrix) { return 2 * matrix.groups * kLanes * 2; }

  int64_t groups;
  int64_t pairs_of_group;
  U32* codes;     // [vector][group][pair]
  F32* scales;    // [vector][group]
  F32* minimums;  // the same
  uint16_t* halves;
};

template <typename Codes, int kDwords>
RWKV_INLINE void FillPanel(const MatmulArgs& args, const IntegerMatrix& matrix, int64_t first,
                           const IntegerPanel& panel) {
  for (int64_t v = 0; v < kIntegerTileVectors; ++v) {
    const IntegerTile tile(args, matrix, first + v * kLanes, 1, panel.halves);
    LastGroup last;
    const uint8_t* const* codes = tile.rows;
    for (int64_t g = 0; g < matrix.groups; ++g) {
      U32* const to = panel.codes + (v * panel.groups + g) * panel.pairs_of_group;
      const auto widen = [&](auto d, U32 dword) RWKV_INLINE_LAMBDA {
        ForEachNumber<Codes::kPairs>([&](auto i) RWKV_INLINE_LAMBDA {
          to[d.kDwords * Codes::kPairs + i.kDwords] = Codes::template Widen<decltype(i)::kDwords>(dword);
        });
      };
      const int64_t offset = g * matrix.group_bytes;
      if (tile.columns != nullptr) {
        ForEachDwordOfColumns<kDwords>(tile, g, widen);
      } else {
        if (g == matrix.groups - 1 && matrix.last_bytes < 4 * kDwords) {
          codes = last.Copy(codes, offset, matrix.last_bytes);
        }
        ForEachDword<kDwords>(codes, offset, kLanes * matrix.row_bytes, widen);
      }
      panel.scales[v * panel.groups + g] = LoadHalves(tile.scales.scales + g * kLanes);
      if (tile.scales.minimums == nullptr) continue;
      panel.minimums[v * panel.groups + g] = LoadHalves(tile.scales.minimums + g * kLanes);
    }
  }
}

// kRows rows from `row` on, times the panel's outputs.
template <int kRows>
__attribute__((noinline)) void ComputePanel(const MatmulArgs& args, const IntegerPanel& panel, bool has_minimums,
                                            int64_t row, int64_t first, Ahead& ahead) {
  constexpr int kVectors = kIntegerTileVectors;
  const int64_t ahead_step = ahead.step;
  const char* next = ahead.data;
  const IntegerRows rows(args.weight, args.prepared);
  F32 sums[kRows * kVectors] = {};
  for (int64_t g = 0; g < panel.groups; ++g) {
    I32 products[kRows * kVectors];
    const uint32_t* pairs[kRows];
    const U32* codes[kVectors];
#pragma clang loop unroll(full)
    for (int r = 0; r < kRows; ++r) {
      pairs[r] = rows.pairs(row + r) + g * panel.pairs_of_group;
#pragma clang loop unroll(full)
      for (int v = 0; v < kVectors; ++v) products[r * kVectors + v] = I32{} - rows.excess(row + r)[g];
    }
#pragma clang loop unroll(full)
    for (int v = 0; v < kVectors; ++v) codes[v] = panel.codes + (v * panel.groups + g) * panel.pairs_of_group;
    for (int64_t p = 0; p < panel.pairs_of_group; ++p) {
      __builtin_prefetch(next, 0, 2);
      next += ahead_step;
      U32 weights[kVectors];
#pragma clang loop unroll(full)
      for (int v = 0; v < kVectors; ++v) weights[v] = codes[v][p];
#pragma clang loop unroll(full)
      for (int r = 0; r < kRows; ++r) {
        const U32 pair = U32{} + pairs[r][p];
#pragma clang loop unroll(full)
        for (int v = 0; v < kVectors; ++v) {
          products[r * kVectors + v] = AddPairs(products[r * kVectors + v], weights[v], pair);
        }
      }
    }
#pragma clang loop unroll(full)
    for (int v = 0; v < kVectors; ++v) {
      const F32 scale = panel.scales[v * panel.groups + g];
#pragma clang loop unroll(full)
      for (int r = 0; r < kRows; ++r) {
        F32& sum = sums[r * kVectors + v];
        const F32 products_of_row = __builtin_convertvector(products[r * kVectors + v], F32);
        sum = sum + (products_of_row * Broadcast(rows.scales(row + r)[g])) * scale;
        if (has_minimums) sum = sum + Broadcast(rows.sums(row + r)[g]) * panel.minimums[v * panel.groups + g];
      }
    }
  }
  ahead.data = next;
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) Finish(args, row + r, first + v * kLanes, 1, sums[r * kVectors + v]);
  }
}

template <int kRows = kIntegerTileRows>
RWKV_INLINE void ComputePanelOf(const MatmulArgs& args, const IntegerPanel& panel, bool has_minimums, int64_t row,
                                int64_t count, int64_t first, Ahead& ahead) {
  if constexpr (kRows > 1) {
    if (count < kRows) return ComputePanelOf<kRows - 1>(args, panel, has_minimums, row, count, first, ahead);
  }
  ComputePanel<kRows>(args, panel, has_minimums, row, first, ahead);
}

// Whether the row is multiplied as integer_dots.h does it.
RWKV_INLINE bool AreDots(const MatmulArgs& args) { return kHasByteDots && args.rows == 1 && !args.by_columns; }

// Whether the rows are those of one tile (ComputeFewRows).
RWKV_INLINE bool AreFewRows(const MatmulArgs& args) {
  return args.rows <= kFewIntegerRows && !AreDots(args) && !AreColumns(args) && !AreTiles(args);
}

int64_t IntegerMatmulParts(const MatmulArgs& args) {
  if (AreColumns(args)) return Columns(args.weight).blocks;
#if defined(RWKV_HAS_TILES)
  if (AreTiles(args)) return TileParts(args).count();
#endif
  if (args.rows <= kFewIntegerRows) {
    const int64_t tiles = TilesOfPart(args);
    return (OutputTiles(args).count + tiles - 1) / tiles;
  }
  const int64_t outputs = PanelsOfPart(args) * kPanelOutputs;
  return (args.weight.rows + outputs - 1) / outputs;
}

int64_t IntegerMatmulWorkspaceBytes(const MatmulArgs& args) {
  if (AreColumns(args)) return 0;
  const IntegerMatrix matrix = IntegerMatrixOf(args.weight);
#if defined(RWKV_HAS_TILES)
  if (AreTiles(args)) return TileWorkspace::Bytes(matrix);
#endif
  return args.rows <= kFewIntegerRows ? IntegerPanel::HalvesBytes(matrix) : IntegerPanel::Bytes(matrix);
}

void IntegerMatmul(const MatmulArgs& args, int64_t part, void* workspace) {
  if (AreColumns(args)) return ComputeColumns(args, part);
  const IntegerMatrix matrix = IntegerMatrixOf(args.weight);
  VisitCodes(args.weight, [&](auto codes, auto dwords) {
    using Codes = decltype(codes);
    constexpr int kDwords = decltype(dwords)::kDwords;
#if defined(RWKV_HAS_TILES)
    if constexpr (4 * kDwords * Codes::kByteVectors == kTileInputs) {
      if (AreTiles(args)) return ComputeTilesOfPart<Codes, kDwords>(args, matrix, part, workspace);
    }
#endif
    if (args.rows <= kFewIntegerRows) {
      const OutputTiles outputs(args);
      const int64_t tiles = TilesOfPart(args);
      auto* const halves = static_cast<uint16_t*>(workspace);
      for (int64_t i = part * tiles; i < outputs.count && i < (part + 1) * tiles; ++i) {
        if (AreDots(args)) {
          ComputeDots<Codes, kDwords>(args, matrix, outputs.first(i), outputs.step, halves);
        } else {
          ComputeFewRowsOf<Codes, kDwords>(args, matrix, outputs.first(i), outputs.step, halves);
        }
      }
      return;
    }
    const IntegerPanel panel(matrix, workspace);
    const int64_t blocks = (args.rows + kIntegerTileRows - 1) / kIntegerTileRows;
    const int64_t part_end = (part + 1) * PanelsOfPart(args) * kPanelOutputs;
    const int64_t end = part_end < args.weight.rows ? part_end : args.weight.rows;
    for (int64_t first = part * PanelsOfPart(args) * kPanelOutputs; first < end; first += kPanelOutputs) {
      FillPanel<Codes, kDwords>(args, matrix, first, panel);
      // The next panel's weights come step by step, as in product_kernels.h.
      const int64_t next = first + kPanelOutputs < end ? first + kPanelOutputs : end;
      const int64_t next_count = end - next < kPanelOutputs ? end - next : kPanelOutputs;
      Ahead ahead = {reinterpret_cast<const char*>(matrix.codes) + next * matrix.row_bytes,
                     next_count * matrix.row_bytes / (blocks * panel.groups * panel.pairs_of_group)};
      for (int64_t block = 0; block < blocks; ++block) {  // Of even sizes: a rest of one row costs as much as a tile.
        const int64_t row = block * args.rows / blocks;
        ComputePanelOf(args, panel, matrix.minimums != nullptr, row, (block + 1) * args.rows / blocks - row, first,
                       ahead);
      }
    }
  });
}

// Rows [begin, end) to args.prepared.
void FixRows(const MatmulArgs& args, int64_t begin, int64_t end) {
  if (args.by_columns && args.rows == 1) return FixSparseRow(args);
  VisitCodes(args.weight, [&](auto codes, auto dwords) {
#if defined(RWKV_HAS_TILES)
    if (AreTiles(args)) return FixTileRows<decltype(codes)>(args, begin, end);
#endif
    if (AreDots(args)) return FixDotRow<decltype(codes), decltype(dwords)::kDwords>(args);
    if (AreFewRows(args)) {
      return InterleavedRows(args.weight, FewTileRows(args.rows), args.prepared).Fix<decltype(codes)>(args);
    }
    FixRowsOf<decltype(codes)>(args, begin, end);
  });
}

int64_t FixedRowsBytes(const MatmulArgs& args) {
  if (args.by_columns && args.rows == 1) return SparseRow::Bytes(args.weight);
#if defined(RWKV_HAS_TILES)
  if (AreTiles(args)) return TileRows(args).Bytes();
#endif
  if (AreFewRows(args)) return InterleavedRows(args.weight, FewTileRows(args.rows), nullptr).Bytes();
  int64_t bytes = args.rows * IntegerRows(args.weight, nullptr).stride;
  if (!AreDots(args)) return bytes;
  VisitCodes(args.weight, [&](auto codes, auto dwords) {
    bytes = DotRow<decltype(codes), decltype(dwords)::kDwords>(args.weight, nullptr).Bytes();
  });
  return bytes;
}

}  // namespace
}  // namespace rwkv::kernels::cpu
