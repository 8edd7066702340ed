// exp and log in double from plain additions and multiplications, so that every CPU gives the same bits. glibc's choose
// an implementation (with or without fused multiply-add) by the CPU they find. Error below 2 units in the last place.
// Exp has no branch: a loop over it vectorises.
#pragma once

#include <cstdint>
#include <cstring>

namespace rwkv::worker {

namespace deterministic_math_internal {
constexpr double kLn2High = 0x1.62e42fee00000p-1;  // 33 bits: multiples up to 2^11 are exact.
constexpr double kLn2Low = 0x1.a39ef35793c76p-33;
constexpr double kLog2E = 0x1.71547652b82fep+0;
}  // namespace deterministic_math_internal

// e^x for x <= 0; 0 below -708, where results stop being normal numbers. NaN for NaN.
inline double Exp(double x) {
#if defined(__clang__)
#pragma clang fp contract(off)
#endif
  using namespace deterministic_math_internal;  // NOLINT: constants.
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
inline double Log(double x) {
#if defined(__clang__)
#pragma clang fp contract(off)
#endif
  using namespace deterministic_math_internal;  // NOLINT: constants.
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

}  // namespace rwkv::worker
