// The pieces by hand, in numbers small enough to follow.
#include "kernels/reference/pieces.h"

#include <cmath>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace rwkv::kernels::reference {
namespace {

using ::testing::ElementsAre;
using ::testing::FloatEq;
using ::testing::FloatNear;

TEST(PiecesTest, NormalizeCentersAndScales) {
  const std::vector<float> x = {1.0f, 3.0f};  // mean 2, variance 1
  const std::vector<float> weight = {2.0f, 1.0f};
  const std::vector<float> bias = {0.5f, 0.0f};
  std::vector<float> y(2);
  Normalize(x.data(), weight.data(), bias.data(), 2, 0.0f, y.data());
  EXPECT_THAT(y, ElementsAre(-1.5f, 1.0f));
  Normalize(x.data(), weight.data(), bias.data(), 2, 3.0f, y.data());  // inside the root
  EXPECT_THAT(y, ElementsAre(-0.5f, 0.5f));
}

TEST(PiecesTest, MixOneIsTheTokenBeforeAndMixZeroTheTokenItself) {
  const std::vector<float> now = {1.0f, 2.0f, 3.0f};
  const std::vector<float> before = {5.0f, 6.0f, 7.0f};
  const std::vector<float> mix = {0.0f, 1.0f, 0.25f};
  std::vector<float> y(3);
  Shift(now.data(), before.data(), mix.data(), 3, y.data());
  EXPECT_THAT(y, ElementsAre(1.0f, 6.0f, 4.0f));
}

TEST(PiecesTest, FirstTokenOfRwkv4ReadsItsOwnValue) {
  float aa = 0.0f;
  float bb = 0.0f;
  float pp = -1e30f;
  EXPECT_EQ(Recur4(-1.0f, 0.5f, 2.0f, 3.0f, &aa, &bb, &pp), 3.0f);
  EXPECT_THAT((std::vector<float>{aa, bb, pp}), ElementsAre(3.0f, 1.0f, 2.0f));
}

TEST(PiecesTest, SecondTokenOfRwkv4IsAMeanWeightedByItsBonus) {
  float aa = 3.0f;
  float bb = 1.0f;
  float pp = 0.0f;
  const float e = std::exp(1.0f);
  EXPECT_THAT(Recur4(-2.0f, 1.0f, 0.0f, 5.0f, &aa, &bb, &pp), FloatEq((3.0f + e * 5.0f) / (1.0f + e)));
  EXPECT_THAT(aa, FloatEq(std::exp(-2.0f) * 3.0f + 5.0f));
  EXPECT_THAT(bb, FloatEq(std::exp(-2.0f) + 1.0f));
  EXPECT_EQ(pp, 0.0f);
}

TEST(PiecesTest, Rwkv6ReadsBeforeItWrites) {
  const std::vector<float> r = {1.0f, 2.0f}, w = {0.5f, 0.25f}, k = {1.0f, -1.0f}, v = {2.0f, 3.0f},
                           bonus = {1.0f, 0.5f};
  std::vector<float> state = {4.0f, 8.0f, 0.0f, 1.0f};
  std::vector<float> o(2);
  Recur6(r.data(), w.data(), k.data(), v.data(), bonus.data(), 2, state.data(), o.data());
  // The bonus is 1 * 1 * 1 - 2 * 1 * 0.5 = 0.
  EXPECT_THAT(o, ElementsAre(20.0f, 2.0f));
  EXPECT_THAT(state, ElementsAre(4.0f, 0.0f, 3.0f, -2.75f));
}

TEST(PiecesTest, Rwkv7RecallsBeforeTheDecayAndReadsAfterTheWrite) {
  const std::vector<float> r = {1.0f, 1.0f}, w = {0.5f, 1.0f}, k = {1.0f, 0.0f}, v = {2.0f, 0.0f}, a = {-1.0f, 0.0f},
                           b = {0.5f, 0.0f};
  std::vector<float> state = {4.0f, 8.0f, 2.0f, 1.0f};
  std::vector<float> o(2);
  Recur7(r.data(), w.data(), k.data(), v.data(), a.data(), b.data(), 2, state.data(), o.data());
  EXPECT_THAT(state, ElementsAre(4.0f * 0.5f + 2.0f - 4.0f * 0.5f, 8.0f, 2.0f * 0.5f - 2.0f * 0.5f, 1.0f));
  EXPECT_THAT(o, ElementsAre(10.0f, 1.0f));
}

struct Prepared {
  std::vector<float> k = {3.0f, 4.0f}, v = {1.0f, 2.0f}, w = {9, 9}, a = {9, 9}, b = {9, 9};
};

Prepared RunPrepare(std::vector<float> key, bool residual) {
  const std::vector<float> zeros(2), ones = {1.0f, 1.0f}, v_first = {3.0f, 6.0f};
  Prepared out;
  out.k = key;
  const Prepare7 p = {zeros.data(),
                      zeros.data(),
                      ones.data(),
                      ones.data(),
                      zeros.data(),
                      zeros.data(),
                      residual ? zeros.data() : nullptr,
                      residual ? zeros.data() : nullptr,
                      residual ? v_first.data() : nullptr};
  PrepareFor7(p, 2, out.k.data(), out.v.data(), out.w.data(), out.a.data(), out.b.data());
  return out;
}

TEST(PiecesTest, PreparedKeysAreOfLengthOneAndGatesAreHalfOpenAtZero) {
  const Prepared out = RunPrepare({3.0f, 4.0f}, true);
  EXPECT_THAT(out.a, ElementsAre(FloatEq(-0.6f), FloatEq(-0.8f)));
  EXPECT_THAT(out.b, ElementsAre(FloatEq(0.3f), FloatEq(0.4f)));
  EXPECT_THAT(out.k, ElementsAre(1.5f, 2.0f));
  EXPECT_THAT(out.v, ElementsAre(2.0f, 4.0f));
  EXPECT_THAT(out.w[0], FloatNear(std::exp(-0.5f * std::exp(-0.5f)), 1e-6f));
}

TEST(PiecesTest, WithoutAResidualTheValueStaysAndAKeyOfZerosRemovesNothing) {
  const Prepared out = RunPrepare({0.0f, 0.0f}, false);
  EXPECT_THAT(out.v, ElementsAre(1.0f, 2.0f));
  EXPECT_THAT(out.b, ElementsAre(0.0f, 0.0f));
}

TEST(PiecesTest, BonusIsAddedBeforeTheGate) {
  const std::vector<float> r = {1.0f, 2.0f}, k = {2.0f, 1.0f}, v = {1.0f, 3.0f}, bonus = {1.0f, 0.5f}, g = {2.0f, 0.0f};
  std::vector<float> z = {1.0f, 1.0f};
  AddBonusAndGate(r.data(), k.data(), v.data(), bonus.data(), g.data(), 2, z.data());
  EXPECT_THAT(z, ElementsAre(8.0f, 0.0f));
}

}  // namespace
}  // namespace rwkv::kernels::reference
