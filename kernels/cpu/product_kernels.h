// Rows times a weight matrix. Only for the kernels_*.cc files.
#pragma once

#include <cstdint>

#include "kernels/base/matrix.h"
#include "kernels/cpu/bf16_tiles.h"
#include "kernels/cpu/integer_kernels.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cpu/pairs.h"
#include "kernels/cpu/product_tiles.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/weight_rows.h"

namespace rwkv::kernels::cpu {
namespace {

// Bytes of weights in a part of a product with few rows: some microseconds.
constexpr int64_t kPartBytes = 64 * 1024;

// With more rows: floats of widened weights that stay in the second-level cache while all rows pass by. Many rows do not
// fit into it themselves, and pass by as seldom as may be.
#if defined(__AVX512F__)
constexpr int64_t kLargePanelFloats = 96 * 1024;
#else
constexpr int64_t kLargePanelFloats = 32 * 1024;
#endif
constexpr int64_t kSmallPanelFloats = 24 * 1024;
constexpr int64_t kSmallPanelRows = 64;
constexpr int64_t kFewestPanels = 16;  // Of a matrix, so that all threads have some.
constexpr int64_t kFewestParts = 12;   // Of several panels each.
constexpr int64_t kMostPanelsOfPart = 8;
constexpr int64_t kBlockInputs = 768;  // Of which a tile's rows stay in the first-level cache.

// Few rows, weights widened as they are read, from memory each once. The outputs of a tile are a kStep-th of the matrix
// apart; a part is a few neighbours of each.
struct FewRows {
  explicit FewRows(const MatmulArgs& args) {
    outputs = args.weight.rows;
    const int64_t tiles = RowTiles(args).tiles;
    streams = TileOutputs((args.rows + tiles - 1) / tiles);  // Of all tiles alike, though one may be a row smaller.
    step = outputs / streams;
    const int64_t size = kPartBytes / (streams * RowBytes(args.weight));
    part = size < 1 ? 1 : size;
    parts = step == 0 ? 1 : (step + part - 1) / part;
  }
  int64_t outputs;
  int64_t streams;
  int64_t step;
  int64_t part;
  int64_t parts;
};

template <typename Weights>
void MatmulFewRows(const MatmulArgs& args, int64_t part) {
  const FewRows cut(args);
  const RowTiles rows(args);
  const int64_t begin = part * cut.part;
  const int64_t end = begin + cut.part < cut.step ? begin + cut.part : cut.step;
  for (int64_t o = begin; o < end; ++o) {
    for (int64_t i = 0; i < rows.tiles; ++i) {
      const Tile tile = {rows.Tile(args, i), rows.Begin(i), o, cut.step, args.weight, o};
      ComputeTileOfRows<Weights, kFewTileRows>(args, rows.Begin(i + 1) - rows.Begin(i), tile);
    }
  }
  if (part != cut.parts - 1) return;
  for (int64_t o = cut.step * cut.streams; o < cut.outputs; ++o) {
    for (int64_t i = 0; i < rows.tiles; ++i) {
      const Tile tile = {rows.Tile(args, i), rows.Begin(i), o, 1, args.weight, o};
      ComputeTileOfRows<Weights, kFewTileRows, 1>(args, rows.Begin(i + 1) - rows.Begin(i), tile);
    }
  }
}

// How the outputs are cut into panels and parts. Of a part's small panels the next one's weights come from memory while
// rows pass by this one's; with many rows there is no such need.
struct Panels {
  explicit Panels(const MatmulArgs& args) {
    const bool small = args.rows <= kSmallPanelRows;
    const int64_t fit = (small ? kSmallPanelFloats : kLargePanelFloats) / RoundUpToLanes(args.weight.cols);
    const int64_t fair = args.weight.rows / kFewestPanels;
    outputs = (fit < fair ? fit : fair) / kManyTileOutputs * kManyTileOutputs;
    if (outputs < kManyTileOutputs) outputs = kManyTileOutputs;
    const int64_t panels = small ? args.weight.rows / outputs / kFewestParts : 1;
    part_outputs = outputs * (panels < 1 ? 1 : panels > kMostPanelsOfPart ? kMostPanelsOfPart : panels);
    parts = (args.weight.rows + part_outputs - 1) / part_outputs;
  }
  int64_t Begin(int64_t part) const { return part * part_outputs; }
  int64_t End(const MatmulArgs& args, int64_t part) const {
    return Begin(part + 1) < args.weight.rows ? Begin(part + 1) : args.weight.rows;
  }

  int64_t outputs;  // Of a panel, at least one tile of them.
  int64_t part_outputs;
  int64_t parts;
};

// All rows past the part's panels of outputs, one after another; the next one's weights are fetched meanwhile.
template <typename Weights>
void MatmulManyRows(const MatmulArgs& args, int64_t part, float* panel) {
  const int64_t inputs = args.weight.cols;
  const int64_t panel_stride = RoundUpToLanes(inputs);
  const Panels panels(args);
  const int64_t blocks = (panel_stride + kBlockInputs - 1) / kBlockInputs;
  const RowTiles rows(args);
  F32* const sums = reinterpret_cast<F32*>(panel + panels.outputs * panel_stride);
  MatrixView widened;
  widened.rows = panels.outputs;
  widened.cols = panel_stride;
  widened.data = panel;
  const int64_t part_end = panels.End(args, part);
  for (int64_t begin = panels.Begin(part); begin < part_end; begin += panels.outputs) {
    const int64_t count = part_end - begin < panels.outputs ? part_end - begin : panels.outputs;
    for (int64_t o = 0; o < count; ++o) {
      const typename Weights::Row row = Weights::RowOf(args.weight, begin + o);
      const int64_t in_tile = o % kManyTileOutputs;
      float* const to = panel + (o - in_tile) * panel_stride + in_tile * kLanes;
      for (int64_t k = 0; k < inputs; k += kLanes) {
        Store(to + k * kManyTileOutputs, LoadSomeWeights<Weights>(row, k, inputs - k));
      }
    }
    // The next panel's weights come step by step: many at once would wait for each other, and all else for them.
    const int64_t next = begin + count;
    const int64_t next_count = part_end - next < panels.outputs ? part_end - next : panels.outputs;
    const int64_t steps = (count / kManyTileOutputs + count % kManyTileOutputs) * rows.tiles * (panel_stride / kLanes);
    Ahead ahead = {static_cast<const char*>(args.weight.data) + next * RowBytes(args.weight),
                   next_count * RowBytes(args.weight) / steps};
    for (int64_t i = 0; i < rows.tiles; ++i) {
      const float* const x = rows.Tile(args, i);
      const int64_t row = rows.Begin(i);
      const int64_t size = rows.Begin(i + 1) - row;
      // Of so many inputs the rows stay in the first-level cache while all outputs pass by.
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t from = block * panel_stride / blocks / kLanes * kLanes;
        const int64_t to = (block + 1) * panel_stride / blocks / kLanes * kLanes;
        F32* tile_sums = sums;
        int64_t o = 0;
        for (; o + kManyTileOutputs <= count; o += kManyTileOutputs, tile_sums += kManyTileRows * kManyTileOutputs) {
          ComputeTileOfRows<PanelWeights, kManyTileRows, kManyTileOutputs>(
              args, size, {x, row, begin + o, 1, widened, o, from, to, tile_sums, &ahead});
        }
        for (; o < count; ++o, tile_sums += kManyTileRows) {
          ComputeTileOfRows<PanelWeights, kManyTileRows, 1>(
              args, size, {x, row, begin + o, 1, widened, o, from, to, tile_sums, &ahead});
        }
      }
    }
  }
}

#if defined(RWKV_HAS_PAIRS)
// Asks for the i-th of `count` shares of the weights of the outputs [begin, end).
RWKV_INLINE void PrefetchShare(const MatrixView& weight, int64_t begin, int64_t end, int64_t i, int64_t count) {
  constexpr int64_t kLine = 64;
  const char* const data = static_cast<const char*>(weight.data) + begin * RowBytes(weight);
  const int64_t lines = (end - begin) * RowBytes(weight) / kLine;
  for (int64_t line = lines * i / count; line < lines * (i + 1) / count; ++line) {
    __builtin_prefetch(data + line * kLine, 0, 2);
  }
}

// All rows past the part's outputs, whose weights are read as they are and stay in the cache meanwhile.
void MatmulManyPairs(const MatmulArgs& args, int64_t part) {
  const Panels panels(args);
  const RowTiles rows(args);
  const int64_t part_end = panels.End(args, part);
  for (int64_t begin = panels.Begin(part); begin < part_end; begin += panels.outputs) {
    const int64_t end = part_end - begin < panels.outputs ? part_end : begin + panels.outputs;
    const int64_t next_end = part_end - end < panels.outputs ? part_end : end + panels.outputs;
    for (int64_t i = 0; i < rows.tiles; ++i) {
      PrefetchShare(args.weight, end, next_end, i, rows.tiles);
      const float* const x = rows.Tile(args, i);
      const int64_t row = rows.Begin(i);
      const int64_t size = rows.Begin(i + 1) - row;
      int64_t o = begin;
      for (; o + kManyTileOutputs <= end; o += kManyTileOutputs) {
        ComputeTileOfRows<BFloat16Pairs, kManyTileRows, kManyTileOutputs>(args, size, {x, row, o, 1, args.weight, o});
      }
      for (; o < end; ++o) {
        ComputeTileOfRows<BFloat16Pairs, kManyTileRows, 1>(args, size, {x, row, o, 1, args.weight, o});
      }
    }
  }
}
#endif

// Whether the rows are multiplied in fixed point.
RWKV_INLINE bool IsInteger(const MatrixView& matrix) {
  return matrix.quantization == Quantization::kInt8 || matrix.quantization == Quantization::kInt4 ||
         matrix.blocks == BlockType::kQ8_0 || matrix.blocks == BlockType::kQ4_0;
}

int64_t MatmulParts(const MatmulArgs& args) {
  if (IsInteger(args.weight)) return IntegerMatmulParts(args);
#if defined(RWKV_HAS_TILES)
  if (AreBf16Tiles(args)) return Bf16TilesParts(args);
#endif
  if (args.rows <= kFewRows) return FewRows(args).parts;
  return Panels(args).parts;
}

int64_t MatmulWorkspaceBytes(const MatmulArgs& args) {
  if (IsInteger(args.weight)) return IntegerMatmulWorkspaceBytes(args);
#if defined(RWKV_HAS_TILES)
  if (AreBf16Tiles(args)) return Bf16TilesWorkspaceBytes(args);
#endif
  if (args.rows <= kFewRows || ArePairs(args)) return 0;
  const int64_t outputs = Panels(args).outputs;
  return outputs * RoundUpToLanes(args.weight.cols) * static_cast<int64_t>(sizeof(float)) +
         outputs * kManyTileRows * static_cast<int64_t>(sizeof(F32));
}

// What the product reads instead of args.x.
int64_t MatmulPreparedBytes(const MatmulArgs& args) {
  if (IsInteger(args.weight)) return FixedRowsBytes(args);
#if defined(RWKV_HAS_TILES)
  if (AreBf16Tiles(args)) return ColumnTiles(args).Bytes();
#endif
  return RowTiles(args).Bytes();
}

void PrepareRows(const MatmulArgs& args, int64_t begin, int64_t end) {
  if (IsInteger(args.weight)) return FixRows(args, begin, end);
#if defined(RWKV_HAS_TILES)
  if (AreBf16Tiles(args)) return FillColumnTiles(args, begin, end);
#endif
  RowTiles(args).Fill(args, begin, end);
}

void Matmul(const MatmulArgs& args, int64_t part, void* workspace) {
  if (IsInteger(args.weight)) return IntegerMatmul(args, part, workspace);
#if defined(RWKV_HAS_TILES)
  if (AreBf16Tiles(args)) return MatmulBf16Tiles(args, part, workspace);
#endif
#if defined(RWKV_HAS_PAIRS)
  if (ArePairs(args)) {
    return args.rows <= kFewRows ? MatmulFewRows<BFloat16Pairs>(args, part) : MatmulManyPairs(args, part);
  }
#endif
  VisitWeights(args.weight, [&](auto weights) {
    using Weights = decltype(weights);
    if (args.rows <= kFewRows) {
      MatmulFewRows<Weights>(args, part);
    } else {
      MatmulManyRows<Weights>(args, part, static_cast<float*>(workspace));
    }
  });
}

// All of a product, for operations that are a part themselves.
RWKV_INLINE int64_t WholeMatmulWorkspaceBytes(const MatmulArgs& args) {
  return MatmulPreparedBytes(args) + MatmulWorkspaceBytes(args);
}

RWKV_INLINE void WholeMatmul(MatmulArgs args, void* workspace) {
  args.prepared = workspace;
  if (MatmulPreparedBytes(args) > 0) PrepareRows(args, 0, args.rows);
  for (int64_t part = 0; part < MatmulParts(args); ++part) {
    Matmul(args, part, static_cast<char*>(workspace) + MatmulPreparedBytes(args));
  }
}

}  // namespace
}  // namespace rwkv::kernels::cpu
