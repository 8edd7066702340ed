#include "services/common/sampling/sampling_params.h"

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/optional.h"
#include "gmock/gmock.h"
#include "google/protobuf/text_format.h"
#include "gtest/gtest.h"
#include "services/common/grpc_status.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::common {
namespace {

using ::rwkv::testing::StatusIs;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Pair;

v1::Sampling Sampling(const std::string& text) {
  v1::Sampling sampling;
  EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(text, &sampling)) << text;
  return sampling;
}

TEST(SamplingParamsTest, UnsetMeansGreedyWithoutCuts) {
  ASSERT_OK_AND_ASSIGN(const SamplingParams params, SamplingParams::Create({}, 10));
  EXPECT_TRUE(params.greedy());
  EXPECT_EQ(params.vocab_size(), 10);
  EXPECT_EQ(params.top_k(), 0);
  EXPECT_EQ(params.top_p(), 1);
  EXPECT_EQ(params.typical_p(), 1);
  EXPECT_EQ(params.min_p(), 0);
  EXPECT_EQ(params.presence_penalty(), 0);
  EXPECT_EQ(params.frequency_penalty(), 0);
  EXPECT_EQ(params.penalty_decay(), 0.996f);
  EXPECT_EQ(params.seed(), 0);
  EXPECT_EQ(params.order(), SamplingParams::Order::kTemperatureFirst);
}

struct BadCase {
  const char* text;
  const char* field;
  const char* value;  // In the message.
};

TEST(SamplingParamsTest, EachBadValueNamesItsFieldAndItself) {
  const BadCase kCases[] = {
      {"temperature: -0.5", "sampling.temperature", "-0.5"},
      {"temperature: 100.5", "sampling.temperature", "100.5"},
      {"temperature: nan", "sampling.temperature", "nan"},
      {"temperature: inf", "sampling.temperature", "inf"},
      {"top_k: -1", "sampling.top_k", "-1"},
      {"top_p: 0", "sampling.top_p", "0"},
      {"top_p: 1.5", "sampling.top_p", "1.5"},
      {"top_p: -0.25", "sampling.top_p", "-0.25"},
      {"top_p: nan", "sampling.top_p", "nan"},
      {"typical_p: 0", "sampling.typical_p", "0"},
      {"typical_p: nan", "sampling.typical_p", "nan"},
      {"min_p: -0.5", "sampling.min_p", "-0.5"},
      {"min_p: 1.25", "sampling.min_p", "1.25"},
      {"min_p: nan", "sampling.min_p", "nan"},
      {"presence_penalty: nan", "sampling.presence_penalty", "nan"},
      {"presence_penalty: inf", "sampling.presence_penalty", "inf"},
      {"frequency_penalty: -inf", "sampling.frequency_penalty", "-inf"},
      {"frequency_penalty: 1e9", "sampling.frequency_penalty", "1e+09"},
      {"penalty_decay: -0.5", "sampling.penalty_decay", "-0.5"},
      {"penalty_decay: 1.5", "sampling.penalty_decay", "1.5"},
      {"penalty_decay: nan", "sampling.penalty_decay", "nan"},
      {"repetition_penalty: 0", "sampling.repetition_penalty", "0"},
      {"repetition_penalty: -1", "sampling.repetition_penalty", "-1"},
      {"repetition_penalty: 1001", "sampling.repetition_penalty", "1001"},
      {"repetition_penalty: nan", "sampling.repetition_penalty", "nan"},
      {"logit_bias { key: 3 value: -1001 }", "sampling.logit_bias", "-1001"},
      {"top_logprobs: 65", "sampling.top_logprobs", "65"},
      {"logit_bias { key: 10 value: 1 }", "sampling.logit_bias", "10"},
      {"logit_bias { key: 3 value: nan }", "sampling.logit_bias", "nan"},
      {"logit_bias { key: 3 value: inf }", "sampling.logit_bias", "inf"},
  };
  for (const BadCase& bad : kCases) {
    SCOPED_TRACE(bad.text);
    const absl::Status status = SamplingParams::Create(Sampling(bad.text), 10).status();
    EXPECT_THAT(status,
                StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr(bad.field), HasSubstr(bad.value))));
    EXPECT_EQ(GetInvalidField(status), absl::optional<std::string>(bad.field));
  }
}

TEST(SamplingParamsTest, UnknownOrderIsRefused) {
  v1::Sampling sampling;
  sampling.set_order(static_cast<v1::SamplingOrder>(17));
  EXPECT_THAT(SamplingParams::Create(sampling, 10), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("17")));
}

TEST(SamplingParamsTest, TooManyBiasesAreRefused) {
  v1::Sampling sampling;
  for (uint32_t id = 0; id < 1025; ++id) (*sampling.mutable_logit_bias())[id] = 1;
  EXPECT_THAT(SamplingParams::Create(sampling, 65536), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("1025")));
  sampling.mutable_logit_bias()->erase(7);
  EXPECT_OK(SamplingParams::Create(sampling, 65536));
}

TEST(SamplingParamsTest, EdgesOfTheRangesAreAllowed) {
  EXPECT_OK(SamplingParams::Create(Sampling("temperature: 100 top_k: 2147483647 top_p: 1 typical_p: 1 min_p: 1 "
                                            "penalty_decay: 1 top_logprobs: 64 presence_penalty: -2"),
                                   10));
  EXPECT_OK(SamplingParams::Create(Sampling("temperature: 1e-45 top_p: 1e-45 typical_p: 1e-45 penalty_decay: 0"), 1));
}

TEST(SamplingParamsTest, BiasesAreSortedById) {
  ASSERT_OK_AND_ASSIGN(const SamplingParams params,
                       SamplingParams::Create(Sampling("logit_bias { key: 9 value: 1 } logit_bias { key: 2 value: -3 }"
                                                       "logit_bias { key: 5 value: 2 }"),
                                              10));
  EXPECT_THAT(params.logit_bias(), ElementsAre(Pair(2, -3), Pair(5, 2), Pair(9, 1)));
}

TEST(SamplingParamsTest, NestedRangesOfBannedIdsAreTheOuterOne) {
  const std::vector<uint32_t> banned = {0, 10, 2, 4, 12, 13};
  ASSERT_OK_AND_ASSIGN(const SamplingParams params, SamplingParams::Create({}, 100, banned));
  ASSERT_EQ(params.banned().size(), 2u);
  EXPECT_EQ(params.banned()[0].begin, 0u);
  EXPECT_EQ(params.banned()[0].end, 10u);
  EXPECT_EQ(params.banned()[1].begin, 12u);
}

TEST(SamplingParamsTest, ABiasOfMinusInfinityIsABan) {
  EXPECT_OK(SamplingParams::Create(Sampling("logit_bias { key: 3 value: -inf }"), 10));
}

TEST(SamplingParamsTest, BannedRangesAreMergedAndCutAtTheVocabulary) {
  const std::vector<uint32_t> banned = {8, 4000000000, 0, 1, 3, 5, 4, 6, 7, 7, 1, 2};
  ASSERT_OK_AND_ASSIGN(const SamplingParams params, SamplingParams::Create({}, 10, banned));
  std::vector<std::pair<uint32_t, uint32_t>> ranges;
  for (const SamplingParams::IdRange& range : params.banned()) ranges.emplace_back(range.begin, range.end);
  EXPECT_THAT(ranges, ElementsAre(Pair(0, 2), Pair(3, 6), Pair(8, 10)));
  const std::vector<uint32_t> odd = {1, 2, 3};
  EXPECT_THAT(SamplingParams::Create({}, 10, odd), StatusIs(absl::StatusCode::kInvalidArgument));
  const std::vector<uint32_t> backwards = {5, 4};
  EXPECT_THAT(SamplingParams::Create({}, 10, backwards), StatusIs(absl::StatusCode::kInvalidArgument));
}

TEST(SamplingParamsTest, CompleteSetsEveryFieldAndKeepsTheGiven) {
  const v1::Sampling complete = CompleteSampling(Sampling("temperature: 0.5 logit_bias { key: 1 value: 2 }"), 99);
  EXPECT_EQ(complete.temperature(), 0.5f);
  EXPECT_TRUE(complete.has_top_k() && complete.has_top_p() && complete.has_typical_p() && complete.has_min_p() &&
              complete.has_presence_penalty() && complete.has_frequency_penalty() && complete.has_penalty_decay());
  EXPECT_EQ(complete.seed(), 99);
  EXPECT_EQ(complete.order(), v1::SAMPLING_ORDER_TEMPERATURE_FIRST);
  EXPECT_EQ(complete.logit_bias().at(1), 2);
  EXPECT_EQ(CompleteSampling(Sampling("seed: 0"), 99).seed(), 0);
  EXPECT_OK(SamplingParams::Create(complete, 10));
}

}  // namespace
}  // namespace rwkv::common
