#include "services/worker/sampler/deterministic_math.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "gtest/gtest.h"

namespace rwkv::worker {
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

}  // namespace
}  // namespace rwkv::worker
