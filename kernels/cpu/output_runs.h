// Sums of 16 rows times 16 runs of neighbouring outputs, of large matrices with few rows. Each tile's outputs are far
// apart: stored one by one each would be a line of another page, and at powers of two all meet in the same sets of the
// caches. Only for the kernels_*.cc files.
#pragma once

#include <cstdint>

#include "kernels/cpu/epilogue.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/tiles.h"

namespace rwkv::kernels::cpu {
namespace {

#if defined(RWKV_HAS_TILES)

constexpr int64_t kMostTilesOfRun = kLanes;
constexpr int64_t kFewestTilesOfRuns = 8 * kLanes;  // With fewer tiles of outputs in all runs would be short.

// Of `count` tiles that follow each other, how many make one run: as few parts as leave several for every thread.
RWKV_INLINE int64_t TilesOfRun(int64_t count) {
  const int64_t tiles = count / kLanes;
  return tiles < 1 ? 1 : tiles < kMostTilesOfRun ? tiles : kMostTilesOfRun;
}

struct OutputRuns {
  F32 sums[kLanes][kMostTilesOfRun];  // [run][output of the run], a lane a row
};

// What follows the sums of the rows first_row .. first_row + rows - 1: run i has the outputs first + i * step and on,
// `count` of them.
RWKV_INLINE void FinishRuns(const MatmulArgs& args, const OutputRuns& runs, int64_t first_row, int64_t rows,
                            int64_t first, int64_t step, int64_t count) {
  for (int64_t run = 0; run < kLanes; ++run) {
    F32 sums[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) sums[i] = i < count ? runs.sums[run][i] : F32{};
    Transpose(sums);
    for (int64_t i = 0; i < rows; ++i) FinishRun(args, first_row + i, first + run * step, count, sums[i]);
  }
}

#endif

}  // namespace
}  // namespace rwkv::kernels::cpu
