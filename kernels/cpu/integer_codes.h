// Codes of weights as the integer products take them: pairs of int16 in the 32 bits of each lane, a lane an output.
// Only for the kernels_*.cc files.
#pragma once

#include <cstdint>

#include "kernels/base/matrix.h"
#include "kernels/cpu/simd.h"

namespace rwkv::kernels::cpu {
namespace {

// sum + low(a) * low(b) + high(a) * high(b), per lane; the two products' sum stays below 2^31 here.
RWKV_INLINE I32 AddPairs(I32 sum, U32 a, U32 b) {
#if defined(__AVX512VNNI__)
  return (I32)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
  return sum + (I32)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  typedef int32_t I32x8 __attribute__((vector_size(32)));
  const auto half = [](U32 v, bool high) {
    const I32 w = (I32)v;
    return high ? (__m256i)__builtin_shufflevector(w, w, 8, 9, 10, 11, 12, 13, 14, 15)
                : (__m256i)__builtin_shufflevector(w, w, 0, 1, 2, 3, 4, 5, 6, 7);
  };
  const I32x8 low = (I32x8)_mm256_madd_epi16(half(a, false), half(b, false));
  const I32x8 high = (I32x8)_mm256_madd_epi16(half(a, true), half(b, true));
  return sum + __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#else
  return sum + (((I32)a << 16) >> 16) * (((I32)b << 16) >> 16) + ((I32)a >> 16) * ((I32)b >> 16);
#endif
}

// The compiler computes v here: not before what the last such call was for, and not behind the next one. It would
// otherwise widen all weights of a group at once, and keep in memory what has no place in the registers.
template <typename V>
RWKV_INLINE void ComputeHere(V& v) {
#if defined(__AVX512F__)
  asm volatile("" : "+v"(v));
#endif
}

// How codes lie in the four bytes of a dword. Widen<i>() makes of each lane's dword its i-th pair; Pairs() makes of 32
// inputs (v0, v1) the 16 pairs that fit, in the order in which dwords and pairs come. Bytes<i>() makes of 64 bytes the
// i-th half of their codes as bytes without sign, kByteCentre above their values; First() and Second() are the inputs
// of (v0, v1) that fit: the first and second 16 of one vector of bytes, or 16 each of two vectors.
struct SignedBytes {  // int8, Q8_0: dword d has inputs 4 d .. 4 d + 3.
  static constexpr int kPairs = 2;
  static constexpr int32_t kCentre = 0;
  static constexpr int kByteVectors = 1;
  static constexpr int32_t kByteCentre = 128;
  template <int kPair>
  static RWKV_INLINE U32 Widen(U32 dword) {
    typedef int16_t I16x32 __attribute__((vector_size(64)));
    if (kPair == 0) return (U32)((I16x32)((I16x32)dword << 8) >> 8);
    return (U32)((I16x32)dword >> 8);
  }
  static RWKV_INLINE U32 Pairs(I32 v0, I32 v1) {
    const U32 low = (U32)__builtin_shufflevector(v0, v1, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29);
    const U32 high = (U32)__builtin_shufflevector(v0, v1, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
    return (low & 0xffffu) | (high << 16);
  }
  template <int kVector>
  static RWKV_INLINE U32 Bytes(U32 codes) {
    return codes ^ 0x80808080u;
  }
  static RWKV_INLINE I32 First(I32 v0, I32) { return v0; }
  static RWKV_INLINE I32 Second(I32, I32 v1) { return v1; }
};

struct Nibbles {  // int4: dword d has inputs 8 d .. 8 d + 7, the even one of a byte in its low four bits.
  static constexpr int kPairs = 4;
  static constexpr int32_t kCentre = 0;
  static constexpr int kByteVectors = 2;
  static constexpr int32_t kByteCentre = 0;
  template <int kPair>
  static RWKV_INLINE U32 Widen(U32 dword) {
    return (dword >> (4 * kPair)) & 0x000f000fu;
  }
  static RWKV_INLINE U32 Pairs(I32 v0, I32 v1) {
    const U32 low = (U32)__builtin_shufflevector(v0, v1, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    const U32 high = (U32)__builtin_shufflevector(v0, v1, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    return (low & 0xffffu) | (high << 16);
  }
  template <int kVector>
  static RWKV_INLINE U32 Bytes(U32 codes) {
    return (codes >> (4 * kVector)) & 0x0f0f0f0fu;
  }
  static RWKV_INLINE I32 First(I32 v0, I32 v1) {
    return __builtin_shufflevector(v0, v1, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  }
  static RWKV_INLINE I32 Second(I32 v0, I32 v1) {
    return __builtin_shufflevector(v0, v1, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  }
};

struct SplitNibbles {  // Q4_0: byte i has inputs i (low) and 16 + i (high), each 8 above its value.
  static constexpr int kPairs = 4;
  static constexpr int32_t kCentre = 8;
  static constexpr int kByteVectors = 2;
  static constexpr int32_t kByteCentre = 8;
  template <int kPair>
  static RWKV_INLINE U32 Widen(U32 dword) {
    return Nibbles::Widen<kPair>(dword);
  }
  static RWKV_INLINE U32 Pairs(I32 v0, I32 v1) {
    const U32 low = (U32)__builtin_shufflevector(v0, v1, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    const U32 high = (U32)__builtin_shufflevector(v0, v1, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    return (low & 0xffffu) | (high << 16);
  }
  template <int kVector>
  static RWKV_INLINE U32 Bytes(U32 codes) {
    return Nibbles::Bytes<kVector>(codes);
  }
  static RWKV_INLINE I32 First(I32 v0, I32) { return v0; }
  static RWKV_INLINE I32 Second(I32, I32 v1) { return v1; }
};

// A number as a type.
template <int kCount>
struct Dwords {
  static constexpr int kDwords = kCount;
};

// Calls visit(Dwords<0>()) .. visit(Dwords<kCount - 1>()).
template <int kCount, typename Visit>
RWKV_INLINE void ForEachNumber(Visit visit) {
  if constexpr (kCount > 0) {
    ForEachNumber<kCount - 1>(visit);
    visit(Dwords<kCount - 1>());
  }
}

// Of four lines of 64 outputs each (columns.h) the dwords, a lane an output: of the 16 outputs of quarter kQuarter.
template <int kQuarter>
RWKV_INLINE U32 DwordsOfLines(const uint8_t* line0, const uint8_t* line1, const uint8_t* line2, const uint8_t* line3) {
  typedef uint8_t U8x64 __attribute__((vector_size(64)));
  typedef uint16_t U16x32 __attribute__((vector_size(64)));
  const auto load = [](const uint8_t* line) { return *reinterpret_cast<const U8x64*>(line); };
  const auto bytes = [](U8x64 a, U8x64 b) -> U16x32 {
    constexpr int k = kQuarter / 2 * 8;  // The first or second half of each 16 bytes.
    return (U16x32)__builtin_shufflevector(
        a, b, k, k + 64, k + 1, k + 65, k + 2, k + 66, k + 3, k + 67, k + 4, k + 68, k + 5, k + 69, k + 6, k + 70,
        k + 7, k + 71, k + 16, k + 80, k + 17, k + 81, k + 18, k + 82, k + 19, k + 83, k + 20, k + 84, k + 21, k + 85,
        k + 22, k + 86, k + 23, k + 87, k + 32, k + 96, k + 33, k + 97, k + 34, k + 98, k + 35, k + 99, k + 36, k + 100,
        k + 37, k + 101, k + 38, k + 102, k + 39, k + 103, k + 48, k + 112, k + 49, k + 113, k + 50, k + 114, k + 51,
        k + 115, k + 52, k + 116, k + 53, k + 117, k + 54, k + 118, k + 55, k + 119);
  };
  constexpr int k = kQuarter % 2 * 4;
  return (U32)__builtin_shufflevector(bytes(load(line0), load(line1)), bytes(load(line2), load(line3)), k, k + 32,
                                      k + 1, k + 33, k + 2, k + 34, k + 3, k + 35, k + 8, k + 40, k + 9, k + 41, k + 10,
                                      k + 42, k + 11, k + 43, k + 16, k + 48, k + 17, k + 49, k + 18, k + 50, k + 19,
                                      k + 51, k + 24, k + 56, k + 25, k + 57, k + 26, k + 58, k + 27, k + 59);
}

// Of the lines of four inputs that follow each other.
RWKV_INLINE U32 DwordsOfColumns(const uint8_t* first, int64_t quarter) {
  const auto dwords = [&](auto q) {
    return DwordsOfLines<decltype(q)::kDwords>(first, first + 64, first + 128, first + 192);
  };
  return quarter == 0   ? dwords(Dwords<0>())
         : quarter == 1 ? dwords(Dwords<1>())
         : quarter == 2 ? dwords(Dwords<2>())
                        : dwords(Dwords<3>());
}

// Where a matrix has its codes and scales.
struct IntegerMatrix {
  const uint8_t* codes;
  int64_t row_bytes;
  int64_t group_bytes;  // From a group's codes to the next one's.
  const uint8_t* scales;
  int64_t scale_row_bytes;
  int64_t scale_bytes;      // From a group's scale to the next one's.
  const uint8_t* minimums;  // As scales; or null.
  int64_t group;
  int64_t groups;
  int64_t last_bytes;  // Codes of the last group.
};

RWKV_INLINE IntegerMatrix IntegerMatrixOf(const MatrixView& matrix) {
  const auto* const data = static_cast<const uint8_t*>(matrix.data);
  if (matrix.quantization == Quantization::kBlocks) {
    const int64_t codes = matrix.blocks == BlockType::kQ8_0 ? 32 : 16;
    const int64_t groups = matrix.cols / 32;
    const int64_t row_bytes = groups * (codes + 2);
    return {data + 2, row_bytes, codes + 2, data, row_bytes, codes + 2, nullptr, 32, groups, codes};
  }
  const bool bytes = matrix.quantization == Quantization::kInt8;
  const int64_t groups = (matrix.cols + matrix.group - 1) / matrix.group;
  const int64_t row_bytes = bytes ? matrix.cols : (matrix.cols + 1) / 2;
  const int64_t group_bytes = bytes ? matrix.group : matrix.group / 2;
  return {data,
          row_bytes,
          group_bytes,
          reinterpret_cast<const uint8_t*>(matrix.scales),
          2 * groups,
          2,
          reinterpret_cast<const uint8_t*>(matrix.minimums),
          matrix.group,
          groups,
          row_bytes - (groups - 1) * group_bytes};
}

// Calls visit(Codes(), dwords of a group) with how the matrix stores its codes; it is one of FixedPointGroup().
template <typename Visit>
RWKV_INLINE void VisitCodes(const MatrixView& matrix, Visit visit) {
  if (matrix.quantization == Quantization::kBlocks) {
    if (matrix.blocks == BlockType::kQ8_0) return visit(SignedBytes(), Dwords<8>());
    return visit(SplitNibbles(), Dwords<4>());
  }
  if (matrix.quantization == Quantization::kInt8) {
    if (matrix.group == 64) return visit(SignedBytes(), Dwords<16>());
    return visit(SignedBytes(), Dwords<8>());
  }
  if (matrix.group == 64) return visit(Nibbles(), Dwords<8>());
  return visit(Nibbles(), Dwords<4>());
}

typedef uint32_t U32x4 __attribute__((vector_size(16)));
typedef uint32_t U32x8 __attribute__((vector_size(32)));
typedef uint32_t U32x4Unaligned __attribute__((vector_size(16), aligned(1), may_alias));

// Four dwords of 16 places: lane i of the d-th vector is dword d at from[i].
RWKV_INLINE void LoadTransposed(const uint8_t* const* from, int64_t offset, U32* to) {
  U32 rows[4];
#pragma clang loop unroll(full)
  for (int i = 0; i < 4; ++i) {
    const auto load = [&](int j) -> U32x4 {
      return *reinterpret_cast<const U32x4Unaligned*>(from[4 * j + i] + offset);
    };
    const U32x8 low = __builtin_shufflevector(load(0), load(1), 0, 1, 2, 3, 4, 5, 6, 7);
    const U32x8 high = __builtin_shufflevector(load(2), load(3), 0, 1, 2, 3, 4, 5, 6, 7);
    rows[i] = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }
  const auto low = [](U32 a, U32 b) {
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
  };
  const auto high = [](U32 a, U32 b) {
    return __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  };
  const auto low_pairs = [](U32 a, U32 b) {
    return __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
  };
  const auto high_pairs = [](U32 a, U32 b) {
    return __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  };
  const U32 a = low(rows[0], rows[1]), b = low(rows[2], rows[3]);
  const U32 c = high(rows[0], rows[1]), d = high(rows[2], rows[3]);
  to[0] = low_pairs(a, b);
  to[1] = high_pairs(a, b);
  to[2] = low_pairs(c, d);
  to[3] = high_pairs(c, d);
}

}  // namespace
}  // namespace rwkv::kernels::cpu
