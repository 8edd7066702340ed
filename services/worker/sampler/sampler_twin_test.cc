// The twin: sorts whole rows, long double throughout, as sampler.h words it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/common.pb.h"
#include "services/worker/sampler/philox.h"
#include "services/worker/sampler/sampler.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

SamplingParams Params(const v1::Sampling& sampling, size_t vocab_size) {
  absl::StatusOr<SamplingParams> params = SamplingParams::Create(sampling, static_cast<int64_t>(vocab_size), {});
  EXPECT_TRUE(params.ok()) << params.status();
  return *params;
}

struct TwinToken {
  uint32_t id;
  long double logit;
  long double p;
};

void Normalize(std::vector<TwinToken>& tokens, long double temperature) {
  long double max = -std::numeric_limits<long double>::infinity(), sum = 0;
  for (const TwinToken& token : tokens) max = std::max(max, token.logit);
  for (TwinToken& token : tokens) sum += token.p = std::exp((token.logit - max) / temperature);
  for (TwinToken& token : tokens) token.p /= sum;
}

void Rescale(std::vector<TwinToken>& tokens) {
  long double sum = 0;
  for (const TwinToken& token : tokens) sum += token.p;
  for (TwinToken& token : tokens) token.p /= sum;
}

template <typename Key>
void SortBy(std::vector<TwinToken>& tokens, Key key) {
  std::sort(tokens.begin(), tokens.end(),
            [&](const TwinToken& a, const TwinToken& b) { return key(a) != key(b) ? key(a) < key(b) : a.id < b.id; });
}

void KeepMass(std::vector<TwinToken>& tokens, long double mass) {
  long double sum = 0;
  size_t n = 0;
  while (n < tokens.size() && sum < mass) sum += tokens[n++].p;
  tokens.resize(n);
  Rescale(tokens);
}

const auto kByLogit = [](const TwinToken& token) { return -token.logit; };

void TwinTopK(std::vector<TwinToken>& tokens, const SamplingParams& params) {
  if (params.top_k() == 0 || tokens.size() <= static_cast<size_t>(params.top_k())) return;
  SortBy(tokens, kByLogit);
  tokens.resize(params.top_k());
  Rescale(tokens);
}

void TwinTopP(std::vector<TwinToken>& tokens, const SamplingParams& params, bool keep_ties) {
  if (params.top_p() == 1) return;
  SortBy(tokens, kByLogit);
  std::vector<TwinToken> kept = tokens;
  KeepMass(kept, params.top_p());
  if (keep_ties) {
    const long double last = kept.back().logit;
    while (kept.size() < tokens.size() && tokens[kept.size()].logit == last) kept.push_back(tokens[kept.size()]);
    for (size_t i = 0; i < kept.size(); ++i) kept[i].p = tokens[i].p;
    Rescale(kept);
  }
  tokens = kept;
}

void TwinTypical(std::vector<TwinToken>& tokens, const SamplingParams& params) {
  if (params.typical_p() == 1) return;
  long double entropy = 0;
  for (const TwinToken& token : tokens) {
    if (token.p > 0) entropy -= token.p * std::log(token.p);
  }
  SortBy(tokens, [&](const TwinToken& token) { return std::abs(-std::log(token.p) - entropy); });
  KeepMass(tokens, params.typical_p());
}

void TwinMinP(std::vector<TwinToken>& tokens, const SamplingParams& params) {
  long double max = 0;
  for (const TwinToken& token : tokens) max = std::max(max, token.p);
  std::vector<TwinToken> kept;
  for (const TwinToken& token : tokens) {
    if (token.p >= params.min_p() * max) kept.push_back(token);
  }
  tokens = kept;
  Rescale(tokens);
}

uint32_t TwinDraw(const std::vector<float>& logits, const SamplingParams& params, uint64_t position) {
  std::vector<TwinToken> tokens;
  for (uint32_t id = 0; id < logits.size(); ++id) {
    if (logits[id] > -kInfinity) tokens.push_back({id, logits[id], 0});
  }
  if (params.order() == SamplingParams::Order::kTemperatureFirst) {
    Normalize(tokens, params.temperature());
    TwinTopK(tokens, params);
    TwinTypical(tokens, params);
    TwinTopP(tokens, params, false);
    TwinMinP(tokens, params);
  } else {
    Normalize(tokens, 1);
    TwinTopP(tokens, params, true);
    TwinTopK(tokens, params);
    TwinTypical(tokens, params);
    TwinMinP(tokens, params);
    long double largest = 0;
    for (const TwinToken& token : tokens) largest = std::max(largest, token.p);
    for (TwinToken& token : tokens) token.p = std::pow(token.p / largest, 1.0L / params.temperature());
    Rescale(tokens);
  }
  SortBy(tokens, [](const TwinToken& token) { return token.id; });
  const long double u = static_cast<long double>(PhiloxBits(params.seed(), position)) / 18446744073709551616.0L;
  long double sum = 0;
  for (const TwinToken& token : tokens) {
    sum += token.p;
    if (sum > u) return token.id;
  }
  return tokens.back().id;
}

TEST(SamplerTwinTest, EqualsATwinThatSorts) {
  std::mt19937 random(20261122);
  const auto pick = [&](auto... values) {
    const std::vector<float> choices = {static_cast<float>(values)...};
    return choices[random() % choices.size()];
  };
  Sampler sampler;
  int draws = 0;
  for (int round = 0; round < 150; ++round) {
    const auto vocab_size = static_cast<size_t>(pick(1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 50, 257, 1500));
    std::normal_distribution<float> normal(0, pick(0.1, 1, 4, 30));
    std::vector<float> logits(vocab_size);
    for (float& logit : logits) logit = normal(random);
    if (pick(0, 0, 1) == 1) {  // Ties.
      for (float& logit : logits) logit = std::round(logit);
    }
    for (size_t i = 1; i < vocab_size; ++i) {
      if (random() % 20 == 0) logits[i] = -kInfinity;
    }
    v1::Sampling sampling;
    sampling.set_temperature(pick(1e-6, 0.3, 1, 1, 1.7, 10, 100));
    sampling.set_order(pick(0, 1) == 0 ? v1::SAMPLING_ORDER_TEMPERATURE_FIRST : v1::SAMPLING_ORDER_RWKV_PIP);
    sampling.set_top_k(static_cast<int32_t>(pick(0, 0, 1, 5, 40, 2000)));
    sampling.set_top_p(pick(1, 1e-30, 0.01, 0.31, 0.87, 0.999));
    sampling.set_typical_p(pick(1, 1, 0.23, 0.91));
    sampling.set_min_p(pick(0, 0, 0.013, 0.41));
    sampling.set_seed(random());
    const SamplingParams params = Params(sampling, vocab_size);
    for (uint64_t position = 0; position < 20; ++position, ++draws) {
      PenaltyState penalties;
      ASSERT_OK_AND_ASSIGN(const SampledToken sampled, sampler.Sample(logits, params, position, penalties));
      ASSERT_EQ(sampled.token, TwinDraw(logits, params, position))
          << "round " << round << " V " << vocab_size << " position " << position << " " << sampling.ShortDebugString();
    }
  }
  EXPECT_EQ(draws, 3000);
}

// Rows as large as a real model's, where buckets are shared and weights small.
TEST(SamplerTwinTest, EqualsATwinThatSortsOnLargeRows) {
  constexpr size_t kVocabSize = 65536;
  std::mt19937 random(5);
  Sampler sampler;
  for (const float spread : {0.0f, 1e-4f, 1.0f, 3.0f, 1000.0f}) {
    std::normal_distribution<float> normal(0, 1);
    std::vector<float> logits(kVocabSize);
    for (float& logit : logits) logit = spread * normal(random);
    v1::Sampling sampling;
    sampling.set_temperature(1);
    sampling.set_top_p(0.9f);
    sampling.set_top_k(static_cast<int32_t>(spread == 1.0f ? 3000 : 0));
    sampling.set_seed(random());
    const SamplingParams params = Params(sampling, kVocabSize);
    for (uint64_t position = 0; position < 2; ++position) {
      PenaltyState penalties;
      ASSERT_OK_AND_ASSIGN(const SampledToken sampled, sampler.Sample(logits, params, position, penalties));
      EXPECT_EQ(sampled.token, TwinDraw(logits, params, position)) << "spread " << spread;
    }
  }
}

}  // namespace
}  // namespace rwkv::worker
