#include "services/worker/sampler/sampler.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/common.pb.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

using ::rwkv::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

SamplingParams Params(const v1::Sampling& sampling, size_t vocab_size, std::vector<uint32_t> banned = {}) {
  absl::StatusOr<SamplingParams> params = SamplingParams::Create(sampling, static_cast<int64_t>(vocab_size), banned);
  EXPECT_TRUE(params.ok()) << params.status();
  return *params;
}

v1::Sampling AtTemperature(float temperature) {
  v1::Sampling sampling;
  sampling.set_temperature(temperature);
  return sampling;
}

uint32_t Draw(const std::vector<float>& logits, const SamplingParams& params, uint64_t position = 0) {
  Sampler sampler;
  PenaltyState penalties;
  absl::StatusOr<SampledToken> sampled = sampler.Sample(logits, params, position, penalties);
  EXPECT_TRUE(sampled.ok()) << sampled.status();
  return sampled.ok() ? sampled->token : std::numeric_limits<uint32_t>::max();
}

// Every id that comes up in so many draws.
std::vector<uint32_t> Support(const std::vector<float>& logits, const SamplingParams& params, int draws = 2000) {
  std::vector<bool> seen(logits.size());
  for (int position = 0; position < draws; ++position) seen[Draw(logits, params, position)] = true;
  std::vector<uint32_t> support;
  for (uint32_t id = 0; id < seen.size(); ++id) {
    if (seen[id]) support.push_back(id);
  }
  return support;
}

std::vector<float> LogitsOf(const std::vector<double>& probabilities) {
  std::vector<float> logits;
  for (double p : probabilities) logits.push_back(static_cast<float>(std::log(p)));
  return logits;
}

TEST(SamplerTest, GreedyTakesTheLargestAndTheSmallestIdOnATie) {
  EXPECT_EQ(Draw({1, 3, 2, 3, 3}, Params({}, 5)), 1);
  EXPECT_EQ(Draw({-kInfinity, -7, -kInfinity}, Params({}, 3)), 1);
  EXPECT_EQ(Draw({0.0f, -0.0f}, Params({}, 2)), 0);
  EXPECT_EQ(Draw({-0.0f, 0.0f}, Params({}, 2)), 0);
}

TEST(SamplerTest, GreedyIgnoresTheCuts) {
  v1::Sampling sampling;
  sampling.set_top_k(1);
  sampling.set_top_p(1e-6f);
  sampling.set_min_p(1);
  sampling.set_typical_p(0.01f);
  EXPECT_EQ(Draw({1, 2, 5, 4}, Params(sampling, 4)), 2);
}

TEST(SamplerTest, BadLogitsAreInternalErrorsAndCountNothing) {
  Sampler sampler;
  v1::Sampling sampling = AtTemperature(1);
  sampling.set_presence_penalty(1);
  const SamplingParams params = Params(sampling, 9);
  PenaltyState penalties;
  std::vector<float> logits(9, 0.0f);
  for (const float bad : {kNan, kInfinity}) {
    for (const size_t place : {size_t{0}, size_t{3}, size_t{8}}) {
      logits.assign(9, 0.0f);
      logits[place] = bad;
      EXPECT_THAT(sampler.Sample(logits, params, 0, penalties),
                  StatusIs(absl::StatusCode::kInternal, HasSubstr(absl::StrCat("token ", place))));
      EXPECT_THAT(Sampler::Logprob(logits, 1), StatusIs(absl::StatusCode::kInternal));
    }
  }
  logits.assign(9, -kInfinity);
  EXPECT_THAT(sampler.Sample(logits, params, 0, penalties), StatusIs(absl::StatusCode::kInternal, HasSubstr("-inf")));
  logits.assign(8, 0.0f);
  EXPECT_THAT(sampler.Sample(logits, params, 0, penalties), StatusIs(absl::StatusCode::kInternal, HasSubstr("8")));
  EXPECT_TRUE(penalties.seen().empty());
}

TEST(SamplerTest, BannedIdsAreNeverDrawnEvenWhenLikeliest) {
  const std::vector<float> logits = {9, 9, 1, 1, 9};
  for (const float temperature : {0.0f, 1.0f, 100.0f}) {
    const SamplingParams params = Params(AtTemperature(temperature), 5, {0, 2, 4, 100});
    const std::vector<uint32_t> support = Support(logits, params, 200);
    EXPECT_EQ(support.front(), 2) << temperature;
    EXPECT_LE(support.back(), 3) << temperature;
  }
  Sampler sampler;
  PenaltyState penalties;
  EXPECT_THAT(sampler.Sample(logits, Params({}, 5, {0, 5}), 0, penalties),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("banned")));
}

TEST(SamplerTest, LogprobIsOfTheModelsOwnDistribution) {
  const std::vector<float> logits = LogitsOf({0.5, 0.3, 0.15, 0.05});
  v1::Sampling sampling = AtTemperature(2);
  sampling.set_top_k(1);
  (*sampling.mutable_logit_bias())[3] = 50;
  sampling.set_top_logprobs(3);
  Sampler sampler;
  PenaltyState penalties;
  ASSERT_OK_AND_ASSIGN(SampledToken sampled, sampler.Sample(logits, Params(sampling, 4), 0, penalties));
  EXPECT_EQ(sampled.token, 3);
  EXPECT_NEAR(sampled.logprob, std::log(0.05), 1e-6);
  ASSERT_EQ(sampled.top_logprobs.size(), 3);
  EXPECT_EQ(sampled.top_logprobs[0].token, 0);
  EXPECT_NEAR(sampled.top_logprobs[0].logprob, std::log(0.5), 1e-6);
  EXPECT_EQ(sampled.top_logprobs[2].token, 2);
  ASSERT_OK_AND_ASSIGN(const float alone, Sampler::Logprob(logits, 3));
  EXPECT_EQ(alone, sampled.logprob);
  EXPECT_THAT(Sampler::Logprob(logits, 4), StatusIs(absl::StatusCode::kInternal));
}

TEST(SamplerTest, TopLogprobsFallAndBreakTiesByIdAndEndWithTheVocabulary) {
  v1::Sampling sampling;
  sampling.set_top_logprobs(4);
  const auto top = [&](const std::vector<float>& logits) {
    Sampler sampler;
    PenaltyState penalties;
    const absl::StatusOr<SampledToken> sampled = sampler.Sample(logits, Params(sampling, logits.size()), 0, penalties);
    std::vector<uint32_t> ids;
    for (const LogprobOf& entry : sampled->top_logprobs) ids.push_back(entry.token);
    return ids;
  };
  EXPECT_THAT(top({0, 2, 1, 2, 1, 2}), ElementsAre(1, 3, 5, 2));
  EXPECT_THAT(top({5, -kInfinity, 7}), ElementsAre(2, 0, 1));
  EXPECT_THAT(top({0, 1, 2, 3, 4, 5, 6}), ElementsAre(6, 5, 4, 3));
}

TEST(SamplerTest, TopKKeepsExactlyKAndTheSmallerIdsOfATie) {
  v1::Sampling sampling = AtTemperature(1);
  sampling.set_top_k(3);
  EXPECT_THAT(Support({1, 2, 1, 2, 1, 1}, Params(sampling, 6)), ElementsAre(0, 1, 3));
  sampling.set_top_k(100);
  EXPECT_THAT(Support({1, 2, 1}, Params(sampling, 3)), ElementsAre(0, 1, 2));
}

TEST(SamplerTest, TopPKeepsTheSmallestSetThatReachesIt) {
  const std::vector<float> logits = LogitsOf({0.1, 0.4, 0.2, 0.3});
  v1::Sampling sampling = AtTemperature(1);
  const auto support = [&](float top_p) {
    sampling.set_top_p(top_p);
    return Support(logits, Params(sampling, 4));
  };
  EXPECT_THAT(support(std::numeric_limits<float>::min()), ElementsAre(1));
  EXPECT_THAT(support(0.39f), ElementsAre(1));
  EXPECT_THAT(support(0.41f), ElementsAre(1, 3));
  EXPECT_THAT(support(0.71f), ElementsAre(1, 2, 3));
  EXPECT_THAT(support(0.95f), ElementsAre(0, 1, 2, 3));
  EXPECT_THAT(support(1), ElementsAre(0, 1, 2, 3));
}

TEST(SamplerTest, TypicalKeepsWhatIsNearestToTheEntropy) {
  // H = 1.03 nat; surprises 0.69, 1.20, 2.30, 2.30: ids 1, then 0, then 2 and 3.
  const std::vector<float> logits = LogitsOf({0.5, 0.3, 0.1, 0.1});
  v1::Sampling sampling = AtTemperature(1);
  sampling.set_typical_p(0.2f);
  EXPECT_THAT(Support(logits, Params(sampling, 4)), ElementsAre(1));
  sampling.set_typical_p(0.5f);
  EXPECT_THAT(Support(logits, Params(sampling, 4)), ElementsAre(0, 1));
  sampling.set_typical_p(0.85f);
  EXPECT_THAT(Support(logits, Params(sampling, 4)), ElementsAre(0, 1, 2));
}

TEST(SamplerTest, MinPIsAFractionOfTheLikeliest) {
  const std::vector<float> logits = LogitsOf({0.5, 0.3, 0.15, 0.05});
  v1::Sampling sampling = AtTemperature(1);
  sampling.set_min_p(0.25f);
  EXPECT_THAT(Support(logits, Params(sampling, 4)), ElementsAre(0, 1, 2));
  sampling.set_min_p(1);
  EXPECT_THAT(Support(logits, Params(sampling, 4)), ElementsAre(0));
}

// tokenizers.md 4: in the pip package temperature acts after top-p, so a high one does not widen the nucleus.
TEST(SamplerTest, OrdersDifferInWhatTopPSees) {
  const std::vector<float> logits = LogitsOf({0.5, 0.3, 0.15, 0.05});
  v1::Sampling sampling = AtTemperature(2);
  sampling.set_top_p(0.7f);
  sampling.set_order(v1::SAMPLING_ORDER_TEMPERATURE_FIRST);
  EXPECT_THAT(Support(logits, Params(sampling, 4)), ElementsAre(0, 1, 2));  // sqrt(p): 0.38 + 0.29 < 0.7
  sampling.set_order(v1::SAMPLING_ORDER_RWKV_PIP);
  EXPECT_THAT(Support(logits, Params(sampling, 4)), ElementsAre(0, 1));
}

TEST(SamplerTest, PipOrderKeepsTiesAtTheCutoffOfTopP) {
  v1::Sampling sampling = AtTemperature(1);
  sampling.set_top_p(0.3f);
  sampling.set_order(v1::SAMPLING_ORDER_RWKV_PIP);
  EXPECT_THAT(Support({1, 1, 1, -3}, Params(sampling, 4)), ElementsAre(0, 1, 2));
  sampling.set_order(v1::SAMPLING_ORDER_TEMPERATURE_FIRST);
  EXPECT_THAT(Support({1, 1, 1, -3}, Params(sampling, 4)), ElementsAre(0));
}

TEST(SamplerTest, OnlyFiniteLogitIsAlwaysDrawn) {
  std::vector<float> logits(100, -kInfinity);
  logits[42] = -3e38f;
  for (const auto order : {v1::SAMPLING_ORDER_TEMPERATURE_FIRST, v1::SAMPLING_ORDER_RWKV_PIP}) {
    v1::Sampling sampling = AtTemperature(0.7f);
    sampling.set_order(order);
    sampling.set_top_k(5);
    sampling.set_top_p(0.01f);
    sampling.set_typical_p(0.5f);
    sampling.set_min_p(0.9f);
    EXPECT_THAT(Support(logits, Params(sampling, 100), 20), ElementsAre(42));
  }
}

TEST(SamplerTest, ExtremeTemperaturesAndLogitsStayInRange) {
  const std::vector<float> logits = {3e38f, -3e38f, 0, 2.9e38f, -kInfinity};
  for (const float temperature : {std::numeric_limits<float>::denorm_min(), 1e-6f, 1.0f, 100.0f}) {
    v1::Sampling sampling = AtTemperature(temperature);
    sampling.set_typical_p(0.9f);
    sampling.set_top_p(0.9f);
    EXPECT_THAT(Support(logits, Params(sampling, 5), 50), ElementsAre(0)) << temperature;
  }
}

// Chi-square over 7 degrees of freedom: beyond 40.5 with probability 1e-6, were the seeds random.
TEST(SamplerTest, DrawsFollowTheDistribution) {
  const std::vector<double> p = {0.3, 0.02, 0.08, 0.25, 0.05, 0.1, 0.15, 0.05};
  const std::vector<float> logits = LogitsOf(p);
  constexpr int kDraws = 100000;
  for (const uint64_t seed : {uint64_t{0}, uint64_t{1}, ~uint64_t{0}}) {
    v1::Sampling sampling = AtTemperature(1);
    sampling.set_seed(seed);
    const SamplingParams params = Params(sampling, p.size());
    Sampler sampler;
    PenaltyState penalties;
    std::vector<int> counts(p.size());
    for (int position = 0; position < kDraws; ++position) {
      ++counts[sampler.Sample(logits, params, position, penalties)->token];
    }
    double chi_square = 0;
    for (size_t i = 0; i < p.size(); ++i) {
      chi_square += (counts[i] - kDraws * p[i]) * (counts[i] - kDraws * p[i]) / (kDraws * p[i]);
    }
    EXPECT_LT(chi_square, 40.5) << "seed " << seed;
  }
}

// With the draws' randomness in the seed instead: tokens at one position over many seeds are as independent.
TEST(SamplerTest, SeedsAreIndependent) {
  const std::vector<float> logits(16, 0.0f);
  constexpr int kDraws = 50000;
  std::vector<int> counts(16 * 16);
  Sampler sampler;
  PenaltyState penalties;
  uint32_t previous = 0;
  for (int seed = 0; seed <= kDraws; ++seed) {
    v1::Sampling sampling = AtTemperature(1);
    sampling.set_seed(seed);
    const uint32_t token = sampler.Sample(logits, Params(sampling, 16), 7, penalties)->token;
    if (seed > 0) ++counts[previous * 16 + token];
    previous = token;
  }
  double chi_square = 0;
  const double expected = kDraws / 256.0;
  for (int count : counts) chi_square += (count - expected) * (count - expected) / expected;
  EXPECT_LT(chi_square, 373);  // 255 degrees of freedom, 1e-6.
}

TEST(SamplerTest, SameSeedAndPositionDrawTheSameWhateverElseTheSamplerDid) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0, 3);
  std::vector<float> row(500), other(900);
  for (float& logit : row) logit = normal(random);
  for (float& logit : other) logit = normal(random);
  v1::Sampling sampling = AtTemperature(0.9f);
  sampling.set_seed(77);
  sampling.set_top_p(0.95f);
  Sampler used;
  for (uint64_t position = 0; position < 50; ++position) {
    PenaltyState a, b, c;
    ASSERT_OK(used.Sample(other, Params(sampling, other.size()), position, c));
    EXPECT_EQ(used.Sample(row, Params(sampling, row.size()), position, a)->token,
              Sampler().Sample(row, Params(sampling, row.size()), position, b)->token);
  }
}

TEST(SamplerTest, LogitBiasMovesTheDistribution) {
  v1::Sampling sampling;
  (*sampling.mutable_logit_bias())[2] = 1.5f;
  (*sampling.mutable_logit_bias())[0] = -0.25f;
  EXPECT_EQ(Draw({3, 2.5f, 2}, Params(sampling, 3)), 2);
  (*sampling.mutable_logit_bias())[2] = 0.5f;
  EXPECT_EQ(Draw({3, 2.5f, 2}, Params(sampling, 3)), 0);
}

TEST(SamplerTest, PenaltiesCountWhatWasDrawn) {
  v1::Sampling sampling;
  sampling.set_presence_penalty(0.5f);
  sampling.set_frequency_penalty(1);
  sampling.set_penalty_decay(0.5f);
  const SamplingParams params = Params(sampling, 3);
  const std::vector<float> logits = {2, 1, 0.2f};
  Sampler sampler;
  PenaltyState penalties;
  std::vector<uint32_t> drawn;
  for (int position = 0; position < 5; ++position) {
    drawn.push_back(sampler.Sample(logits, params, position, penalties)->token);
  }
  // Penalised logits, drawn largest first:
  //   2, 1, .2 | .5, 1, .2 (id 0 counts 1) | 1, -.5, .2 (.5, 1) | .25, 0, .2 (1.25, .5) | -.125, .25, .2 (1.625, .25)
  EXPECT_THAT(drawn, ElementsAre(0, 1, 0, 0, 1));
  EXPECT_THAT(penalties.seen(), ElementsAre(0, 1));
  EXPECT_DOUBLE_EQ(penalties.count(0), ((0.5 * 0.5 + 1) * 0.5 + 1) * 0.5);
  EXPECT_DOUBLE_EQ(penalties.count(1), 0.5 * 0.5 * 0.5 + 1);
}

TEST(SamplerTest, ReplayedPenaltiesHaveTheSameBits) {
  v1::Sampling sampling = AtTemperature(1);
  sampling.set_presence_penalty(0.3f);
  sampling.set_frequency_penalty(0.7f);
  const SamplingParams params = Params(sampling, 40);
  const std::vector<float> logits(40, 0.0f);
  Sampler sampler;
  PenaltyState lived;
  std::vector<uint32_t> turn;
  for (uint64_t position = 0; position < 300; ++position) {
    // A worker that takes over in the middle of a turn draws what this one would have drawn.
    PenaltyState replayed(params, turn);
    const uint32_t other = Sampler().Sample(logits, params, position, replayed)->token;
    turn.push_back(sampler.Sample(logits, params, position, lived)->token);
    ASSERT_EQ(turn.back(), other);
  }
  const PenaltyState replayed(params, turn);
  ASSERT_EQ(replayed.seen(), lived.seen());
  for (size_t i = 0; i < lived.seen().size(); ++i) EXPECT_EQ(replayed.count(i), lived.count(i)) << i;
}

TEST(SamplerTest, PenaltyStateIsEmptyWithoutPenalties) {
  const std::vector<uint32_t> turn = {1, 2, 3};
  EXPECT_TRUE(PenaltyState(Params({}, 5), turn).seen().empty());
}

TEST(SamplerTest, CountsFollowTheirDefinitionHoweverManyTokensAndHoweverFastTheyDecay) {
  for (const float decay : {1.0f, 0.996f, 0.5f, 1e-30f, 0.0f}) {
    v1::Sampling sampling;
    sampling.set_frequency_penalty(1);
    sampling.set_penalty_decay(decay);
    const SamplingParams params = Params(sampling, 16);
    PenaltyState penalties;
    std::vector<double> counts(16, 0.0);
    for (uint32_t i = 0; i < 5000; ++i) {
      const uint32_t token = i * i % 11;
      for (double& count : counts) count *= static_cast<double>(decay);
      counts[token] += 1;
      penalties.Count(params, token);
    }
    for (size_t place = 0; place < penalties.seen().size(); ++place) {
      const double expected = counts[penalties.seen()[place]];
      EXPECT_NEAR(penalties.count(place), expected, 1e-9 * std::max(1.0, expected)) << decay << " " << place;
    }
  }
}

TEST(SamplerTest, RepetitionPenaltyDividesWhatIsPositiveAndMultipliesWhatIsNot) {
  v1::Sampling sampling;
  sampling.set_repetition_penalty(2);
  const SamplingParams params = Params(sampling, 4);
  const std::vector<uint32_t> turn = {0, 2, 3, 3};
  const auto draw = [&](const std::vector<float>& logits) {
    PenaltyState penalties(params, turn);
    return Sampler().Sample(logits, params, 0, penalties)->token;
  };
  EXPECT_EQ(draw({4, 1.9f, 0, 0}), 0);      // 4 / 2 > 1.9
  EXPECT_EQ(draw({4, 2.1f, 0, 0}), 1);      // 4 / 2 < 2.1
  EXPECT_EQ(draw({-9, -1.9f, -1, -9}), 1);  // -1 * 2 < -1.9
  EXPECT_EQ(draw({-9, -2.1f, -1, -9}), 2);
  sampling.set_presence_penalty(0.5f);  // After it.
  const SamplingParams both = Params(sampling, 2);
  PenaltyState penalties(both, absl::MakeConstSpan(turn).first(1));
  EXPECT_EQ(Sampler().Sample(std::vector<float>{4, 1.6f}, both, 0, penalties)->token, 1);  // 4 / 2 - 0.5
}

TEST(SamplerTest, ABiasOfMinusInfinityBans) {
  for (const float temperature : {0.0f, 5.0f}) {
    v1::Sampling sampling = AtTemperature(temperature);
    sampling.set_repetition_penalty(1.5f);
    (*sampling.mutable_logit_bias())[1] = -std::numeric_limits<float>::infinity();
    const SamplingParams params = Params(sampling, 3);
    const std::vector<uint32_t> turn = {1};
    for (uint64_t position = 0; position < 200; ++position) {
      PenaltyState penalties(params, turn);
      EXPECT_NE(Sampler().Sample(std::vector<float>{0, 9, 0}, params, position, penalties)->token, 1);
    }
  }
}

// A token beyond the vocabulary in a replayed turn has no logit to lower.
TEST(SamplerTest, PenaltiesOfForeignTokensAreIgnored) {
  v1::Sampling sampling;
  sampling.set_presence_penalty(1);
  const SamplingParams params = Params(sampling, 2);
  const std::vector<uint32_t> turn = {7};
  PenaltyState penalties(params, turn);
  Sampler sampler;
  EXPECT_EQ(sampler.Sample(std::vector<float>{1, 0}, params, 0, penalties)->token, 0);
}

}  // namespace
}  // namespace rwkv::worker
