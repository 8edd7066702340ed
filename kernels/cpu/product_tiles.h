// Tiles of a product: rows laid together, and some rows times some outputs. Only for the kernels_*.cc files.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/base/matrix.h"
#include "kernels/cpu/epilogue.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cpu/pairs.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/weight_rows.h"

namespace rwkv::kernels::cpu {
namespace {

// Tiles of rows times outputs, as many accumulators as the registers hold. With one row the weights are read once, from
// memory: kStreams rows of them at a time, far apart, because a core reads several sequential streams faster than one.
#if defined(__AVX512F__)
constexpr int kAccumulators = 24;
constexpr int kMostOutputs = 4;
constexpr int kManyTileRows = 6;
constexpr int kStreams = 8;
#elif defined(__AVX2__)
constexpr int kAccumulators = 6;
constexpr int kMostOutputs = 2;
constexpr int kManyTileRows = 3;
constexpr int kStreams = 4;
#else
constexpr int kAccumulators = 2;
constexpr int kMostOutputs = 1;
constexpr int kManyTileRows = 2;
constexpr int kStreams = 2;
#endif

// Up to so many rows the weights are widened as they are read, from memory by the first tile of rows.
constexpr int kFewTileRows = kAccumulators / 2;
#if defined(__AVX512F__)
constexpr int kFewRows = kFewTileRows;
#else
constexpr int kFewRows = 2 * kFewTileRows;
#endif

// Outputs of a tile.
constexpr int TileOutputs(int64_t rows) {
  if (rows == 1) return kStreams;
  return kAccumulators / rows < kMostOutputs ? static_cast<int>(kAccumulators / rows) : kMostOutputs;
}
constexpr int kManyTileOutputs = TileOutputs(kManyTileRows);

// The rows of a product, cut into tiles of even sizes. A tile's rows lie together, [step of 16][row][16] and zeros at
// the end: as rows of their own they would meet in the same sets of the first-level cache. One row stays where it is.
// Rounded to bf16 (pairs.h) a step is 32 inputs in the place of 16 floats, and one row is put there too.
struct RowTiles {
  explicit RowTiles(const MatmulArgs& args)
      : pairs(ArePairs(args)),
        rows(args.rows),
        tiles(args.rows <= kFewRows ? (args.rows + kFewTileRows - 1) / kFewTileRows
                                    : (args.rows + kManyTileRows - 1) / kManyTileRows),
        inputs(args.weight.cols),
        step_inputs(pairs ? 2 * kLanes : kLanes),
        padded((inputs + step_inputs - 1) / step_inputs * kLanes) {}

  int64_t Begin(int64_t tile) const { return tile * rows / tiles; }
  bool StaysWhereItIs() const { return rows == 1 && !pairs; }
  int64_t Bytes() const { return StaysWhereItIs() ? 0 : rows * padded * static_cast<int64_t>(sizeof(float)); }
  const float* Tile(const MatmulArgs& args, int64_t tile) const {
    return StaysWhereItIs() ? args.x : static_cast<const float*>(args.prepared) + Begin(tile) * padded;
  }

  // Puts rows [begin, end) there.
  void Fill(const MatmulArgs& args, int64_t begin, int64_t end) const {
    int64_t tile = begin * tiles / rows;
    for (int64_t row = begin; row < end; ++row) {
      while (Begin(tile + 1) <= row) ++tile;
      const int64_t size = Begin(tile + 1) - Begin(tile);
      const float* const from = args.x + row * inputs;
      float* const to = static_cast<float*>(args.prepared) + Begin(tile) * padded + (row - Begin(tile)) * kLanes;
      for (int64_t k = 0, step = 0; k < inputs; k += step_inputs, ++step) {
        Store(to + step * kLanes * size, pairs ? LoadAsPairs(from + k, inputs - k) : LoadSome(from + k, inputs - k));
      }
    }
  }

  bool pairs;
  int64_t rows;
  int64_t tiles;
  int64_t inputs;
  int64_t step_inputs;
  int64_t padded;  // In floats.
};

// Widened weights in the cache, [tile of kManyTileOutputs][step of 16][output][16].
struct PanelWeights {
  // Of the step of input `col`; the next output's are kLanes further.
  static RWKV_INLINE const float* At(const MatrixView& matrix, int64_t row, int64_t col) {
    const int64_t first = row / kManyTileOutputs * kManyTileOutputs;
    return static_cast<const float*>(matrix.data) + first * matrix.cols + (row - first) * kLanes +
           col * kManyTileOutputs;
  }
};

// A tile's place: its rows, its first row and output, how far its outputs are apart, and where the weights of those
// are, which is the matrix itself or a panel of it.
struct Tile {
  const float* x;
  int64_t row;
  int64_t output;
  int64_t output_step;
  const MatrixView& weight;
  int64_t weight_row;  // of the first output
  // Of a panel: the inputs of this block, and the tile's sums between one block and the next.
  int64_t begin = 0;
  int64_t end = 0;
  F32* sums = nullptr;
  Ahead* ahead = nullptr;
};

// z[i] = Sum(sums[i]), as many at a time as it goes.
template <int kCount>
RWKV_INLINE void SumEach(const F32* sums, float* z) {
  if constexpr (kCount >= 16) {
    Store(z, Sum16(sums));
    SumEach<kCount - 16>(sums + 16, z + 16);
  } else if constexpr (kCount >= 4) {
    StoreFour(z, Sum4(sums[0], sums[1], sums[2], sums[3]));
    SumEach<kCount - 4>(sums + 4, z + 4);
  } else if constexpr (kCount > 0) {
    *z = Sum(*sums);
    SumEach<kCount - 1>(sums + 1, z + 1);
  }
}

// What follows a tile's sums, [row][output].
template <int kOutputs, int kCells>
RWKV_INLINE void FinishTile(const MatmulArgs& args, const Tile& tile, const F32 (&sums)[kCells]) {
  alignas(64) float z[RoundUpToLanes(kCells)] = {};
  SumEach<kCells>(sums, z);
  if (args.bias != nullptr) {
    for (int cell = 0; cell < kCells; ++cell) {
      z[cell] += args.bias[tile.output + cell % kOutputs * tile.output_step];
    }
  }
  if (args.activation != Activation::kNone) {
    for (int cell = 0; cell < kCells; cell += kLanes) Store(z + cell, Activate(args.activation, Load(z + cell)));
  }
  const int64_t first = tile.row * args.weight.rows + tile.output;
  if (kOutputs == 4 && tile.output_step == 1) {
#pragma clang loop unroll(full)
    for (int row = 0; row < kCells / kOutputs; ++row) {
      const int64_t at = first + row * args.weight.rows;
      F32x4 value = LoadFour(z + row * kOutputs);
      if (args.gate != nullptr) value = value * LoadFour(args.gate + at);
      StoreFour(args.y + at, args.accumulate ? LoadFour(args.y + at) + value : value);
    }
    return;
  }
  const bool alone = args.gate == nullptr && !args.accumulate;
#pragma clang loop unroll(full)
  for (int cell = 0; cell < kCells; ++cell) {
    const int64_t at = first + cell / kOutputs * args.weight.rows + cell % kOutputs * tile.output_step;
    if (alone) {
      args.y[at] = z[cell];
      continue;
    }
    const float value = args.gate != nullptr ? z[cell] * args.gate[at] : z[cell];
    args.y[at] = args.accumulate ? args.y[at] + value : value;
  }
}

template <typename Weights, int kRows, int kOutputs>
__attribute__((noinline)) void ComputeTile(const MatmulArgs& args, const Tile& tile) {
  constexpr int kCells = kRows * kOutputs;
  constexpr bool kPrefetches = Weights::kStep == kLanes;
  F32 sums[kCells] = {};
  const int64_t inputs = args.weight.cols;
  const float* const x = tile.x;
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
        const F32 row = Load(x + (k + lane) * kRows + r * kLanes);
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
      const float* const at = x + k * kRows + r * kLanes;
      const F32 row = kRows == 1 ? LoadSome(at, inputs - k) : Load(at);
#pragma clang loop unroll(full)
      for (int o = 0; o < kOutputs; ++o) sums[r * kOutputs + o] = Fma(row, w[o], sums[r * kOutputs + o]);
    }
  }

  FinishTile<kOutputs>(args, tile, sums);
}

// A block of the inputs of a tile whose weights are a panel's. Sums in memory are the bits of sums in registers.
template <int kRows, int kOutputs>
__attribute__((noinline)) void ComputePanelTile(const MatmulArgs& args, const Tile& tile) {
  constexpr int kCells = kRows * kOutputs;
  F32 sums[kCells] = {};
  if (tile.begin > 0) {
#pragma clang loop unroll(full)
    for (int cell = 0; cell < kCells; ++cell) sums[cell] = tile.sums[cell];
  }
  const float* weights = PanelWeights::At(tile.weight, tile.weight_row, tile.begin);
  const float* x = tile.x + tile.begin * kRows;
  const Ahead ahead = *tile.ahead;
  const char* next = ahead.data;
  for (int64_t k = tile.begin; k < tile.end; k += kLanes, weights += kManyTileOutputs * kLanes, x += kRows * kLanes) {
    __builtin_prefetch(next, 0, 2);
    next += ahead.step;
    F32 w[kOutputs];
#pragma clang loop unroll(full)
    for (int o = 0; o < kOutputs; ++o) w[o] = Load(weights + o * kLanes);
#pragma clang loop unroll(full)
    for (int r = 0; r < kRows; ++r) {
      const F32 row = Load(x + r * kLanes);
#pragma clang loop unroll(full)
      for (int o = 0; o < kOutputs; ++o) sums[r * kOutputs + o] = Fma(row, w[o], sums[r * kOutputs + o]);
    }
  }
  tile.ahead->data = next;
  if (tile.end >= args.weight.cols) return FinishTile<kOutputs>(args, tile, sums);
#pragma clang loop unroll(full)
  for (int cell = 0; cell < kCells; ++cell) tile.sums[cell] = sums[cell];
}

#if defined(RWKV_HAS_PAIRS)
// As ComputeTile, rows and weights in pairs of bf16: per lane one sum, of both products of every step.
template <int kRows, int kOutputs>
__attribute__((noinline, target("avx512bf16"))) void ComputePairTile(const MatmulArgs& args, const Tile& tile) {
  constexpr int kCells = kRows * kOutputs;
  constexpr int64_t kStep = 2 * kLanes;
  F32 sums[kCells] = {};
  const int64_t inputs = args.weight.cols;
  const uint16_t* weight[kOutputs];
#pragma clang loop unroll(full)
  for (int o = 0; o < kOutputs; ++o) {
    weight[o] = static_cast<const uint16_t*>(tile.weight.data) + (tile.weight_row + o * tile.output_step) * inputs;
  }
  const float* x = tile.x;
  for (int64_t k = 0; k < inputs; k += kStep, x += kRows * kLanes) {
    const int64_t left = inputs - k;
    F32 w[kOutputs];
#pragma clang loop unroll(full)
    for (int o = 0; o < kOutputs; ++o) {
      w[o] = left >= kStep ? LoadPairs(weight[o] + k) : LoadPairsTail(weight[o] + k, left);
      if (kRows <= kFewTileRows) __builtin_prefetch(weight[o] + k + kPrefetch / 2);
    }
#pragma clang loop unroll(full)
    for (int r = 0; r < kRows; ++r) {
      const F32 row = Load(x + r * kLanes);
#pragma clang loop unroll(full)
      for (int o = 0; o < kOutputs; ++o) {
        F32& sum = sums[r * kOutputs + o];
        sum = (F32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)row, (__m512bh)w[o]);
      }
    }
  }
  FinishTile<kOutputs>(args, tile, sums);
}
#endif

// `rows` <= kMostRows, which is known only now, times kOutputs, or as many outputs as a tile of so many rows has.
template <typename Weights, int kMostRows, int kOutputs = 0>
RWKV_INLINE void ComputeTileOfRows(const MatmulArgs& args, int64_t rows, const Tile& tile) {
  if constexpr (kMostRows > 1) {
    if (rows < kMostRows) return ComputeTileOfRows<Weights, kMostRows - 1, kOutputs>(args, rows, tile);
  }
  constexpr int kTileOutputs = kOutputs == 0 ? TileOutputs(kMostRows) : kOutputs;
  if constexpr (std::is_same_v<Weights, PanelWeights>) {
    ComputePanelTile<kMostRows, kTileOutputs>(args, tile);
#if defined(RWKV_HAS_PAIRS)
  } else if constexpr (std::is_same_v<Weights, BFloat16Pairs>) {
    ComputePairTile<kMostRows, kTileOutputs>(args, tile);
#endif
  } else {
    ComputeTile<Weights, kMostRows, kTileOutputs>(args, tile);
  }
}

}  // namespace
}  // namespace rwkv::kernels::cpu
