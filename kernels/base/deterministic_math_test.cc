#include "kernels/base/deterministic_math.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "gtest/gtest.h"

namespace rwkv::kernels::deterministic {
namespace {

// Stated bound of both functions.
constexpr double kTolerance = 2 * std::numeric_limits<double>::epsilon();

TEST(DeterministicMathTest, ExpIsWithinTwoUnitsOfTheLastPlace) {
  for (double x = 0; x >= -708; x -= 0.0173) {
    const long double expected = std::exp(static_cast<long double>(x));
    const double error = static_cast<double>(std::abs((Exp(x) - expected) / expected));
    ASSERT_TRUE(error <= kTolerance) << "exp(" << x << ") = " << Exp(x) << ", off by " << error;
  }
}

TEST(DeterministicMathTest, ExpAtItsEdges) {
  EXPECT_EQ(Exp(0), 1);
  EXPECT_EQ(Exp(-0.0), 1);
  EXPECT_EQ(Exp(-708.1), 0);
  EXPECT_EQ(Exp(-1e300), 0);
  EXPECT_EQ(Exp(-std::numeric_limits<double>::infinity()), 0);
  EXPECT_GT(Exp(-708), 0);
  EXPECT_TRUE(std::isnan(Exp(std::numeric_limits<double>::quiet_NaN())));
}

TEST(DeterministicMathTest, LogIsWithinTwoUnitsOfTheLastPlace) {
  for (double x = 1e-300; x < 1e300; x *= 1.0173) {
    const long double expected = std::log(static_cast<long double>(x));
    const double error = static_cast<double>(std::abs(Log(x) - expected));
    // Near 1 the result is small against x's own rounding: there the bound is absolute.
    ASSERT_TRUE(error <= kTolerance * std::max(1.0, static_cast<double>(std::abs(expected)))) << "ln(" << x << ")";
  }
  EXPECT_EQ(Log(1), 0);
}

// Another compiler, flag or CPU that changes a bit changes what seeds mean; this notices.
TEST(DeterministicMathTest, BitsAreFixed) {
  const auto bits = [](double value) {
    uint64_t result;
    std::memcpy(&result, &value, sizeof(result));
    return result;
  };
  uint64_t exp_digest = 0;
  uint64_t log_digest = 0;
  for (int i = 1; i <= 10000; ++i) {
    exp_digest = exp_digest * 31 + bits(Exp(-0.0137 * i));
    log_digest = log_digest * 31 + bits(Log(0.731 * i));
  }
  EXPECT_EQ(exp_digest, 14865086097287906128u);
  EXPECT_EQ(log_digest, 1313186566768783619u);
}

TEST(DeterministicMathTest, FixedPointWeightsDoNotOverflow) {
  EXPECT_EQ(FixedPointBits(1), 51);
  EXPECT_EQ(FixedPointBits(2048), 51);
  EXPECT_EQ(FixedPointBits(2049), 50);
  EXPECT_EQ(FixedPointBits(65536), 46);
  EXPECT_EQ(FixedPointBits(65537), 45);
  EXPECT_EQ(FixedPointExp(0, 0x1p51), uint64_t{1} << 51);
  EXPECT_EQ(FixedPointExp(-1, 0x1p40), static_cast<uint64_t>(std::nearbyint(Exp(-1) * 0x1p40)));
  EXPECT_EQ(FixedPointExp(-1000, 0x1p51), 0);
}

TEST(DeterministicMathTest, FractionsAreRoundedUp) {
  EXPECT_EQ(FractionOf(0.5, 10), 5);
  EXPECT_EQ(FractionOf(0.51, 10), 6);
  EXPECT_EQ(FractionOf(1e-30, 10), 1);
  EXPECT_EQ(FractionOf(0, 10), 1);
  EXPECT_EQ(FractionOf(0.95, 10), 10);
  EXPECT_EQ(FractionOf(1, uint64_t{1} << 62), uint64_t{1} << 62);
}

TEST(DeterministicMathTest, SharesAreTheUpperHalfOfTheProduct) {
  __extension__ using Wide = unsigned __int128;
  uint64_t bits = 0x9e3779b97f4a7c15;
  for (int i = 0; i < 1000; ++i) {
    bits = bits * 6364136223846793005 + 1442695040888963407;
    const uint64_t total = bits >> (i % 64) | 1;
    EXPECT_EQ(ShareOf(bits, total), static_cast<uint64_t>(static_cast<Wide>(bits) * total >> 64)) << bits;
  }
  EXPECT_EQ(ShareOf(~uint64_t{0}, ~uint64_t{0}), ~uint64_t{0} - 1);
}

TEST(DeterministicMathTest, EntropyIsCountedInWholeNumbers) {
  // ln 2 of two equal ones.
  const uint64_t half = FixedPointEntropy(1, 2, Log(2));
  EXPECT_NEAR(static_cast<double>(2 * half) * 0x1p-52, std::log(2.0), 1e-15);
  EXPECT_EQ(FixedPointEntropy(0, 2, 700), 0);
}

}  // namespace
}  // namespace rwkv::kernels::deterministic
