// One row times a matrix of whole numbers: the lanes are inputs, so that an output's codes are multiplied where they
// lie in memory and nothing is transposed but sums. For processors that multiply bytes and add them up (VNNI). The sums
// are exact, so the bits are those of integer_kernels.h. Only for the kernels_*.cc files.
#pragma once

#include <cstdint>

#include "kernels/cpu/epilogue.h"
#include "kernels/cpu/integer_codes.h"
#include "kernels/cpu/integer_rows.h"
#include "kernels/cpu/integer_tile.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cpu/simd.h"

namespace rwkv::kernels::cpu {
namespace {

#if defined(__AVX512VNNI__)
constexpr bool kHasByteDots = true;

// Per lane sum + the products of four bytes without and four with sign.
RWKV_INLINE I32 AddFours(I32 sum, U32 codes, U32 inputs) {
  return (I32)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)inputs);
}
#else
constexpr bool kHasByteDots = false;

RWKV_INLINE I32 AddFours(I32 sum, U32, U32) { return sum; }
#endif

// The row, in units of 64 bytes of codes: an input is 256 * high + low, two bytes with sign (fixed_point.h). Groups
// that the last unit has too much are zero.
template <typename Codes, int kDwords>
struct DotRow {
  static constexpr int kGroups = kLanes / kDwords;  // in a unit
  static constexpr int64_t kGroupBytes = 4 * kDwords;

  DotRow(const MatrixView& matrix, void* memory)
      : group(kGroupBytes * Codes::kByteVectors),
        groups((matrix.cols + group - 1) / group),
        units((groups + kGroups - 1) / kGroups),
        memory(static_cast<int8_t*>(memory)) {}

  // [unit][high, low][vector][64]
  int8_t* bytes(int64_t unit) const { return memory + unit * 2 * Codes::kByteVectors * 64; }
  float* scales() const { return reinterpret_cast<float*>(bytes(units)); }
  float* sums() const { return scales() + groups; }
  int32_t* excess() const { return reinterpret_cast<int32_t*>(sums() + groups); }
  int64_t Bytes() const { return (reinterpret_cast<int8_t*>(excess() + groups) - memory + 63) / 64 * 64; }

  int64_t group;
  int64_t groups;
  int64_t units;
  int8_t* memory;
};

template <typename Codes, int kDwords>
RWKV_INLINE void FixDotRow(const MatmulArgs& args) {
  using Row = DotRow<Codes, kDwords>;
  const Row row(args.weight, args.prepared);
  for (int64_t g = 0; g < row.units * Row::kGroups; ++g) {
    const int64_t left = args.weight.cols - g * row.group;
    const FixedGroup group =
        FixGroup(args.x + (left > 0 ? g * row.group : 0), left < row.group ? left : row.group, row.group);
    int8_t* const high = row.bytes(g / Row::kGroups) + g % Row::kGroups * Row::kGroupBytes;
    int8_t* const low = high + Codes::kByteVectors * 64;
    const auto store = [&](int64_t at, I32 fixed) {
      const I32 highs = (fixed + 128) >> 8;
      const I8 high_bytes = __builtin_convertvector(highs, I8);
      const I8 low_bytes = __builtin_convertvector(fixed - (highs << 8), I8);
      __builtin_memcpy(high + at, &high_bytes, sizeof high_bytes);
      __builtin_memcpy(low + at, &low_bytes, sizeof low_bytes);
    };
    for (int64_t i = 0; i < row.group / kLanes; i += 2) {
      const bool apart = Codes::kByteVectors == 2;
      store(apart ? i * 8 : i * 16, Codes::First(group.fixed[i], group.fixed[i + 1]));
      store(apart ? i * 8 + 64 : i * 16 + 16, Codes::Second(group.fixed[i], group.fixed[i + 1]));
    }
    if (left <= 0) continue;
    row.scales()[g] = group.scale;
    row.sums()[g] = static_cast<float>(group.sum) * group.scale;
    row.excess()[g] = Codes::kByteCentre * group.sum;
  }
}

// 64 bytes of codes from `from` on: kGroups groups, group_bytes from one to the next.
template <int kGroups>
RWKV_INLINE U32 LoadUnit(const uint8_t* from, int64_t group_bytes) {
  typedef uint32_t U32Unaligned __attribute__((vector_size(64), aligned(1), may_alias));
  typedef uint32_t U32x8Unaligned __attribute__((vector_size(32), aligned(1), may_alias));
  if (kGroups == 1 || group_bytes == 64 / kGroups) return *reinterpret_cast<const U32Unaligned*>(from);
  if (kGroups == 2) {
    const U32x8 first = *reinterpret_cast<const U32x8Unaligned*>(from);
    const U32x8 second = *reinterpret_cast<const U32x8Unaligned*>(from + group_bytes);
    return __builtin_shufflevector(first, second, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }
  const auto quarter = [&](int i) -> U32x4 { return *reinterpret_cast<const U32x4Unaligned*>(from + i * group_bytes); };
  const U32x8 low = __builtin_shufflevector(quarter(0), quarter(1), 0, 1, 2, 3, 4, 5, 6, 7);
  const U32x8 high = __builtin_shufflevector(quarter(2), quarter(3), 0, 1, 2, 3, 4, 5, 6, 7);
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

// The `groups` last groups of an output and zeros, without gaps.
template <int kGroups>
RWKV_INLINE const uint8_t* CopyUnit(const uint8_t* from, const IntegerMatrix& matrix, int64_t groups, uint8_t* to) {
  for (int64_t g = 0; g < kGroups; ++g) {
    const int64_t whole = 64 / kGroups;
    const int64_t count = g < groups - 1 ? whole : g == groups - 1 ? matrix.last_bytes : 0;
    for (int64_t j = 0; j < whole; ++j) to[g * whole + j] = j < count ? from[g * matrix.group_bytes + j] : 0;
  }
  return to;
}

// Of four vectors the sums over their four quarters: {a, b, c, d} of each quarter.
RWKV_INLINE I32 SumQuarters(I32 a, I32 b, I32 c, I32 d) {
  const auto both = [](I32 u, I32 v) {
    return __builtin_shufflevector(u, v, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
           __builtin_shufflevector(u, v, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  };
  const I32 ab = both(a, b), cd = both(c, d);
  return __builtin_shufflevector(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
         __builtin_shufflevector(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}

RWKV_INLINE I32 EvenQuarters(I32 a, I32 b) {
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
}
RWKV_INLINE I32 OddQuarters(I32 a, I32 b) {
  return __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}

// sums[g], lane i: the sum of the lanes of v[i] that are group g's, which are 16 / kGroups.
template <int kGroups>
RWKV_INLINE void SumLanes(const I32* v, I32* sums) {
  I32 quarters[4];
#pragma clang loop unroll(full)
  for (int i = 0; i < 4; ++i) quarters[i] = SumQuarters(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
  const I32 even01 = EvenQuarters(quarters[0], quarters[1]), odd01 = OddQuarters(quarters[0], quarters[1]);
  const I32 even23 = EvenQuarters(quarters[2], quarters[3]), odd23 = OddQuarters(quarters[2], quarters[3]);
  if constexpr (kGroups == 4) {
    sums[0] = EvenQuarters(even01, even23);
    sums[1] = EvenQuarters(odd01, odd23);
    sums[2] = OddQuarters(even01, even23);
    sums[3] = OddQuarters(odd01, odd23);
  } else {
    const I32 both01 = even01 + odd01, both23 = even23 + odd23;
    const I32 even = EvenQuarters(both01, both23), odd = OddQuarters(both01, both23);
    if constexpr (kGroups == 2) {
      sums[0] = even;
      sums[1] = odd;
    } else {
      sums[0] = even + odd;
    }
  }
}

// The row times the outputs first + i * step.
template <typename Codes, int kDwords>
__attribute__((noinline)) void ComputeDots(const MatmulArgs& args, const IntegerMatrix& matrix, int64_t first,
                                           int64_t step, uint16_t* halves) {
  using Row = DotRow<Codes, kDwords>;
  constexpr int kGroups = Row::kGroups;
  constexpr int kVectors = Codes::kByteVectors;
  const IntegerTile tile(args, matrix, first, step, halves);
  const Row row(args.weight, args.prepared);
  F32 sums = {};
  for (int64_t unit = 0; unit < row.units; ++unit) {
    const int64_t offset = unit * kGroups * matrix.group_bytes;
    const int64_t groups = matrix.groups - unit * kGroups;
    const bool whole = groups > kGroups || (groups == kGroups && matrix.last_bytes == Row::kGroupBytes);
    const U32* const inputs = reinterpret_cast<const U32*>(row.bytes(unit));
    alignas(64) uint8_t copies[kLanes][64];
    const uint8_t* ends[kLanes];
    if (!whole) {
      for (int i = 0; i < kLanes; ++i) {
        ends[i] = CopyUnit<kGroups>(tile.rows[i] + offset, matrix, groups, copies[i]) - offset;
      }
    }
    const uint8_t* const* const from = whole ? tile.rows : ends;
    const int64_t group_bytes = whole ? matrix.group_bytes : Row::kGroupBytes;
    I32 products[kLanes];
#pragma clang loop unroll(full)
    for (int i = 0; i < kLanes; ++i) {
      const U32 codes = LoadUnit<kGroups>(from[i] + offset, group_bytes);
      __builtin_prefetch(tile.rows[i] + offset + kPrefetch / 2);  // Sixteen streams: farther is too much for the cache.
      const U32 bytes[2] = {Codes::template Bytes<0>(codes), Codes::template Bytes<kVectors - 1>(codes)};
      I32 sum = {};
#pragma clang loop unroll(full)
      for (int v = 0; v < kVectors; ++v) sum = AddFours(sum, bytes[v], inputs[v]);
      sum = sum << 8;
#pragma clang loop unroll(full)
      for (int v = 0; v < kVectors; ++v) sum = AddFours(sum, bytes[v], inputs[kVectors + v]);
      products[i] = sum;
    }
    I32 group_sums[kGroups];
    SumLanes<kGroups>(products, group_sums);
#pragma clang loop unroll(full)
    for (int i = 0; i < kGroups; ++i) {
      if (i >= groups) break;
      const int64_t g = unit * kGroups + i;
      sums = AddGroup(sums, group_sums[i] - row.excess()[g], row.scales()[g], row.sums()[g], tile.scales, g);
    }
  }
  Finish(args, 0, first, step, sums);
}

}  // namespace
}  // namespace rwkv::kernels::cpu
