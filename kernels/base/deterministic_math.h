// exp and log in double from plain additions and multiplications, so that every CPU and GPU gives the same bits (on a
// GPU with nvcc's -fmad=false). glibc's choose an implementation (with or without fused multiply-add) by the CPU they
// find. Error below 2 units in the last place. Exp has no branch: a loop over it vectorises.
//
// And what draws from rows of logits on every device share: probabilities in fixed point, whose sums are exact in any
// order.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define RWKV_DETERMINISTIC __host__ __device__ inline
#else
#define RWKV_DETERMINISTIC inline
#endif

namespace rwkv::kernels::deterministic {

namespace internal {
constexpr double kLn2High = 0x1.62e42fee00000p-1;  // 33 bits: multiples up to 2^11 are exact.
constexpr double kLn2Low = 0x1.a39ef35793c76p-33;
constexpr double kLog2E = 0x1.71547652b82fep+0;
}  // namespace internal

// e^x for x <= 0; 0 below -708, where results stop being normal numbers. NaN for NaN.
RWKV_DETERMINISTIC double Exp(double x) {
#if defined(__clang__)
#pragma clang fp contract(off)
#endif
  using namespace internal;  // NOLINT: constants.
  // Adding 1.5 * 2^52 rounds to an integer, which then stands in the low bits.
  constexpr double kRound = 0x1.8p52;
  const double clamped = x < -708 ? -708 : x;
  const double shifted = clamped * kLog2E + kRound;
  const double n = shifted - kRound;
  const double r = (clamped - n * kLn2High) - n * kLn2Low;  // |r| <= ln(2) / 2
  // Taylor up to r^13 / 13!: the rest is below 2^-57 of the result.
  double p = 1.0 / 6227020800;
  p = p * r + 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1;
  p = p * r + 1;
  uint64_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits << 52) + (uint64_t{1023} << 52);  // 2^n
  double scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return x < -708 ? 0 : p * scale;
}

// ln(x) for normal, finite x > 0.
RWKV_DETERMINISTIC double Log(double x) {
#if defined(__clang__)
#pragma clang fp contract(off)
#endif
  using namespace internal;  // NOLINT: constants.
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  // x = m * 2^n with m in [sqrt(1/2), sqrt(2)).
  constexpr uint64_t kSqrtHalf = 0x3fe6a09e667f3bcd;
  constexpr uint64_t kOne = 0x3ff0000000000000;
  const uint64_t offset = bits - kSqrtHalf;
  const int64_t n = static_cast<int64_t>(offset) >> 52;
  bits = (offset & 0x000fffffffffffff) + kSqrtHalf;
  static_assert(kSqrtHalf < kOne, "m may be below 1");
  double m;
  std::memcpy(&m, &bits, sizeof(m));
  // ln m = 2 atanh s = 2 (s + s^3/3 + s^5/5 + ...), |s| <= 0.172: the rest after s^23 is below 2^-60.
  const double s = (m - 1) / (m + 1);
  const double s2 = s * s;
  double p = 0;
  for (int k = 23; k >= 3; k -= 2) p = p * s2 + 1.0 / k;
  return static_cast<double>(n) * kLn2High + (static_cast<double>(n) * kLn2Low + 2 * (s + s * (s2 * p)));
}

// Of weights e^x 2^bits for n values of x, the largest of which is 0: none has more than 51 bits, and their sum stays
// below 2^63.
RWKV_DETERMINISTIC int FixedPointBits(int64_t n) {
  int bits = 62;
  for (int64_t power = 1; power < n; power *= 2) --bits;
  return bits < 51 ? bits : 51;
}

// e^x * scale, rounded to a whole number; x <= 0, scale a power of two up to 2^51.
RWKV_DETERMINISTIC uint64_t FixedPointExp(double x, double scale) {
#if defined(__clang__)
#pragma clang fp contract(off)
#endif
  // Adding 2^52 rounds to an integer, which then stands in the low bits.
  const double shifted = Exp(x) * scale + 0x1p52;
  uint64_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  return bits & ((uint64_t{1} << 52) - 1);
}

// What a candidate of the weight adds to the entropy, in units of 2^-52 nats, cut to a whole number. `surprise` >= 0.
RWKV_DETERMINISTIC uint64_t FixedPointEntropy(uint64_t weight, uint64_t total, double surprise) {
  const double share = static_cast<double>(weight) / static_cast<double>(total);
  return static_cast<uint64_t>(share * surprise * 0x1p52);
}

// The smallest whole number of at least `fraction` of `total` < 2^63, from 1 to `total`.
RWKV_DETERMINISTIC uint64_t FractionOf(double fraction, uint64_t total) {
  const double wanted = fraction * static_cast<double>(total);
  if (wanted >= static_cast<double>(total)) return total;
  auto least = static_cast<uint64_t>(wanted);
  if (static_cast<double>(least) < wanted) ++least;
  return least < 1 ? 1 : least < total ? least : total;
}

// floor(bits / 2^64 * total).
RWKV_DETERMINISTIC uint64_t ShareOf(uint64_t bits, uint64_t total) {
  constexpr uint64_t kLow = 0xffffffff;
  const uint64_t low = (bits & kLow) * (total & kLow);
  const uint64_t middle = (bits >> 32) * (total & kLow) + (low >> 32);
  const uint64_t other = (bits & kLow) * (total >> 32) + (middle & kLow);
  return (bits >> 32) * (total >> 32) + (middle >> 32) + (other >> 32);
}

}  // namespace rwkv::kernels::deterministic

#undef RWKV_DETERMINISTIC
