#include "services/worker/sampler/row_math.h"

#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/base/deterministic_math.h"

namespace rwkv::worker {
namespace {

std::vector<float> Row(size_t n, float spread) {
  std::mt19937 random(static_cast<uint32_t>(n));
  std::normal_distribution<float> normal(0, spread);
  std::vector<float> row(n);
  for (float& logit : row) logit = normal(random);
  return row;
}

// Lengths around the lanes and blocks of the implementation.
constexpr size_t kLengths[] = {0, 1, 7, 8, 9, 15, 16, 17, 33, 511, 512, 513, 1023, 1024, 1025, 65536, 70001};

TEST(RowMathTest, MaxLogitIsTheLargest) {
  for (const size_t n : kLengths) {
    std::vector<float> row = Row(n, 3);
    float expected = -std::numeric_limits<float>::infinity();
    for (float logit : row) expected = std::max(expected, logit);
    EXPECT_EQ(MaxLogit(row.data(), n), expected) << n;
  }
}

TEST(RowMathTest, MaxLogitIsNanIfAnyLogitIsBad) {
  for (const size_t n : kLengths) {
    for (const size_t place : {size_t{0}, n / 2, n - 1}) {
      if (place >= n) continue;
      for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
        std::vector<float> row = Row(n, 3);
        row[place] = bad;
        EXPECT_TRUE(std::isnan(MaxLogit(row.data(), n))) << n << " " << place;
      }
    }
  }
}

TEST(RowMathTest, SumFixedPointExpIsTheSumOfTheWeights) {
  for (const size_t n : kLengths) {
    const std::vector<float> row = Row(n, 10);
    const double max = n == 0 ? 0 : MaxLogit(row.data(), n);
    std::vector<uint64_t> weights(n);
    FixedPointExp(row.data(), n, max, 1, 45, weights.data());
    EXPECT_EQ(SumFixedPointExp(row.data(), n, max, 45), std::accumulate(weights.begin(), weights.end(), uint64_t{0}))
        << n;
  }
}

TEST(RowMathTest, FixedPointExpHasTheBitsOfThePlainLoop) {
  for (const size_t n : kLengths) {
    for (const double temperature : {0.3, 1.0, 7.0}) {
      const std::vector<float> row = Row(n, 10);
      const double max = n == 0 ? 0 : MaxLogit(row.data(), n);
      std::vector<uint64_t> weights(n);
      FixedPointExp(row.data(), n, max, temperature, 45, weights.data());
      for (size_t i = 0; i < n; ++i) {
        const double exact =
            kernels::deterministic::Exp((static_cast<double>(row[i]) - max) * (1 / temperature)) * 0x1p45;
        ASSERT_EQ(weights[i], static_cast<uint64_t>(std::nearbyint(exact))) << n << " " << i;
      }
    }
  }
}

TEST(RowMathTest, EveryWidthHasTheBitsOfThePlainOne) {
  const std::vector<RowPasses> all = RowPassesHere();
  ASSERT_STREQ(all.front().name, "plain");
  for (const size_t n : kLengths) {
    std::vector<float> row = Row(n, 10);
    for (size_t i = 1; i < n; i += 5) row[i] = -std::numeric_limits<float>::infinity();  // Banned.
    for (size_t i = 2; i < n; i += 7) row[i] = -0.0f;
    for (const bool bad : {false, true}) {
      if (bad && n > 0) row[n / 3] = std::numeric_limits<float>::infinity();
      const float max = all.front().max_logit(row.data(), n);
      for (const RowPasses& passes : all) {
        EXPECT_TRUE(passes.max_logit(row.data(), n) == max || (std::isnan(max) && bad)) << passes.name << " " << n;
        EXPECT_EQ(std::isnan(passes.max_logit(row.data(), n)), std::isnan(max)) << passes.name << " " << n;
        if (bad || n == 0) continue;
        EXPECT_EQ(passes.sum_fixed_point_exp(row.data(), n, max, 45),
                  all.front().sum_fixed_point_exp(row.data(), n, max, 45))
            << passes.name << " " << n;
        for (const double temperature : {double{std::numeric_limits<float>::denorm_min()}, 1e-6, 0.7, 1.0, 100.0}) {
          std::vector<uint64_t> plain(n), weights(n);
          all.front().fixed_point_exp(row.data(), n, max, temperature, 45, plain.data());
          passes.fixed_point_exp(row.data(), n, max, temperature, 45, weights.data());
          EXPECT_EQ(weights, plain) << passes.name << " " << n << " " << temperature;
        }
      }
    }
  }
}

TEST(RowMathTest, FixedPointExpOfTheMaximumIsTwoToTheBits) {
  const float row[] = {-1, 5, -std::numeric_limits<float>::infinity()};
  uint64_t weights[3];
  FixedPointExp(row, 3, 5, std::numeric_limits<float>::denorm_min(), 51, weights);
  EXPECT_EQ(weights[0], 0);
  EXPECT_EQ(weights[1], uint64_t{1} << 51);
  EXPECT_EQ(weights[2], 0);
}

}  // namespace
}  // namespace rwkv::worker
