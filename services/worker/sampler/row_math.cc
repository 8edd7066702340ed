#include "services/worker/sampler/row_math.h"

#include <array>
#include <limits>

#include "kernels/base/deterministic_math.h"

namespace rwkv::worker {
namespace {

constexpr size_t kLanes = 16;

// Each body is compiled three times below: as it is, for AVX2 and for AVX-512, never with FMA, whose bits would differ.
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

RWKV_BODY void FixedPointExpBody(const float* logits, size_t n, double max, double temperature, int bits,
                                 uint64_t* weights) {
#if defined(__clang__)
#pragma clang fp contract(off)
#endif
  const double inverse = 1 / temperature;
  const auto scale = static_cast<double>(uint64_t{1} << bits);
  for (size_t i = 0; i < n; ++i) {
    weights[i] = kernels::deterministic::FixedPointExp((static_cast<double>(logits[i]) - max) * inverse, scale);
  }
}

RWKV_BODY uint64_t SumFixedPointExpBody(const float* logits, size_t n, double max, int bits) {
  // In blocks, so that the exponentials are one vector loop and the sums another.
  constexpr size_t kBlock = 64 * kLanes;
  std::array<uint64_t, kBlock> weights;
  uint64_t sum = 0;
  for (size_t i = 0; i < n; i += kBlock) {
    const size_t count = n - i < kBlock ? n - i : kBlock;
    FixedPointExpBody(logits + i, count, max, 1, bits, weights.data());
    for (size_t j = 0; j < count; ++j) sum += weights[j];
  }
  return sum;
}

#define RWKV_PASSES(width, name, attributes)                                                            \
  struct width {                                                                                        \
    attributes static float Max(const float* logits, size_t n) { return MaxLogitBody(logits, n); }      \
    attributes static uint64_t Sum(const float* logits, size_t n, double max, int bits) {               \
      return SumFixedPointExpBody(logits, n, max, bits);                                                \
    }                                                                                                   \
    attributes static void Exp(const float* logits, size_t n, double max, double temperature, int bits, \
                               uint64_t* weights) {                                                     \
      FixedPointExpBody(logits, n, max, temperature, bits, weights);                                    \
    }                                                                                                   \
    static constexpr RowPasses kPasses = {name, Max, Sum, Exp};                                         \
  }

RWKV_PASSES(Plain, "plain", );
#if defined(__x86_64__)
RWKV_PASSES(Avx2, "avx2", __attribute__((target("avx2"))));
RWKV_PASSES(Avx512, "avx512", __attribute__((target("avx512f,avx512dq,avx512vl"))));
#endif
#undef RWKV_PASSES
#undef RWKV_BODY

const RowPasses& Widest() {
  static const RowPasses widest = RowPassesHere().back();
  return widest;
}

}  // namespace

std::vector<RowPasses> RowPassesHere() {
  std::vector<RowPasses> passes = {Plain::kPasses};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) passes.push_back(Avx2::kPasses);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    passes.push_back(Avx512::kPasses);
  }
#endif
  return passes;
}

float MaxLogit(const float* logits, size_t n) { return Widest().max_logit(logits, n); }

uint64_t SumFixedPointExp(const float* logits, size_t n, double max, int bits) {
  return Widest().sum_fixed_point_exp(logits, n, max, bits);
}

void FixedPointExp(const float* logits, size_t n, double max, double temperature, int bits, uint64_t* weights) {
  Widest().fixed_point_exp(logits, n, max, temperature, bits, weights);
}

}  // namespace rwkv::worker
