// Vectors of 16 floats in clang's vector extension, lowered to whatever the including file is compiled for: one
// register with AVX-512, two with AVX, four with SSE2. Sixteen lanes everywhere, one tree of sums: builds that have
// fused multiply-add give the same bits. Only for the kernels_*.cc files: everything here has internal linkage and
// calls nothing of the standard library, so that no function compiled for a newer processor can be the copy that the
// linker keeps for everybody.
#pragma once

#include <cstdint>

#include "kernels/base/matrix.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__) && !defined(RWKV_PORTABLE_KERNELS)
#define RWKV_NEON
#include <arm_neon.h>
#endif

#define RWKV_INLINE __attribute__((always_inline)) inline
#define RWKV_INLINE_LAMBDA __attribute__((always_inline))  // After the parameters.

namespace rwkv::kernels::cpu {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kPrefetch = 512;  // Bytes ahead of where a stream of weights is read.

typedef float F32 __attribute__((vector_size(64)));
typedef uint32_t U32 __attribute__((vector_size(64)));
typedef int32_t I32 __attribute__((vector_size(64)));
typedef uint16_t U16 __attribute__((vector_size(32)));
typedef float F32x8 __attribute__((vector_size(32)));
typedef float F32x4 __attribute__((vector_size(16)));
typedef float F32x4Unaligned __attribute__((vector_size(16), aligned(4), may_alias));
typedef float F32Unaligned __attribute__((vector_size(64), aligned(4), may_alias));
typedef int8_t I8 __attribute__((vector_size(16)));
typedef uint8_t U8 __attribute__((vector_size(16)));
typedef uint8_t U8x8 __attribute__((vector_size(8)));
typedef uint16_t U16Unaligned __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint8_t U8Unaligned __attribute__((vector_size(16), aligned(1), may_alias));
typedef int8_t I8Unaligned __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint8_t U8x8Unaligned __attribute__((vector_size(8), aligned(1), may_alias));

RWKV_INLINE F32 Broadcast(float value) {
  return F32{value, value, value, value, value, value, value, value,
             value, value, value, value, value, value, value, value};
}

RWKV_INLINE F32 Load(const float* p) { return *reinterpret_cast<const F32Unaligned*>(p); }
RWKV_INLINE void Store(float* p, F32 v) { *reinterpret_cast<F32Unaligned*>(p) = v; }
RWKV_INLINE F32x4 LoadFour(const float* p) { return *reinterpret_cast<const F32x4Unaligned*>(p); }
RWKV_INLINE void StoreFour(float* p, F32x4 v) { *reinterpret_cast<F32x4Unaligned*>(p) = v; }

// The first `count` < 16 elements; the other lanes are zero.
RWKV_INLINE F32 LoadTail(const float* p, int64_t count) {
#if defined(__AVX512F__)
  return (F32)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1u), p);
#else
  F32 v = {};
  for (int64_t i = 0; i < count; ++i) v[i] = p[i];
  return v;
#endif
}

RWKV_INLINE void StoreTail(float* p, F32 v, int64_t count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1u), (__m512)v);
#else
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
#endif
}

RWKV_INLINE F32 LoadSome(const float* p, int64_t count) { return count >= kLanes ? Load(p) : LoadTail(p, count); }
RWKV_INLINE void StoreSome(float* p, F32 v, int64_t count) {
  if (count >= kLanes) {
    Store(p, v);
  } else {
    StoreTail(p, v, count);
  }
}

// Per lane mask ? a : b, where a mask is the result of comparing vectors.
RWKV_INLINE F32 Select(I32 mask, F32 a, F32 b) { return (F32)(((U32)mask & (U32)a) | (~(U32)mask & (U32)b)); }

// Zero in the lanes from `count` on.
RWKV_INLINE F32 KeepFirst(F32 v, int64_t count) {
  constexpr I32 kLane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return Select(kLane < static_cast<int32_t>(count < kLanes ? count : kLanes), v, F32{});
}

RWKV_INLINE F32 Abs(F32 v) { return (F32)((U32)v & 0x7fffffffu); }

RWKV_INLINE F32x8 LowHalf(F32 v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7); }
RWKV_INLINE F32x8 HighHalf(F32 v) { return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15); }
RWKV_INLINE F32 Combine(F32x8 low, F32x8 high) {
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

// a * b + c: rounded once where the hardware can, twice in the portable build (which is a numeric family of its own).
RWKV_INLINE F32 Fma(F32 a, F32 b, F32 c) {
#if defined(__AVX512F__)
  return (F32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return Combine((F32x8)_mm256_fmadd_ps((__m256)LowHalf(a), (__m256)LowHalf(b), (__m256)LowHalf(c)),
                 (F32x8)_mm256_fmadd_ps((__m256)HighHalf(a), (__m256)HighHalf(b), (__m256)HighHalf(c)));
#elif defined(RWKV_NEON)
  union Quarters {
    F32 all;
    float32x4_t each[4];
  };
  const Quarters as = {a}, bs = {b};
  Quarters sums = {c};
#pragma clang loop unroll(full)
  for (int i = 0; i < 4; ++i) sums.each[i] = vfmaq_f32(sums.each[i], as.each[i], bs.each[i]);
  return sums.all;
#else
  return a * b + c;
#endif
}

// The tree of every sum over lanes: lane i with i + 8, then i + 4, then i + 2, then i + 1.
RWKV_INLINE F32x4 SumToFour(F32 v) {
  const F32x8 eight = LowHalf(v) + HighHalf(v);
  return __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
}

RWKV_INLINE float Sum(F32 v) {
  const F32x4 four = SumToFour(v);
  const F32x4 two = four + __builtin_shufflevector(four, four, 2, 3, 2, 3);
  return two[0] + two[1];
}

// {Sum(a), Sum(b), Sum(c), Sum(d)}, the same bits at a third of the cost.
RWKV_INLINE F32x4 Sum4(F32 a, F32 b, F32 c, F32 d) {
  const F32x4 a4 = SumToFour(a);
  const F32x4 b4 = SumToFour(b);
  const F32x4 c4 = SumToFour(c);
  const F32x4 d4 = SumToFour(d);
  const F32x4 ab = __builtin_shufflevector(a4, b4, 0, 1, 4, 5) + __builtin_shufflevector(a4, b4, 2, 3, 6, 7);
  const F32x4 cd = __builtin_shufflevector(c4, d4, 0, 1, 4, 5) + __builtin_shufflevector(c4, d4, 2, 3, 6, 7);
  return __builtin_shufflevector(ab, cd, 0, 2, 4, 6) + __builtin_shufflevector(ab, cd, 1, 3, 5, 7);
}

// {Sum(v[0]), ..., Sum(v[15])}, the same bits: each level halves the lanes of two vectors and puts them into one.
RWKV_INLINE F32 Sum16(const F32* v) {
  F32 by8[8], by4[4], by2[2];
#pragma clang loop unroll(full)
  for (int i = 0; i < 8; ++i) {
    const F32 a = v[2 * i], b = v[2 * i + 1];
    by8[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
             __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
#pragma clang loop unroll(full)
  for (int i = 0; i < 4; ++i) {
    const F32 a = by8[2 * i], b = by8[2 * i + 1];
    by4[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
             __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  }
#pragma clang loop unroll(full)
  for (int i = 0; i < 2; ++i) {
    const F32 a = by4[2 * i], b = by4[2 * i + 1];
    by2[i] = __builtin_shufflevector(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
             __builtin_shufflevector(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
  }
  return __builtin_shufflevector(by2[0], by2[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         __builtin_shufflevector(by2[0], by2[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

// How the weights of a matrix are widened, exactly, for each way to store them. A Row is where one row's weights are; a
// Group is what kStep columns from a multiple of kStep on have in common. Load() takes a multiple of 16 as `col`;
// the lanes from `count` on are zero in LoadTail().
struct Float32Weights {
  static constexpr int64_t kStep = kLanes;
  struct Row {
    const float* weights;
  };
  struct Group {};
  static RWKV_INLINE Row RowOf(const MatrixView& matrix, int64_t row) {
    return {static_cast<const float*>(matrix.data) + row * matrix.cols};
  }
  static RWKV_INLINE Group GroupOf(Row, int64_t) { return {}; }
  static RWKV_INLINE void Prefetch(Row row, int64_t col) { __builtin_prefetch(row.weights + col + kPrefetch / 4); }
  static RWKV_INLINE F32 Load(Row row, Group, int64_t col) { return cpu::Load(row.weights + col); }
  static RWKV_INLINE F32 LoadTail(Row row, Group, int64_t col, int64_t count) {
    return cpu::LoadTail(row.weights + col, count);
  }
};

RWKV_INLINE F32 WidenBFloat16(U16 v) { return (F32)(__builtin_convertvector(v, U32) << 16); }

RWKV_INLINE F32 WidenHalf(U16 v) {
#if defined(__AVX512F__)
  return (F32)_mm512_cvtph_ps((__m256i)v);
#elif defined(__F16C__)
  return Combine((F32x8)_mm256_cvtph_ps(_mm256_castsi256_si128((__m256i)v)),
                 (F32x8)_mm256_cvtph_ps(_mm256_extracti128_si256((__m256i)v, 1)));
#elif defined(RWKV_NEON)
  typedef __fp16 Halves __attribute__((vector_size(32)));
  return __builtin_convertvector((Halves)v, F32);
#else
  const U32 half = __builtin_convertvector(v, U32);
  const U32 magnitude = (half & 0x7fffu) << 13;
  // The exponent moved by a product, which is exact and makes a half subnormal a normal float.
  const U32 finite = (U32)((F32)magnitude * 0x1p112f);
  const U32 special = magnitude | 0x7f800000u;  // infinity and NaN
  const U32 is_special = (U32)(magnitude >= 0x0f800000u);
  return (F32)(((half & 0x8000u) << 16) | (is_special & special) | (~is_special & finite));
#endif
}

template <F32 (*kWiden)(U16)>
struct SixteenBitWeights {
  static constexpr int64_t kStep = kLanes;
  struct Row {
    const uint16_t* weights;
  };
  struct Group {};
  static RWKV_INLINE Row RowOf(const MatrixView& matrix, int64_t row) {
    return {static_cast<const uint16_t*>(matrix.data) + row * matrix.cols};
  }
  static RWKV_INLINE Group GroupOf(Row, int64_t) { return {}; }
  static RWKV_INLINE void Prefetch(Row row, int64_t col) { __builtin_prefetch(row.weights + col + kPrefetch / 2); }
  static RWKV_INLINE F32 Load(Row row, Group, int64_t col) {
    return kWiden(*reinterpret_cast<const U16Unaligned*>(row.weights + col));
  }
  static RWKV_INLINE F32 LoadTail(Row row, Group, int64_t col, int64_t count) {
    U16 v = {};
    for (int64_t i = 0; i < count; ++i) v[i] = row.weights[col + i];
    return kWiden(v);
  }
};
using BFloat16Weights = SixteenBitWeights<WidenBFloat16>;
using Float16Weights = SixteenBitWeights<WidenHalf>;

// Sixteen codes as floats; the lanes from `count` on are undefined.
struct EightBitCodes {
  static RWKV_INLINE const uint8_t* RowOf(const MatrixView& matrix, int64_t row) {
    return static_cast<const uint8_t*>(matrix.data) + row * matrix.cols;
  }
  static RWKV_INLINE F32 Load(const uint8_t* row, int64_t col) {
    return __builtin_convertvector(*reinterpret_cast<const I8Unaligned*>(row + col), F32);
  }
  static RWKV_INLINE F32 LoadTail(const uint8_t* row, int64_t col, int64_t count) {
    I8 v = {};
    for (int64_t i = 0; i < count; ++i) v[i] = static_cast<int8_t>(row[col + i]);
    return __builtin_convertvector(v, F32);
  }
};

struct FourBitCodes {
  static RWKV_INLINE const uint8_t* RowOf(const MatrixView& matrix, int64_t row) {
    return static_cast<const uint8_t*>(matrix.data) + row * ((matrix.cols + 1) / 2);
  }
  static RWKV_INLINE F32 Widen(U8x8 pairs) {
    const U8x8 even = pairs & 0xf;
    const U8x8 odd = pairs >> 4;
    const U8 codes = __builtin_shufflevector(even, odd, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
    return __builtin_convertvector(__builtin_convertvector(codes, I32), F32);
  }
  static RWKV_INLINE F32 Load(const uint8_t* row, int64_t col) {
    return Widen(*reinterpret_cast<const U8x8Unaligned*>(row + col / 2));
  }
  static RWKV_INLINE F32 LoadTail(const uint8_t* row, int64_t col, int64_t count) {
    U8x8 v = {};
    for (int64_t i = 0; i < (count + 1) / 2; ++i) v[i] = row[col / 2 + i];
    return Widen(v);
  }
};

// weight = code * scale + minimum. The product is exact, so fused or not the sum is the same.
template <typename Codes>
struct QuantizedWeights {
  static constexpr int64_t kStep = 32;  // Divides both sizes of groups.
  struct Row {
    const uint8_t* codes;
    const uint16_t* scales;
    const uint16_t* minimums;  // or null
    int64_t group;             // 32 or 64
  };
  struct Group {
    F32 scale;
    F32 minimum;
  };
  static RWKV_INLINE Row RowOf(const MatrixView& matrix, int64_t row) {
    const int64_t first = row * (matrix.group == 32 ? (matrix.cols + 31) / 32 : (matrix.cols + 63) / 64);
    return {Codes::RowOf(matrix, row), matrix.scales + first,
            matrix.minimums != nullptr ? matrix.minimums + first : nullptr, matrix.group};
  }
  static RWKV_INLINE Group GroupOf(Row row, int64_t col) {
    const int64_t group = row.group == 32 ? col / 32 : col / 64;
    return {WidenHalf(U16{} + row.scales[group]),
            row.minimums != nullptr ? WidenHalf(U16{} + row.minimums[group]) : F32{}};
  }
  static RWKV_INLINE F32 Load(Row row, Group group, int64_t col) {
    return Fma(Codes::Load(row.codes, col), group.scale, group.minimum);
  }
  static RWKV_INLINE F32 LoadTail(Row row, Group group, int64_t col, int64_t count) {
    return KeepFirst(Fma(Codes::LoadTail(row.codes, col, count), group.scale, group.minimum), count);
  }
};
using Int8Weights = QuantizedWeights<EightBitCodes>;
using Int4Weights = QuantizedWeights<FourBitCodes>;

RWKV_INLINE uint16_t LoadHalfBits(const uint8_t* p) { return static_cast<uint16_t>(p[0] | p[1] << 8); }
RWKV_INLINE F32 BroadcastHalf(const uint8_t* p) { return WidenHalf(U16{} + LoadHalfBits(p)); }
RWKV_INLINE float HalfAt(const uint8_t* p) { return BroadcastHalf(p)[0]; }
RWKV_INLINE U8 LoadBytes(const uint8_t* p) { return *reinterpret_cast<const U8Unaligned*>(p); }
RWKV_INLINE F32 WidenCodes(U8 codes) { return __builtin_convertvector(__builtin_convertvector(codes, I32), F32); }

// ggml's blocks, as the file has them: kernels/base/ggml_blocks.h. Rows are whole blocks, so that there is no tail.
template <typename Block>
struct GgmlWeights {
  static constexpr int64_t kStep = 32;
  using Row = const uint8_t*;
  using Group = typename Block::Group;
  static RWKV_INLINE Row RowOf(const MatrixView& matrix, int64_t row) {
    return static_cast<const uint8_t*>(matrix.data) + row * (matrix.cols / Block::kWeights) * Block::kBytes;
  }
  static RWKV_INLINE Group GroupOf(Row row, int64_t col) {
    return Block::GroupOf(row + col / Block::kWeights * Block::kBytes, col % Block::kWeights / 32);
  }
  static RWKV_INLINE F32 Load(Row, const Group& group, int64_t col) { return Block::Load(group, (col & 16) != 0); }
  static RWKV_INLINE F32 LoadTail(Row, const Group& group, int64_t col, int64_t count) {
    return KeepFirst(Block::Load(group, (col & 16) != 0), count);
  }
};

// Q8_0.
struct EightBitBlock {
  static constexpr int64_t kWeights = 32;
  static constexpr int64_t kBytes = 34;
  struct Group {
    const uint8_t* codes;
    F32 scale;
  };
  static RWKV_INLINE Group GroupOf(const uint8_t* block, int64_t) { return {block + 2, BroadcastHalf(block)}; }
  static RWKV_INLINE F32 Load(const Group& group, bool second) {
    return Fma(EightBitCodes::Load(group.codes, second ? 16 : 0), group.scale,
               F32{});  // Never -0, as in ggml_blocks.cc.
  }
};

// Q4_0, Q4_1, Q5_0 and Q5_1. The fifth bits of 16 weights are 16 bits of a number.
template <bool kHasMinimum, bool kHasFifthBits>
struct SmallBlock {
  static constexpr int64_t kWeights = 32;
  static constexpr int64_t kFifthAt = kHasMinimum ? 4 : 2;
  static constexpr int64_t kCodesAt = kFifthAt + (kHasFifthBits ? 4 : 0);
  static constexpr int64_t kBytes = kCodesAt + 16;
  static constexpr float kCentre = kHasFifthBits ? 16.0f : 8.0f;
  struct Group {
    const uint8_t* block;
    F32 scale;
    F32 minimum;
  };
  static RWKV_INLINE Group GroupOf(const uint8_t* block, int64_t) {
    return {block, BroadcastHalf(block), kHasMinimum ? BroadcastHalf(block + 2) : F32{}};
  }
  static RWKV_INLINE F32 Load(const Group& group, bool second) {
    const U8 pairs = LoadBytes(group.block + kCodesAt);
    F32 codes = WidenCodes(second ? pairs >> 4 : pairs & 0xf);
    if (kHasFifthBits) {
      constexpr U32 kBit = {1,      1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                            1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
      const U32 bits = U32{} + LoadHalfBits(group.block + kFifthAt + (second ? 2 : 0));
      codes += Select((bits & kBit) != 0, Broadcast(16.0f), F32{});
    }
    if (!kHasMinimum) codes -= kCentre;
    return Fma(codes, group.scale, group.minimum);
  }
};

// Q4_K and Q5_K. Bit j of the fifth bits' byte i belongs to weight i of the j-th 32.
template <bool kHasFifthBits>
struct LargeBlock {
  static constexpr int64_t kWeights = 256;
  static constexpr int64_t kBytes = kHasFifthBits ? 176 : 144;
  struct Group {
    const uint8_t* pairs;
    const uint8_t* fifth;
    bool high;    // Which half of the bytes.
    uint8_t bit;  // Of the fifth bits.
    F32 scale;
    F32 minimum;
  };
  static RWKV_INLINE Group GroupOf(const uint8_t* block, int64_t j) {
    const uint8_t* const packed = block + 4;
    const int scale = j < 4 ? packed[j] & 63 : (packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4;
    const int minimum = j < 4 ? packed[j + 4] & 63 : (packed[j + 4] >> 4) | (packed[j] >> 6) << 4;
    return {block + (kHasFifthBits ? 48 : 16) + j / 2 * 32,
            block + 16,
            j % 2 != 0,
            static_cast<uint8_t>(1 << j),
            Broadcast(HalfAt(block) * static_cast<float>(scale)),
            Broadcast(-(HalfAt(block + 2) * static_cast<float>(minimum)))};
  }
  static RWKV_INLINE F32 Load(const Group& group, bool second) {
    const U8 pairs = LoadBytes(group.pairs + (second ? 16 : 0));
    U8 codes = group.high ? pairs >> 4 : pairs & 0xf;
    if (kHasFifthBits) {
      codes |= (U8)((LoadBytes(group.fifth + (second ? 16 : 0)) & group.bit) != 0) & 16;
    }
    return Fma(WidenCodes(codes), group.scale, group.minimum);
  }
};

// Q6_K: two scales for 32 weights; the two high bits of four weights share a byte.
struct SixBitBlock {
  static constexpr int64_t kWeights = 256;
  static constexpr int64_t kBytes = 210;
  struct Group {
    const uint8_t* low;
    const uint8_t* high;
    int quarter;
    F32 scales[2];
  };
  static RWKV_INLINE Group GroupOf(const uint8_t* block, int64_t j) {
    const float d = HalfAt(block + 208);
    const auto scale = [&](int64_t i) {
      return Broadcast(d * static_cast<float>(static_cast<int8_t>(block[192 + i])));
    };
    return {block + j / 4 * 64 + j % 2 * 32,
            block + 128 + j / 4 * 32,
            static_cast<int>(j % 4),
            {scale(2 * j), scale(2 * j + 1)}};
  }
  static RWKV_INLINE F32 Load(const Group& group, bool second) {
    const U8 pairs = LoadBytes(group.low + (second ? 16 : 0));
    const U8 quarters = LoadBytes(group.high + (second ? 16 : 0));
    const U8 low = group.quarter < 2 ? pairs & 0xf : pairs >> 4;
    const U8 high = (quarters >> static_cast<uint8_t>(2 * group.quarter)) & 3;
    return (WidenCodes(low | high << 4) - 32.0f) * group.scales[second ? 1 : 0];
  }
};

}  // namespace
}  // namespace rwkv::kernels::cpu
