// The processor's tiles (AMX): eight registers of 16 rows of 64 bytes, and a product of two of them. Only for the
// kernels_*.cc files. RWKV_EMULATED_TILES: the same in plain code, for tests on processors that have none.
// Source: Intel Architecture Instruction Set Extensions Reference, chapter 3 (AMX).
#pragma once

#include <cstdint>

#include "kernels/cpu/simd.h"

namespace rwkv::kernels::cpu {
namespace {

constexpr int64_t kTileBytes = 64;  // of a row; 16 rows are kLanes * kTileBytes

#if defined(RWKV_EMULATED_TILES)
#define RWKV_HAS_TILES

thread_local int8_t emulated_tiles[8][kLanes][kTileBytes];
thread_local bool tiles_are_ready = false;

struct ScopedTiles {
  ScopedTiles() { tiles_are_ready = true; }
  ~ScopedTiles() { tiles_are_ready = false; }
};

RWKV_INLINE void CheckTiles() {
  if (!tiles_are_ready) __builtin_trap();  // As the processor would.
}

template <int kTile>
RWKV_INLINE void ZeroTile() {
  CheckTiles();
  __builtin_memset(emulated_tiles[kTile], 0, sizeof emulated_tiles[kTile]);
}

template <int kTile>
RWKV_INLINE void LoadTile(const void* from) {
  CheckTiles();
  __builtin_memcpy(emulated_tiles[kTile], from, sizeof emulated_tiles[kTile]);
}

template <int kTile>
RWKV_INLINE void StoreTile(void* to) {
  CheckTiles();
  __builtin_memcpy(to, emulated_tiles[kTile], sizeof emulated_tiles[kTile]);
}

// sums[m][n] += a[m][4 k + i] * b[k][4 n + i], bytes with sign, sums of 32 bits.
template <int kSums, int kA, int kB>
RWKV_INLINE void MultiplyTiles() {
  CheckTiles();
  for (int m = 0; m < kLanes; ++m) {
    for (int n = 0; n < kLanes; ++n) {
      int32_t sum;
      __builtin_memcpy(&sum, &emulated_tiles[kSums][m][4 * n], sizeof sum);
      for (int k = 0; k < kLanes; ++k) {
        for (int i = 0; i < 4; ++i) sum += emulated_tiles[kA][m][4 * k + i] * emulated_tiles[kB][k][4 * n + i];
      }
      __builtin_memcpy(&emulated_tiles[kSums][m][4 * n], &sum, sizeof sum);
    }
  }
}

#elif defined(__AMXINT8__) || defined(__AMX_INT8__)
#define RWKV_HAS_TILES

// Tiles of this thread, all of full size, while it lives. Configured anew for each part of a product: what is released
// need not be saved when the thread is switched.
struct ScopedTiles {
  ScopedTiles() {
    struct alignas(64) {
      uint8_t palette = 1;
      uint8_t start_row = 0;
      uint8_t reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    static_assert(sizeof config == 64);
    _tile_loadconfig(&config);
  }
  ~ScopedTiles() { _tile_release(); }
};

template <int kTile>
RWKV_INLINE void ZeroTile() {
  _tile_zero(kTile);
}

template <int kTile>
RWKV_INLINE void LoadTile(const void* from) {
  _tile_loadd(kTile, from, kTileBytes);
}

template <int kTile>
RWKV_INLINE void StoreTile(void* to) {
  _tile_stored(kTile, to, kTileBytes);
}

// sums[m][n] += a[m][4 k + i] * b[k][4 n + i], bytes with sign, sums of 32 bits.
template <int kSums, int kA, int kB>
RWKV_INLINE void MultiplyTiles() {
  _tile_dpbssd(kSums, kA, kB);
}

#endif

}  // namespace
}  // namespace rwkv::kernels::cpu
