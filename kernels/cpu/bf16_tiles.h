// Rows times a matrix of bf16 on the processor's tiles: 16 outputs by 32 inputs times 32 inputs by 16 rows. An input is
// the sum of three numbers of bf16, which lose nothing of a float, or with round_inputs the nearest such number alone:
//   y = (sum of w * x2 + sum of w * x1) + sum of w * x0
// A sum goes in steps of 32 inputs: two chains of 16 fused multiply-adds from zero, of even and of odd inputs, their
// sum, and one addition to what was there; zeros after the end. Neither rows nor outputs beside it change that (law
// N1). A weight or a part that is too small for a normal float counts as zero, an infinite one gives NaN. Only for the
// kernels_*.cc files.
// Source: Intel Architecture Instruction Set Extensions Reference, TDPBF16PS.
#pragma once

#include <cstdint>

#include "kernels/cpu/epilogue.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cpu/output_runs.h"
#include "kernels/cpu/pairs.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/tiles.h"

namespace rwkv::kernels::cpu {
namespace {

#if defined(RWKV_HAS_TILES)

constexpr int kMostParts = 3;
constexpr int64_t kTilePairs = 16;
constexpr int64_t kBf16TileInputs = 2 * kTilePairs;
constexpr int64_t kBf16TileBytes = kLanes * kTileBytes;

// Up to so many rows all sums stay in tiles and the weights are read once, from memory, in 16 streams far apart.
constexpr int64_t kFewColumnRows = 32;
constexpr int64_t kBf16PartBytes = 64 * 1024;

// With many rows: outputs of a part, inputs of a step whose weights are packed into tiles, and as many tiles of sums as
// stay in the second-level cache meanwhile.
constexpr int64_t kBf16PanelOutputs = 128;
constexpr int64_t kBf16PanelInputs = 512;
constexpr int64_t kColumnTilesAtOnce = 96;

// The rows as tiles of columns: [group][step of 32 inputs][column tile of the group][pair of inputs][row][2]. A row's
// column tile is parts * (row / 16) + part. With few rows all are one group, else two are, the last maybe zeros. Joint
// rows, up to 8, have two parts in a tile, side by side.
struct ColumnTiles {
  explicit ColumnTiles(const MatmulArgs& args)
      : parts(args.round_inputs ? 1 : kMostParts),
        joint(args.rows <= kLanes / 2),
        steps((args.weight.cols + kBf16TileInputs - 1) / kBf16TileInputs),
        used(joint ? (parts + 1) / 2 : (args.rows + kLanes - 1) / kLanes * parts),
        of_group(args.rows <= kFewColumnRows ? used : 2),
        count((used + of_group - 1) / of_group * of_group) {}

  int64_t Bytes() const { return count * steps * kBf16TileBytes; }
  int64_t Offset(int64_t column, int64_t step) const {
    return ((column / of_group * steps + step) * of_group + column % of_group) * kBf16TileBytes;
  }
  char* At(const MatmulArgs& args, int64_t column, int64_t step) const {
    return static_cast<char*>(args.prepared) + Offset(column, step);
  }

  int64_t parts;
  bool joint;
  int64_t steps;
  int64_t used;
  int64_t of_group;
  int64_t count;
};

// Takes the next part off x: both are exact but for what is too small for a normal float.
RWKV_INLINE F32 TakePart(F32* x) {
  const F32 part = RoundToBFloat16(*x);
  const I32 finite = (I32)(((U32)part & 0x7f800000u) != 0x7f800000u);
  *x = Select(finite, *x - part, F32{});
  return part;
}

// Rows [begin, end), begin being a multiple of 8, and with the last row the zeros behind it.
RWKV_INLINE void FillColumnTiles(const MatmulArgs& args, int64_t begin, int64_t end) {
  constexpr int64_t kTogether = 8;
  const ColumnTiles tiles(args);
  const int64_t inputs = args.weight.cols;
  const int64_t block_rows = tiles.joint ? kTogether : kLanes;
  const int64_t padded_rows = (args.rows + block_rows - 1) / block_rows * block_rows;
  const int64_t stop = end == args.rows ? padded_rows : end;
  for (int64_t first = begin; first < stop; first += kTogether) {
    const int64_t column = first / kLanes * tiles.parts;
    for (int64_t step = 0; step < tiles.steps; ++step) {
      F32 pairs[kMostParts][kLanes] = {};  // bits, not floats
      for (int64_t i = 0; i < kTogether && first + i < args.rows; ++i) {
        const float* const x = args.x + (first + i) * inputs;
        const int64_t k = step * kBf16TileInputs;
        F32 low = LoadSome(x + k, inputs - k);
        F32 high = k + kLanes < inputs ? LoadSome(x + k + kLanes, inputs - k - kLanes) : F32{};
        for (int64_t part = 0; part < tiles.parts; ++part) {
          const F32 a = TakePart(&low), b = TakePart(&high);
          pairs[part][i] = JoinPairs(a, b);
        }
      }
      for (int64_t part = 0; part < tiles.parts; ++part) {
        Transpose(pairs[part]);
        char* const to = tiles.joint ? tiles.At(args, part / 2, step) + part % 2 * kTogether * 4
                                     : tiles.At(args, column + part, step) + first % kLanes * 4;
        for (int64_t pair = 0; pair < kTilePairs; ++pair) {
          __builtin_memcpy(to + pair * kTileBytes, &pairs[part][pair], kTogether * 4);
        }
      }
    }
  }
  if (end != args.rows) return;
  for (int64_t column = tiles.used; column < tiles.count; ++column) {
    for (int64_t step = 0; step < tiles.steps; ++step) {
      __builtin_memset(tiles.At(args, column, step), 0, kBf16TileBytes);
    }
  }
  if (!tiles.joint || tiles.parts % 2 == 0) return;
  for (int64_t step = 0; step < tiles.steps; ++step) {  // Beside the last part.
    for (int64_t pair = 0; pair < kTilePairs; ++pair) {
      __builtin_memset(tiles.At(args, tiles.used - 1, step) + pair * kTileBytes + kTogether * 4, 0, kTogether * 4);
    }
  }
}

// 16 outputs of 32 inputs from `k` on, first + i * step being the i-th; what the matrix has not is zero.
RWKV_INLINE void CopyWeightTile(const MatrixView& weight, int64_t first, int64_t step, int64_t k, char* to) {
  const auto* const weights = static_cast<const uint16_t*>(weight.data);
  const int64_t left = weight.cols - k;
  const int64_t bytes = left >= kBf16TileInputs ? kTileBytes : left > 0 ? 2 * left : 0;
  for (int64_t i = 0; i < kLanes; ++i) {
    char* const row = to + i * kTileBytes;
    const int64_t output = first + i * step;
    if (output < weight.rows && bytes == kTileBytes) {
      __builtin_memcpy(row, weights + output * weight.cols + k, kTileBytes);
      continue;
    }
    for (int64_t j = 0; j < kTileBytes; ++j) {
      row[j] =
          output < weight.rows && j < bytes ? reinterpret_cast<const char*>(weights + output * weight.cols + k)[j] : 0;
    }
  }
}

// Adds up the sums of the parts of 16 outputs and 16 rows, given as tiles: [output][row]. Joint rows' are 8.
RWKV_INLINE void AddParts(const char* sums_of_parts, int64_t parts, bool joint, F32* sums) {
  const auto load = [&](int64_t part, int64_t output) RWKV_INLINE_LAMBDA {
    const char* const tile = sums_of_parts + (joint ? part / 2 : part) * kBf16TileBytes + output * kTileBytes;
    return Load(reinterpret_cast<const float*>(joint ? tile + part % 2 * kTileBytes / 2 : tile));
  };
  for (int64_t i = 0; i < kLanes; ++i) {
    sums[i] = load(parts - 1, i);
    for (int64_t part = parts - 2; part >= 0; --part) sums[i] = sums[i] + load(part, i);
  }
}

RWKV_INLINE int64_t RowsOfBlock(const MatmulArgs& args, int64_t block) {
  const int64_t left = args.rows - block * kLanes;
  return left < kLanes ? left : kLanes;
}

// What follows the sums of 16 neighbouring outputs and 16 rows, given as the tiles of the parts.
RWKV_INLINE void FinishColumns(const MatmulArgs& args, int64_t block, int64_t first, const char* sums_of_parts,
                               int64_t parts, bool joint) {
  F32 sums[kLanes];
  AddParts(sums_of_parts, parts, joint, sums);
  Transpose(sums);
  for (int64_t i = 0; i < RowsOfBlock(args, block); ++i) {
    FinishRun(args, block * kLanes + i, first, kLanes, sums[i]);
  }
}

// --- Few rows ---

// Large matrices are read in 16 streams `step` outputs apart, an odd number: at powers of two they would meet in the same
// sets of the caches. What they leave over, at most 31 outputs, and small matrices are tiles of neighbours.
struct FewColumns {
  explicit FewColumns(const MatmulArgs& args) {
    const int64_t tiles = args.weight.rows / kLanes;
    if (tiles >= kFewestTilesOfRuns) step = tiles % 2 == 0 ? tiles - 1 : tiles;
    tiles_of_run = TilesOfRun(step);
    run_parts = (step + tiles_of_run - 1) / tiles_of_run;
    const int64_t near = (args.weight.rows - step * kLanes + kLanes - 1) / kLanes;
    tiles_of_part = kBf16PartBytes / (kLanes * RowBytes(args.weight));
    if (tiles_of_part < 1) tiles_of_part = 1;
    parts = run_parts + (near + tiles_of_part - 1) / tiles_of_part;
  }
  int64_t step = 0;
  int64_t tiles_of_run;
  int64_t run_parts;
  int64_t tiles_of_part;  // Of neighbours.
  int64_t parts;
};

// sums[i] += weights * columns[i], for the first kCount tiles.
template <int kCount>
RWKV_INLINE void MultiplyColumns(const char* columns) {
  static_assert(kCount <= 6, "six tiles of sums");
  if constexpr (kCount > 0) LoadTile<7>(columns), MultiplyBf16Tiles<0, 6, 7>();
  if constexpr (kCount > 1) LoadTile<7>(columns + kBf16TileBytes), MultiplyBf16Tiles<1, 6, 7>();
  if constexpr (kCount > 2) LoadTile<7>(columns + 2 * kBf16TileBytes), MultiplyBf16Tiles<2, 6, 7>();
  if constexpr (kCount > 3) LoadTile<7>(columns + 3 * kBf16TileBytes), MultiplyBf16Tiles<3, 6, 7>();
  if constexpr (kCount > 4) LoadTile<7>(columns + 4 * kBf16TileBytes), MultiplyBf16Tiles<4, 6, 7>();
  if constexpr (kCount > 5) LoadTile<7>(columns + 5 * kBf16TileBytes), MultiplyBf16Tiles<5, 6, 7>();
}

// The outputs first + i * step times all rows, as the tiles of the parts; `whole`: all 16 are there.
template <int kCount>
__attribute__((noinline)) void ComputeFewColumns(const MatmulArgs& args, int64_t first, int64_t step, bool whole,
                                                 char* sums) {
  const ColumnTiles tiles(args);
  const int64_t inputs = args.weight.cols;
  const auto* const weights = static_cast<const char*>(args.weight.data) + first * inputs * 2;
  const int64_t stride = step * inputs * 2;
  const int64_t ahead = step == 1 ? kLanes * stride : kPrefetch;
  alignas(64) char copy[kBf16TileBytes];
  ZeroTiles<kCount>();
  for (int64_t s = 0; s < tiles.steps; ++s) {
    const int64_t k = s * kBf16TileInputs;
    if (whole && k + kBf16TileInputs <= inputs) {
      for (int64_t i = 0; i < kLanes; ++i) __builtin_prefetch(weights + i * stride + 2 * k + ahead);
      LoadTile<6>(weights + 2 * k, stride);
    } else {
      CopyWeightTile(args.weight, first, step, k, copy);
      LoadTile<6>(copy);
    }
    MultiplyColumns<kCount>(tiles.At(args, 0, s));
  }
  StoreTiles<kCount>(sums);
}

// kCount: column tiles of all blocks of rows.
template <int kCount>
RWKV_INLINE void MatmulFewColumns(const MatmulArgs& args, int64_t part, OutputRuns* runs) {
  const FewColumns cut(args);
  const ColumnTiles columns(args);
  const int64_t blocks = (args.rows + kLanes - 1) / kLanes;
  constexpr int64_t kBytes = kCount * kBf16TileBytes;
  alignas(64) char sums[kBytes];
  if (part >= cut.run_parts) {
    const int64_t begin = cut.step * kLanes + (part - cut.run_parts) * cut.tiles_of_part * kLanes;
    const int64_t end = begin + cut.tiles_of_part * kLanes;
    for (int64_t first = begin; first < end && first < args.weight.rows; first += kLanes) {
      ComputeFewColumns<kCount>(args, first, 1, first + kLanes <= args.weight.rows, sums);
      for (int64_t block = 0; block < blocks; ++block) {
        FinishColumns(args, block, first, sums + block * (kBytes / blocks), columns.parts, columns.joint);
      }
    }
    return;
  }
  const int64_t begin = part * cut.tiles_of_run;
  const int64_t count = cut.step - begin < cut.tiles_of_run ? cut.step - begin : cut.tiles_of_run;
  for (int64_t tile = 0; tile < count; ++tile) {
    ComputeFewColumns<kCount>(args, begin + tile, cut.step, true, sums);
    for (int64_t block = 0; block < blocks; ++block) {
      F32 added[kLanes];
      AddParts(sums + block * (kBytes / blocks), columns.parts, columns.joint, added);
      for (int64_t run = 0; run < kLanes; ++run) runs[block].sums[run][tile] = added[run];
    }
  }
  for (int64_t block = 0; block < blocks; ++block) {
    FinishRuns(args, runs[block], block * kLanes, RowsOfBlock(args, block), begin, cut.step, count);
  }
}

// --- Many rows ---

struct ColumnPanel {
  explicit ColumnPanel(void* memory) : weights(static_cast<char*>(memory)), sums(weights + kWeightBytes) {}
  static constexpr int64_t kWeightBytes = kBf16PanelOutputs * kBf16PanelInputs * 2;
  static int64_t Bytes(const ColumnTiles& tiles) {
    const int64_t columns = tiles.count < kColumnTilesAtOnce ? tiles.count : kColumnTilesAtOnce;
    return kWeightBytes + kBf16PanelOutputs / kLanes * columns * kBf16TileBytes;
  }
  char* weights;  // [16 outputs][step][output][32]
  char* sums;     // [16 outputs][column tile][output][row]
};

// Adds to 32 outputs by two column tiles the products of `steps` steps. The others of the same outputs or columns are
// `weight_stride`, `sum_stride` bytes away.
RWKV_INLINE void MultiplyFour(const char* weights, int64_t weight_stride, const char* columns, int64_t steps,
                              bool first, char* sums, int64_t sum_stride) {
  if (first) {
    ZeroTiles<4>();
  } else {
    LoadTile<0>(sums);
    LoadTile<1>(sums + kBf16TileBytes);
    LoadTile<2>(sums + sum_stride);
    LoadTile<3>(sums + sum_stride + kBf16TileBytes);
  }
  for (int64_t s = 0; s < steps; ++s) {
    LoadTile<4>(weights + s * kBf16TileBytes);
    LoadTile<6>(columns + 2 * s * kBf16TileBytes);
    MultiplyBf16Tiles<0, 4, 6>();
    LoadTile<7>(columns + (2 * s + 1) * kBf16TileBytes);
    MultiplyBf16Tiles<1, 4, 7>();
    LoadTile<5>(weights + weight_stride + s * kBf16TileBytes);
    MultiplyBf16Tiles<2, 5, 6>();
    MultiplyBf16Tiles<3, 5, 7>();
  }
  StoreTile<0>(sums);
  StoreTile<1>(sums + kBf16TileBytes);
  StoreTile<2>(sums + sum_stride);
  StoreTile<3>(sums + sum_stride + kBf16TileBytes);
}

// Outputs `begin` and on, as many as a panel has, times the column tiles [first_column, end_column).
RWKV_INLINE void ComputePanelColumns(const MatmulArgs& args, const ColumnTiles& tiles, const ColumnPanel& panel,
                                     int64_t begin, int64_t first_column, int64_t end_column) {
  constexpr int64_t kSteps = kBf16PanelInputs / kBf16TileInputs;
  const int64_t left = args.weight.rows - begin;
  const int64_t outputs = (left < kBf16PanelOutputs ? left : kBf16PanelOutputs) + kLanes - 1;
  const int64_t output_tiles = (outputs / kLanes + 1) / 2 * 2;
  const int64_t sum_stride = (end_column - first_column) * kBf16TileBytes;
  for (int64_t step = 0; step < tiles.steps; step += kSteps) {
    const int64_t steps = tiles.steps - step < kSteps ? tiles.steps - step : kSteps;
    for (int64_t tile = 0; tile < output_tiles; ++tile) {
      for (int64_t s = 0; s < steps; ++s) {
        CopyWeightTile(args.weight, begin + tile * kLanes, 1, (step + s) * kBf16TileInputs,
                       panel.weights + (tile * kSteps + s) * kBf16TileBytes);
      }
    }
    for (int64_t column = first_column; column < end_column; column += 2) {
      for (int64_t tile = 0; tile < output_tiles; tile += 2) {
        MultiplyFour(panel.weights + tile * kSteps * kBf16TileBytes, kSteps * kBf16TileBytes,
                     tiles.At(args, column, step), steps, step == 0,
                     panel.sums + tile * sum_stride + (column - first_column) * kBf16TileBytes, sum_stride);
      }
    }
  }
  for (int64_t tile = 0; tile * kLanes < left && tile < output_tiles; ++tile) {
    for (int64_t column = first_column; column < end_column && column < tiles.used; column += tiles.parts) {
      FinishColumns(args, column / tiles.parts, begin + tile * kLanes,
                    panel.sums + tile * sum_stride + (column - first_column) * kBf16TileBytes, tiles.parts, false);
    }
  }
}

// --- The product ---

// Whether the rows are multiplied here.
RWKV_INLINE bool AreBf16Tiles(const MatmulArgs& args) {
  return args.weight.quantization == Quantization::kNone && args.weight.dtype == DType::kBFloat16;
}

RWKV_INLINE int64_t Bf16TilesParts(const MatmulArgs& args) {
  if (args.rows <= kFewColumnRows) return FewColumns(args).parts;
  return (args.weight.rows + kBf16PanelOutputs - 1) / kBf16PanelOutputs;
}

RWKV_INLINE int64_t Bf16TilesWorkspaceBytes(const MatmulArgs& args) {
  if (args.rows <= kFewColumnRows) return kFewColumnRows / kLanes * static_cast<int64_t>(sizeof(OutputRuns));
  return ColumnPanel::Bytes(ColumnTiles(args));
}

RWKV_INLINE void MatmulBf16Tiles(const MatmulArgs& args, int64_t part, void* workspace) {
  const ScopedTiles tiles_are_ready;
  if (args.rows <= kFewColumnRows) {
    auto* const runs = static_cast<OutputRuns*>(workspace);
    switch (ColumnTiles(args).used) {
      case 1:
        return MatmulFewColumns<1>(args, part, runs);
      case 2:
        return MatmulFewColumns<2>(args, part, runs);
      case 3:
        return MatmulFewColumns<3>(args, part, runs);
      default:
        return MatmulFewColumns<6>(args, part, runs);
    }
  }
  static_assert(kColumnTilesAtOnce % (2 * kMostParts) == 0, "no row's parts, and no pair of tiles, are apart");
  const ColumnTiles tiles(args);
  const ColumnPanel panel(workspace);
  for (int64_t column = 0; column < tiles.count; column += kColumnTilesAtOnce) {
    const int64_t end = column + kColumnTilesAtOnce < tiles.count ? column + kColumnTilesAtOnce : tiles.count;
    ComputePanelColumns(args, tiles, panel, part * kBf16PanelOutputs, column, end);
  }
}

#endif

}  // namespace
}  // namespace rwkv::kernels::cpu
