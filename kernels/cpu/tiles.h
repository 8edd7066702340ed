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
RWKV_INLINE void LoadTile(const void* from, int64_t stride = kTileBytes) {
  CheckTiles();
  for (int64_t i = 0; i < kLanes; ++i) {
    __builtin_memcpy(emulated_tiles[kTile][i], static_cast<const char*>(from) + i * stride, kTileBytes);
  }
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

// sums[m][n] += a[m][2 k + i] * b[k][2 n + i] of bf16 as bf16_tiles.h says; subnormal numbers are zeros.
template <int kSums, int kA, int kB>
RWKV_INLINE void MultiplyBf16Tiles() {
  CheckTiles();
  const auto flush = [](F32 v) { return Select((I32)(((U32)v & 0x7f800000u) != 0), v, F32{}); };
  F32 even_rows[kLanes], odd_rows[kLanes];
  for (int k = 0; k < kLanes; ++k) {
    U32 pairs;
    __builtin_memcpy(&pairs, emulated_tiles[kB][k], sizeof pairs);
    even_rows[k] = flush((F32)(pairs << 16));
    odd_rows[k] = flush((F32)(pairs & 0xffff0000u));
  }
  for (int m = 0; m < kLanes; ++m) {
    U32 pairs;
    __builtin_memcpy(&pairs, emulated_tiles[kA][m], sizeof pairs);
    const F32 even_weights = flush((F32)(pairs << 16)), odd_weights = flush((F32)(pairs & 0xffff0000u));
    F32 even = {}, odd = {}, sum;
    for (int k = 0; k < kLanes; ++k) {
      even = flush(Fma(Broadcast(even_weights[k]), even_rows[k], even));
      odd = flush(Fma(Broadcast(odd_weights[k]), odd_rows[k], odd));
    }
    __builtin_memcpy(&sum, emulated_tiles[kSums][m], sizeof sum);
    sum = flush(flush(sum) + flush(even + odd));
    __builtin_memcpy(emulated_tiles[kSums][m], &sum, sizeof sum);
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
RWKV_INLINE void LoadTile(const void* from, int64_t stride = kTileBytes) {
  _tile_loadd(kTile, from, stride);
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

// sums[m][n] += a[m][2 k + i] * b[k][2 n + i] of bf16 as bf16_tiles.h says; subnormal numbers are zeros.
template <int kSums, int kA, int kB>
RWKV_INLINE void MultiplyBf16Tiles() {
  _tile_dpbf16ps(kSums, kA, kB);
}

#endif

#if defined(RWKV_HAS_TILES)
// v[i][j] becomes v[j][i].
RWKV_INLINE void Transpose(F32* v) {
#pragma clang loop unroll(full)
  for (int stage = 0; stage < 4; ++stage) {
    F32 next[kLanes];
#pragma clang loop unroll(full)
    for (int i = 0; i < kLanes / 2; ++i) {
      const F32 a = v[i], b = v[i + kLanes / 2];
      next[2 * i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      next[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
#pragma clang loop unroll(full)
    for (int i = 0; i < kLanes; ++i) v[i] = next[i];
  }
}

// The first kCount tiles.
template <int kCount>
RWKV_INLINE void ZeroTiles() {
  if constexpr (kCount > 0) {
    ZeroTiles<kCount - 1>();
    ZeroTile<kCount - 1>();
  }
}

// One behind the other.
template <int kCount>
RWKV_INLINE void StoreTiles(char* to) {
  if constexpr (kCount > 0) {
    StoreTiles<kCount - 1>(to);
    StoreTile<kCount - 1>(to + (kCount - 1) * kLanes * kTileBytes);
  }
}
#endif

}  // namespace
}  // namespace rwkv::kernels::cpu
