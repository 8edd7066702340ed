// exp, sigmoid and tanh of every build against long double, over all of the floats.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/kernel_set.h"

namespace rwkv::kernels::cpu {
namespace {

enum class Function { kExp, kSigmoid, kTanh };

void Compute(const KernelSet& kernels, Function function, const std::vector<float>& x, std::vector<float>* y) {
  y->resize(x.size());
  const auto count = static_cast<int64_t>(x.size());
  switch (function) {
    case Function::kExp:
      return kernels.exp(x.data(), count, y->data());
    case Function::kSigmoid:
      return kernels.sigmoid(x.data(), count, y->data());
    case Function::kTanh:
      return kernels.tanh(x.data(), count, y->data());
  }
}

long double Exact(Function function, long double x) {
  switch (function) {
    case Function::kExp:
      return std::exp(x);
    case Function::kSigmoid:
      return 1.0L / (1.0L + std::exp(-x));
    case Function::kTanh:
      return std::tanh(x);
  }
  return 0.0L;
}

// Distance between floats around `value`, the smallest subnormal at least.
long double Ulp(long double value) {
  int exponent = 0;
  std::frexp(value, &exponent);
  return std::ldexp(1.0L, std::max(exponent - 24, -149));
}

// Every 4099th float by its bits (4099 is prime, so that all kinds of low bits occur), infinities and NaN left out.
std::vector<float> AllOverTheFloats() {
  std::vector<float> x;
  for (uint64_t bits = 0; bits <= UINT32_MAX; bits += 4099) {
    const auto narrow = static_cast<uint32_t>(bits);
    float value;
    std::memcpy(&value, &narrow, sizeof(value));
    if (std::isfinite(value) && std::abs(value) < 110.0f) x.push_back(value);
  }
  for (float value = -105.0f; value < 92.0f; value += 0.00391f) x.push_back(value);
  return x;
}

class SimdMathTest : public ::testing::TestWithParam<size_t> {
 protected:
  const Backend backend_ = Backends()[GetParam()];
};

TEST_P(SimdMathTest, ErrorsAreWithinTheDocumentedBound) {
  if (!backend_.runs_here) GTEST_SKIP() << backend_.name << " cannot run on this processor";
  const std::vector<float> x = AllOverTheFloats();
  std::vector<float> y;
  struct Bound {
    Function function;
    const char* name;
    double ulps;
  };
  for (const Bound& bound : {Bound{Function::kExp, "exp", 1.25}, Bound{Function::kSigmoid, "sigmoid", 2.5},
                             Bound{Function::kTanh, "tanh", 2.0}}) {
    Compute(*backend_.kernels, bound.function, x, &y);
    double worst = 0.0;
    float worst_x = 0.0f;
    for (size_t i = 0; i < x.size(); ++i) {
      const long double exact = Exact(bound.function, x[i]);
      if (exact > 3.4028236e38L) {
        EXPECT_EQ(y[i], HUGE_VALF) << bound.name << "(" << x[i] << ")";
        continue;
      }
      const auto error = static_cast<double>(std::abs(y[i] - exact) / Ulp(exact));
      if (!(error <= worst)) {
        worst = error;
        worst_x = x[i];
      }
    }
    EXPECT_LE(worst, bound.ulps) << bound.name << "(" << std::hexfloat << worst_x << ")";
    RecordProperty(std::string(bound.name) + "_worst_ulps", std::to_string(worst));
  }
}

TEST_P(SimdMathTest, LimitsAreExact) {
  if (!backend_.runs_here) GTEST_SKIP() << backend_.name << " cannot run on this processor";
  const std::vector<float> x = {0.0f, -0.0f, HUGE_VALF, -HUGE_VALF, NAN, 3.4e38f, -3.4e38f};
  std::vector<float> y;
  Compute(*backend_.kernels, Function::kExp, x, &y);
  EXPECT_EQ(std::vector<float>(y.begin(), y.begin() + 4), (std::vector<float>{1.0f, 1.0f, HUGE_VALF, 0.0f}));
  EXPECT_TRUE(std::isnan(y[4]));
  EXPECT_EQ(std::vector<float>(y.begin() + 5, y.end()), (std::vector<float>{HUGE_VALF, 0.0f}));
  Compute(*backend_.kernels, Function::kSigmoid, x, &y);
  EXPECT_EQ(std::vector<float>(y.begin(), y.begin() + 4), (std::vector<float>{0.5f, 0.5f, 1.0f, 0.0f}));
  EXPECT_TRUE(std::isnan(y[4]));
  EXPECT_EQ(std::vector<float>(y.begin() + 5, y.end()), (std::vector<float>{1.0f, 0.0f}));
  Compute(*backend_.kernels, Function::kTanh, x, &y);
  EXPECT_EQ(std::vector<float>(y.begin(), y.begin() + 4), (std::vector<float>{0.0f, -0.0f, 1.0f, -1.0f}));
  EXPECT_TRUE(std::signbit(y[1]));
  EXPECT_TRUE(std::isnan(y[4]));
  EXPECT_EQ(std::vector<float>(y.begin() + 5, y.end()), (std::vector<float>{1.0f, -1.0f}));
}

// Neither the lane nor the length of the rest changes a bit.
TEST_P(SimdMathTest, ValueDoesNotDependOnItsPlace) {
  if (!backend_.runs_here) GTEST_SKIP() << backend_.name << " cannot run on this processor";
  std::vector<float> x;
  for (int i = 0; i < 53; ++i) x.push_back(-9.7f + 0.371f * static_cast<float>(i));
  std::vector<float> whole;
  std::vector<float> one;
  for (Function function : {Function::kExp, Function::kSigmoid, Function::kTanh}) {
    Compute(*backend_.kernels, function, x, &whole);
    for (size_t i = 0; i < x.size(); ++i) {
      Compute(*backend_.kernels, function, {x[i]}, &one);
      EXPECT_EQ(whole[i], one[0]) << "x = " << x[i];
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, SimdMathTest, ::testing::Range<size_t>(0, Backends().size()), [](const auto& info) {
  std::string name(Backends()[info.param].name.substr(4));  // Without "cpu/".
  std::replace(name.begin(), name.end(), '/', '_');
  return name;
});

}  // namespace
}  // namespace rwkv::kernels::cpu
