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
// column tile is parts * (row / 16) + part. With few rows all are one group, else two are, the last maybe zeros.
struct ColumnTiles {
  explicit ColumnTiles(const MatmulArgs& args)
      : parts(args.round_inputs ? 1 : kMostParts),
        steps((args.weight.cols + kBf16TileInputs - 1) / kBf16TileInputs),
        used((args.rows + kLanes - 1) / kLanes * parts),
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
  const int64_t padded_rows = (args.rows + kLanes - 1) / kLanes * kLanes;
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
        char* const to = tiles.At(args, column + part, step) + first % kLanes * 4;
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

// What follows the sums of 16 outputs and 16 rows, given as the tiles of the parts: [output][row].
RWKV_INLINE void FinishColumns(const MatmulArgs& args, int64_t block, int64_t first, int64_t step,
                               const char* sums_of_parts, int64_t parts) {
  F32 sums[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    F32 sum = Load(reinterpret_cast<const float*>(sums_of_parts + (parts - 1) * kBf16TileBytes + i * kTileBytes));
    for (int64_t part = parts - 2; part >= 0; --part) {
      sum = sum + Load(reinterpret_cast<const float*>(sums_of_parts + part * kBf16TileBytes + i * kTileBytes));
    }
    sums[i] = sum;
  }
  Transpose(sums);
  for (int64_t i = 0; i < kLanes && block * kLanes + i < args.rows; ++i) {
    Finish(args, block * kLanes + i, first, step, sums[i]);
  }
}

// --- Few rows ---

// The streams are `step` outputs apart, an odd number where it matters: at powers of two they would meet in the same
// sets of the caches. What they leave over, at most 31 outputs, are tiles of neighbours.
struct FewColumns {
  explicit FewColumns(const MatmulArgs& args) {
    step = args.weight.rows / kLanes;
    if (step >= 8 && step % 2 == 0) --step;
    const int64_t size = kBf16PartBytes / (kLanes * RowBytes(args.weight));
    part = size < 1 ? 1 : size;
    parts = step == 0 ? 1 : (step + part - 1) / part;
  }
  int64_t step;
  int64_t part;
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

// The outputs first + i * step times all rows; `whole`: all 16 are there.
template <int kBlocks, int kParts>
__attribute__((noinline)) void ComputeFewColumns(const MatmulArgs& args, int64_t first, int64_t step, bool whole) {
  constexpr int kCount = kBlocks * kParts;
  const ColumnTiles tiles(args);
  const int64_t inputs = args.weight.cols;
  const auto* const weights = static_cast<const char*>(args.weight.data) + first * inputs * 2;
  const int64_t stride = step * inputs * 2;
  alignas(64) char copy[kBf16TileBytes];
  ZeroTiles<kCount>();
  for (int64_t s = 0; s < tiles.steps; ++s) {
    const int64_t k = s * kBf16TileInputs;
    if (whole && k + kBf16TileInputs <= inputs) {
      for (int64_t i = 0; i < kLanes; ++i) __builtin_prefetch(weights + i * stride + 2 * k + kPrefetch);
      LoadTile<6>(weights + 2 * k, stride);
    } else {
      CopyWeightTile(args.weight, first, step, k, copy);
      LoadTile<6>(copy);
    }
    MultiplyColumns<kCount>(tiles.At(args, 0, s));
  }
  alignas(64) char sums[kCount * kBf16TileBytes];
  StoreTiles<kCount>(sums);
  for (int64_t block = 0; block < kBlocks; ++block) {
    FinishColumns(args, block, first, step, sums + block * kParts * kBf16TileBytes, kParts);
  }
}

template <int kBlocks, int kParts>
RWKV_INLINE void MatmulFewColumns(const MatmulArgs& args, int64_t part) {
  const FewColumns cut(args);
  const int64_t end = (part + 1) * cut.part < cut.step ? (part + 1) * cut.part : cut.step;
  for (int64_t first = part * cut.part; first < end; ++first) {
    ComputeFewColumns<kBlocks, kParts>(args, first, cut.step, true);
  }
  if (part != cut.parts - 1) return;
  for (int64_t first = cut.step * kLanes; first < args.weight.rows; first += kLanes) {
    ComputeFewColumns<kBlocks, kParts>(args, first, 1, first + kLanes <= args.weight.rows);
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
      FinishColumns(args, column / tiles.parts, begin + tile * kLanes, 1,
                    panel.sums + tile * sum_stride + (column - first_column) * kBf16TileBytes, tiles.parts);
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
  return args.rows <= kFewColumnRows ? 0 : ColumnPanel::Bytes(ColumnTiles(args));
}

RWKV_INLINE void MatmulBf16Tiles(const MatmulArgs& args, int64_t part, void* workspace) {
  const ScopedTiles tiles_are_ready;
  if (args.rows <= kFewColumnRows) {
    const bool one_block = args.rows <= kLanes;
    if (args.round_inputs) return one_block ? MatmulFewColumns<1, 1>(args, part) : MatmulFewColumns<2, 1>(args, part);
    return one_block ? MatmulFewColumns<1, 3>(args, part) : MatmulFewColumns<2, 3>(args, part);
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
