// The bounds hold what float computes, and are not far above it.
#include "kernels/conformance/bounded.h"

#include <cmath>
#include <limits>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/conformance/conformance.h"

namespace rwkv::kernels::conformance {
namespace {

constexpr double kU = kUnitRoundoff;

TEST(BoundedTest, OneOperationIsOffByOneRounding) {
  for (const Bounded& result : {Bounded(1.0) + Bounded(2.0), Bounded(4.5) - Bounded(1.5), Bounded(1.5) * Bounded(2.0),
                                Bounded(6.0) / Bounded(2.0)}) {
    EXPECT_EQ(result.value, 3.0);
    EXPECT_NEAR(result.error, 3.0 * kU, 0.1 * kU);
  }
  EXPECT_NEAR(Sqrt(Bounded(9.0)).error, 3.0 * kU, 0.1 * kU);
  EXPECT_NEAR(Exp(Bounded(0.0)).error, 2 * kFunctionUlps * kU, 0.1 * kU);
}

TEST(BoundedTest, ErrorsOfOperandsArePassedOn) {
  const Bounded a(2.0, 0.01);
  const Bounded b(4.0, 0.02);
  EXPECT_NEAR((a + b).error, 0.03, 1e-5);
  EXPECT_NEAR((a - b).error, 0.03, 1e-5);
  EXPECT_NEAR((a * b).error, 2.0 * 0.02 + 4.0 * 0.01 + 0.0002, 1e-5);
  EXPECT_NEAR((a / b).error, (0.01 + 0.5 * 0.02) / 3.98, 1e-5);
  EXPECT_NEAR(Exp(a).error, std::exp(2.01) - std::exp(2.0), 1e-4);
  EXPECT_NEAR(Max(a, b).error, 0.02, 1e-12);
  EXPECT_NEAR(Max(Bounded(1.0), Bounded(0.999, 0.01)).error, 0.009, 1e-12);
  EXPECT_EQ((-a).error, 0.01);
}

TEST(BoundedTest, NothingIsKnownOfAQuotientByWhatMayBeZero) {
  EXPECT_EQ((Bounded(1.0) / Bounded(0.5, 0.5)).error, std::numeric_limits<double>::infinity());
}

// Sums of floats in two orders: both within the bound, which is at most n roundings of their magnitude.
TEST(BoundedTest, SumsAreWithinTheirBoundInAnyOrder) {
  Random random(5);
  for (int64_t count : {1, 2, 17, 1000}) {
    const std::vector<float> x = random.Uniforms(count, -1.0f, 1.0f);
    const Bounded sum = Sum(Bounds(x.begin(), x.end()));
    double magnitude = 0.0;
    float forward = 0.0f;
    float backward = 0.0f;
    for (int64_t i = 0; i < count; ++i) {
      magnitude += std::abs(x[i]);
      forward += x[i];
      backward += x[count - 1 - i];
    }
    EXPECT_NEAR(forward, sum.value, sum.error);
    EXPECT_NEAR(backward, sum.value, sum.error);
    EXPECT_LE(sum.error, 1.02 * static_cast<double>(count) * kU * magnitude);
  }
}

TEST(BoundedTest, NormalizeIsItsFormula) {
  const std::vector<float> weight = {2.0f, 1.0f};
  const std::vector<float> bias = {0.5f, 0.0f};
  const Bounds y = Normalize({Bounded(1.0), Bounded(3.0)}, weight.data(), bias.data(), 3.0f);
  EXPECT_NEAR(y[0].value, -0.5, 1e-12);
  EXPECT_NEAR(y[1].value, 0.5, 1e-12);
  EXPECT_LE(y[0].error, 20 * kU);
}

}  // namespace
}  // namespace rwkv::kernels::conformance
