// Rows times a weight matrix. Only for the kernels_*.cc files.
#pragma once

#include <cstdint>

#include "kernels/base/matrix.h"
#include "kernels/cpu/epilogue.h"
#include "kernels/cpu/integer_kernels.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/weight_rows.h"

namespace rwkv::kernels::cpu {
namespace {

// Tiles of rows times outputs, as many accumulators as the registers hold. With one row the weights are read once, from
// memory: kStreams rows of them at a time, far apart, because a core reads several sequential streams faster than one.
#if defined(__AVX512F__)
constexpr int kTileRows = 6;
constexpr int kTileOutputs = 4;
constexpr int kStreams = 8;
#elif defined(__AVX2__)
constexpr int kTileRows = 3;
constexpr int kTileOutputs = 2;
constexpr int kStreams = 4;
#else
constexpr int kTileRows = 2;
constexpr int kTileOutputs = 1;
constexpr int kStreams = 2;
#endif

// Up to so many rows the weights are widened as they are read, again for each tile of rows.
constexpr int kFewRows = 2 * kTileRows;

// Bytes of weights in a part of a product with few rows: some microseconds.
constexpr int64_t kPartBytes = 64 * 1024;

// Floats of widened weights that are kept in the second-level cache while all rows pass by.
constexpr int64_t kPanelFloats = 32 * 1024;

// A tile's place: its first row and output, how far its outputs are apart, and where the weights of those are, which is
// the matrix itself or a panel of it.
struct Tile {
  int64_t row;
  int64_t output;
  int64_t output_step;
  const MatrixView& weight;
  int64_t weight_row;  // of the first output
};

template <typename Weights, int kRows, int kOutputs>
__attribute__((noinline)) void ComputeTile(const MatmulArgs& args, const Tile& tile) {
  constexpr int kCells = kRows * kOutputs;
  constexpr bool kPrefetches = kRows == 1 && Weights::kStep == kLanes;  // Else what is computed hides the way.
  F32 sums[kCells] = {};
  const int64_t inputs = args.weight.cols;
  const float* const x = args.x + tile.row * inputs;
  typename Weights::Row weight[kOutputs];
#pragma clang loop unroll(full)
  for (int o = 0; o < kOutputs; ++o) weight[o] = Weights::RowOf(tile.weight, tile.weight_row + o * tile.output_step);
  int64_t k = 0;
  for (; k + Weights::kStep <= inputs; k += Weights::kStep) {
    typename Weights::Group group[kOutputs];
#pragma clang loop unroll(full)
    for (int o = 0; o < kOutputs; ++o) {
      group[o] = Weights::GroupOf(weight[o], k);
      if constexpr (kPrefetches) Weights::Prefetch(weight[o], k);
    }
#pragma clang loop unroll(full)
    for (int64_t lane = 0; lane < Weights::kStep; lane += kLanes) {
      F32 w[kOutputs];
#pragma clang loop unroll(full)
      for (int o = 0; o < kOutputs; ++o) w[o] = Weights::Load(weight[o], group[o], k + lane);
#pragma clang loop unroll(full)
      for (int r = 0; r < kRows; ++r) {
        const F32 row = Load(x + r * inputs + k + lane);
#pragma clang loop unroll(full)
        for (int o = 0; o < kOutputs; ++o) sums[r * kOutputs + o] = Fma(row, w[o], sums[r * kOutputs + o]);
      }
    }
  }
  for (; k < inputs; k += kLanes) {  // What is left of a step, 16 at a time.
    F32 w[kOutputs];
#pragma clang loop unroll(full)
    for (int o = 0; o < kOutputs; ++o) w[o] = LoadSomeWeights<Weights>(weight[o], k, inputs - k);
#pragma clang loop unroll(full)
    for (int r = 0; r < kRows; ++r) {
      const F32 row = LoadSome(x + r * inputs + k, inputs - k);
#pragma clang loop unroll(full)
      for (int o = 0; o < kOutputs; ++o) sums[r * kOutputs + o] = Fma(row, w[o], sums[r * kOutputs + o]);
    }
  }

  alignas(64) float z[RoundUpToLanes(kCells)] = {};
#pragma clang loop unroll(full)
  for (int cell = 0; cell + 4 <= kCells; cell += 4) {
    const F32x4 four = Sum4(sums[cell], sums[cell + 1], sums[cell + 2], sums[cell + 3]);
    for (int i = 0; i < 4; ++i) z[cell + i] = four[i];
  }
#pragma clang loop unroll(full)
  for (int cell = kCells / 4 * 4; cell < kCells; ++cell) z[cell] = Sum(sums[cell]);
  if (args.bias != nullptr) {
    for (int cell = 0; cell < kCells; ++cell) {
      z[cell] += args.bias[tile.output + cell % kOutputs * tile.output_step];
    }
  }
  if (args.activation != Activation::kNone) {
    for (int cell = 0; cell < kCells; cell += kLanes) Store(z + cell, Activate(args.activation, Load(z + cell)));
  }
  for (int cell = 0; cell < kCells; ++cell) {
    const int64_t at =
        (tile.row + cell / kOutputs) * args.weight.rows + tile.output + cell % kOutputs * tile.output_step;
    const float value = args.gate != nullptr ? z[cell] * args.gate[at] : z[cell];
    args.y[at] = args.accumulate ? args.y[at] + value : value;
  }
}

// `rows` <= kTileRows, which is known only now, times kOutputs.
template <typename Weights, int kOutputs, int kRows = kTileRows>
RWKV_INLINE void ComputeTileOfRows(const MatmulArgs& args, int64_t rows, const Tile& tile) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return ComputeTileOfRows<Weights, kOutputs, kRows - 1>(args, rows, tile);
  }
  ComputeTile<Weights, kRows, kOutputs>(args, tile);
}

// All rows past one tile's outputs, in tiles of even sizes.
template <typename Weights, int kOutputs>
RWKV_INLINE void ComputeTiles(const MatmulArgs& args, Tile tile) {
  const int64_t tiles = (args.rows + kTileRows - 1) / kTileRows;
  for (int64_t i = 0; i < tiles; ++i) {
    tile.row = i * args.rows / tiles;
    ComputeTileOfRows<Weights, kOutputs>(args, (i + 1) * args.rows / tiles - tile.row, tile);
  }
}

// Few rows, weights widened as they are read, from memory each once. The outputs of a tile are a kStep-th of the matrix
// apart; a part is a few neighbours of each.
struct FewRows {
  explicit FewRows(const MatmulArgs& args) {
    outputs = args.weight.rows;
    streams = args.rows == 1 ? kStreams : kTileOutputs;
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
  const int64_t begin = part * cut.part;
  const int64_t end = begin + cut.part < cut.step ? begin + cut.part : cut.step;
  for (int64_t o = begin; o < end; ++o) {
    const Tile tile = {0, o, cut.step, args.weight, o};
    if (args.rows == 1) {
      ComputeTile<Weights, 1, kStreams>(args, tile);
    } else {
      ComputeTiles<Weights, kTileOutputs>(args, tile);
    }
  }
  if (part != cut.parts - 1) return;
  for (int64_t o = cut.step * cut.streams; o < cut.outputs; ++o) {
    ComputeTiles<Weights, 1>(args, {0, o, 1, args.weight, o});
  }
}

// Outputs whose widened weights fit the panel, at least one tile of them.
RWKV_INLINE int64_t PanelOutputs(int64_t inputs) {
  const int64_t outputs = kPanelFloats / RoundUpToLanes(inputs) / kTileOutputs * kTileOutputs;
  return outputs < kTileOutputs ? kTileOutputs : outputs;
}

// All rows past one panel of outputs, which is a part.
template <typename Weights>
void MatmulManyRows(const MatmulArgs& args, int64_t part, float* panel) {
  const int64_t inputs = args.weight.cols;
  const int64_t panel_stride = RoundUpToLanes(inputs);
  const int64_t panel_outputs = PanelOutputs(inputs);
  MatrixView widened;
  widened.rows = panel_outputs;
  widened.cols = panel_stride;
  widened.data = panel;
  const int64_t begin = part * panel_outputs;
  const int64_t count = args.weight.rows - begin < panel_outputs ? args.weight.rows - begin : panel_outputs;
  for (int64_t o = 0; o < count; ++o) WidenRow<Weights>(args.weight, begin + o, panel + o * panel_stride);
  const int64_t tiles = (args.rows + kTileRows - 1) / kTileRows;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t row = i * args.rows / tiles;
    const int64_t rows = (i + 1) * args.rows / tiles - row;
    int64_t o = 0;
    for (; o + kTileOutputs <= count; o += kTileOutputs) {
      ComputeTileOfRows<Float32Weights, kTileOutputs>(args, rows, {row, begin + o, 1, widened, o});
    }
    for (; o < count; ++o) ComputeTileOfRows<Float32Weights, 1>(args, rows, {row, begin + o, 1, widened, o});
  }
}

// Whether the rows are multiplied in fixed point.
RWKV_INLINE bool IsInteger(const MatrixView& matrix) {
  return matrix.quantization == Quantization::kInt8 || matrix.quantization == Quantization::kInt4 ||
         matrix.blocks == BlockType::kQ8_0 || matrix.blocks == BlockType::kQ4_0;
}

int64_t MatmulParts(const MatmulArgs& args) {
  if (IsInteger(args.weight)) return IntegerMatmulParts(args);
  if (args.rows <= kFewRows) return FewRows(args).parts;
  const int64_t panel_outputs = PanelOutputs(args.weight.cols);
  return (args.weight.rows + panel_outputs - 1) / panel_outputs;
}

int64_t MatmulWorkspaceBytes(const MatmulArgs& args) {
  if (IsInteger(args.weight)) return IntegerMatmulWorkspaceBytes(args);
  if (args.rows <= kFewRows) return 0;
  return PanelOutputs(args.weight.cols) * RoundUpToLanes(args.weight.cols) * static_cast<int64_t>(sizeof(float));
}

int64_t MatmulFixedBytes(const MatmulArgs& args) { return IsInteger(args.weight) ? FixedRowsBytes(args) : 0; }

void Matmul(const MatmulArgs& args, int64_t part, void* workspace) {
  if (IsInteger(args.weight)) return IntegerMatmul(args, part, workspace);
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
  return MatmulFixedBytes(args) + MatmulWorkspaceBytes(args);
}

RWKV_INLINE void WholeMatmul(MatmulArgs args, void* workspace) {
  args.fixed = workspace;
  if (IsInteger(args.weight)) FixRows(args, 0, args.rows);
  for (int64_t part = 0; part < MatmulParts(args); ++part) {
    Matmul(args, part, static_cast<char*>(workspace) + MatmulFixedBytes(args));
  }
}

}  // namespace
}  // namespace rwkv::kernels::cpu
