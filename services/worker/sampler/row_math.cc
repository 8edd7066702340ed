#include "services/worker/sampler/row_math.h"

#include <array>
#include <cstring>
#include <limits>

#include "services/worker/sampler/deterministic_math.h"

namespace rwkv::worker {
namespace {

constexpr size_t kLanes = 8;

// Each body is compiled twice below: once as it is, once for AVX2 (without FMA, whose bits would differ).
#define RWKV_BODY inline __attribute__((always_inline))

RWKV_BODY float MaxLogitBody(const float* logits, size_t n) {
  constexpr float kLargest = std::numeric_limits<float>::max();
  std::array<float, kLanes> max;
  max.fill(-std::numeric_limits<float>::infinity());
  std::array<uint32_t, kLanes> bad = {};
  const size_t whole = n / kLanes * kLanes;
  for (size_t i = 0; i < whole; i += kLanes) {
    for (size_t j = 0; j < kLanes; ++j) {
      const float logit = logits[i + j];
      bad[j] |= !(logit <= kLargest);
      max[j] = logit > max[j] ? logit : max[j];
    }
  }
  for (size_t i = whole; i < n; ++i) {
    bad[0] |= !(logits[i] <= kLargest);
    max[0] = logits[i] > max[0] ? logits[i] : max[0];
  }
  for (size_t j = 1; j < kLanes; ++j) {
    bad[0] |= bad[j];
    max[0] = max[j] > max[0] ? max[j] : max[0];
  }
  return bad[0] != 0 ? std::numeric_limits<float>::quiet_NaN() : max[0];
}

RWKV_BODY double SumExpBody(const float* logits, size_t n, double max) {
  // In blocks, so that the exponentials are one vector loop and the sums another.
  constexpr size_t kBlock = 64 * kLanes;
  std::array<double, kBlock> exponentials;
  std::array<double, kLanes> sums = {};
  const size_t whole = n / kBlock * kBlock;
  for (size_t i = 0; i < whole; i += kBlock) {
    for (size_t j = 0; j < kBlock; ++j) exponentials[j] = Exp(static_cast<double>(logits[i + j]) - max);
    for (size_t j = 0; j < kBlock; j += kLanes) {
      for (size_t k = 0; k < kLanes; ++k) sums[k] += exponentials[j + k];
    }
  }
  for (size_t i = whole; i < n; ++i) sums[i % kLanes] += Exp(static_cast<double>(logits[i]) - max);
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

RWKV_BODY void FixedPointExpBody(const float* logits, size_t n, double max, double temperature, int bits,
                                 uint64_t* weights) {
#if defined(__clang__)
#pragma clang fp contract(off)
#endif
  const double inverse = 1 / temperature;
  const auto scale = static_cast<double>(uint64_t{1} << bits);
  // Adding 2^52 rounds to an integer, which then stands in the low bits.
  constexpr double kRound = 0x1p52;
  for (size_t i = 0; i < n; ++i) {
    const double shifted = Exp((static_cast<double>(logits[i]) - max) * inverse) * scale + kRound;
    uint64_t pattern;
    std::memcpy(&pattern, &shifted, sizeof(pattern));
    weights[i] = pattern & ((uint64_t{1} << 52) - 1);
  }
}

#undef RWKV_BODY

#if defined(__x86_64__)
#define RWKV_AVX2 __attribute__((target("avx2")))

RWKV_AVX2 float MaxLogitAvx2(const float* logits, size_t n) { return MaxLogitBody(logits, n); }
RWKV_AVX2 double SumExpAvx2(const float* logits, size_t n, double max) { return SumExpBody(logits, n, max); }
RWKV_AVX2 void FixedPointExpAvx2(const float* logits, size_t n, double max, double temperature, int bits,
                                 uint64_t* weights) {
  FixedPointExpBody(logits, n, max, temperature, bits, weights);
}

#undef RWKV_AVX2

bool HasAvx2() {
  static const bool has = __builtin_cpu_supports("avx2");
  return has;
}
#endif

}  // namespace

float MaxLogit(const float* logits, size_t n) {
#if defined(__x86_64__)
  if (HasAvx2()) return MaxLogitAvx2(logits, n);
#endif
  return MaxLogitBody(logits, n);
}

double SumExp(const float* logits, size_t n, double max) {
#if defined(__x86_64__)
  if (HasAvx2()) return SumExpAvx2(logits, n, max);
#endif
  return SumExpBody(logits, n, max);
}

void FixedPointExp(const float* logits, size_t n, double max, double temperature, int bits, uint64_t* weights) {
#if defined(__x86_64__)
  if (HasAvx2()) return FixedPointExpAvx2(logits, n, max, temperature, bits, weights);
#endif
  FixedPointExpBody(logits, n, max, temperature, bits, weights);
}

}  // namespace rwkv::worker
