// Which requests a load sends, and when: arrivals, lengths, prompts, whose turn it is.
#include "services/rwkvctl/load/workload.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/rwkvctl/load/arrivals.h"
#include "services/rwkvctl/load/conversations.h"
#include "services/rwkvctl/load/random.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::rwkvctl {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::AllOf;
using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::Ge;
using ::testing::HasSubstr;
using ::testing::Le;
using ::testing::Not;
using ::testing::SizeIs;

std::vector<double> Seconds(const ArrivalOptions& options, int count) {
  Arrivals arrivals(options);
  std::vector<double> times;
  for (int i = 0; i < count; ++i) times.push_back(absl::ToDoubleSeconds(arrivals.Next()));
  return times;
}

TEST(ArrivalsTest, EvenlySpacedOnesBeginAtZero) {
  ArrivalOptions options;
  options.rate = 4;
  options.poisson = false;
  EXPECT_THAT(Seconds(options, 5), ElementsAre(0, 0.25, 0.5, 0.75, 1));
}

TEST(ArrivalsTest, APoissonProcessHasGapsOfMeanAndDeviationOneOverTheRate) {
  ArrivalOptions options;
  options.rate = 50;
  options.seed = 7;
  constexpr int kCount = 40000;
  const std::vector<double> times = Seconds(options, kCount);
  double sum = 0, squares = 0, previous = 0, above = 0;
  for (const double time : times) {
    const double gap = time - previous;
    ASSERT_GE(gap, 0);
    sum += gap;
    squares += gap * gap;
    above += gap > 2 / options.rate;
    previous = time;
  }
  // Five standard errors of each: 1 / sqrt(n) of the mean, about twice that of the deviation.
  const double mean = sum / kCount;
  EXPECT_NEAR(mean * options.rate, 1, 0.025);
  EXPECT_NEAR(std::sqrt(squares / kCount - mean * mean) * options.rate, 1, 0.05);
  EXPECT_NEAR(above / kCount, std::exp(-2), 0.01);
  EXPECT_EQ(Seconds(options, 10), std::vector<double>(times.begin(), times.begin() + 10));
  options.seed = 8;
  EXPECT_NE(Seconds(options, 1)[0], times[0]);
}

TEST(ArrivalsTest, ARampRisesInAStraightLineAndThenStaysAtTheRate) {
  for (const bool poisson : {false, true}) {
    ArrivalOptions options;
    options.rate = 1000;
    options.poisson = poisson;
    options.ramp = absl::Seconds(10);
    const std::vector<double> times = Seconds(options, 20000);
    // By t seconds: rate * t^2 / (2 * ramp) within the ramp, rate * (t - ramp / 2) after it.
    const auto by = [&](double t) { return std::lower_bound(times.begin(), times.end(), t) - times.begin(); };
    const double tolerance = poisson ? 5 : 0.1;  // Standard deviations: the root of the count.
    for (const auto& [t, expected] : {std::pair<double, double>{5, 1250}, {10, 5000}, {12, 7000}, {20, 15000}}) {
      EXPECT_NEAR(by(t), expected, tolerance * std::sqrt(expected)) << "by " << t << " s, poisson " << poisson;
    }
  }
}

TEST(RandomTest, UniformReachesBothEndsAndNothingElse) {
  LoadRandom random(1, 2);
  std::vector<int> counts(4);
  for (int i = 0; i < 40000; ++i) {
    const uint32_t value = random.Uniform(5, 8);
    ASSERT_THAT(value, AllOf(Ge(5u), Le(8u)));
    ++counts[value - 5];
  }
  EXPECT_THAT(counts, Each(AllOf(Ge(9500), Le(10500))));
  EXPECT_EQ(random.Uniform(3, 3), 3);
  EXPECT_NE(LoadRandom(1, 2).Next(), LoadRandom(2, 1).Next());
  EXPECT_NE(LoadRandom(0, 1).Next(), LoadRandom(0, 2).Next());
  EXPECT_EQ(LoadRandom(9, 9).Next(), LoadRandom(9, 9).Next());
}

TEST(WorkloadTest, LengthsAreOneNumberOrARange) {
  const auto one = ParseLengthRange("64", 1);
  ASSERT_THAT(one, IsOk());
  EXPECT_THAT((std::vector<uint32_t>{one->first, one->last}), ElementsAre(64, 64));
  const auto two = ParseLengthRange("16..512", 1);
  ASSERT_THAT(two, IsOk());
  EXPECT_THAT((std::vector<uint32_t>{two->first, two->last}), ElementsAre(16, 512));
  EXPECT_THAT(ParseLengthRange("0", 0), IsOk());
  for (const char* wrong : {"", "0", "0..5", "5..4", "5..", "..5", "a", "1..b", "1.5", "-1", "1..2..3", "4194305"}) {
    EXPECT_THAT(ParseLengthRange(wrong, 1), Not(IsOk())) << wrong;
  }
}

TEST(WorkloadTest, ATraceIsReadAndItsConversationsNumbered) {
  const auto trace = ParseTrace(
      "{\"offset\": 0.5, \"prompt_tokens\": 3, \"max_tokens\": 0, \"session\": \"b\"}\n\n"
      "{\"offset\": 1, \"prompt_tokens\": 4, \"max_tokens\": 5, \"note\": true}\r\n"
      "{\"offset\": 1, \"prompt_tokens\": 6, \"max_tokens\": 7, \"session\": 9}\n"
      "{\"offset\": 2e1, \"prompt_tokens\": 8, \"max_tokens\": 9, \"session\": \"b\"}");
  ASSERT_THAT(trace, IsOk());
  ASSERT_THAT(trace->requests, SizeIs(4));
  EXPECT_EQ(trace->conversations, 2);
  EXPECT_EQ(trace->requests[0].due, absl::Milliseconds(500));
  EXPECT_EQ(trace->requests[0].prompt_tokens, 3);
  EXPECT_EQ(trace->requests[0].max_tokens, 0);
  EXPECT_EQ(trace->requests[0].conversation, 0);
  EXPECT_FALSE(trace->requests[1].conversation.has_value());
  EXPECT_EQ(trace->requests[2].conversation, 1);
  EXPECT_EQ(trace->requests[3].conversation, 0);
  EXPECT_EQ(trace->requests[3].due, absl::Seconds(20));
}

TEST(WorkloadTest, ATraceNamesTheLineThatIsWrong) {
  const std::string good = "{\"offset\": 1, \"prompt_tokens\": 3, \"max_tokens\": 2}\n";
  struct Case {
    std::string line;
    const char* message;
  };
  const Case kCases[] = {
      {"[1]", "no JSON object"},
      {"{\"offset\": 1", "no JSON object"},
      {"{\"prompt_tokens\": 3, \"max_tokens\": 2}", "\"offset\""},
      {"{\"offset\": -1, \"prompt_tokens\": 3, \"max_tokens\": 2}", "\"offset\""},
      {"{\"offset\": 1e300, \"prompt_tokens\": 3, \"max_tokens\": 2}", "\"offset\""},
      {"{\"offset\": \"1\", \"prompt_tokens\": 3, \"max_tokens\": 2}", "\"offset\""},
      {"{\"offset\": 0.5, \"prompt_tokens\": 3, \"max_tokens\": 2}", "before"},
      {"{\"offset\": 1, \"prompt_tokens\": 0, \"max_tokens\": 2}", "\"prompt_tokens\""},
      {"{\"offset\": 1, \"prompt_tokens\": 4194305, \"max_tokens\": 2}", "\"prompt_tokens\""},
      {"{\"offset\": 1, \"prompt_tokens\": 3}", "\"max_tokens\""},
      {"{\"offset\": 1, \"prompt_tokens\": 3, \"max_tokens\": 2.5}", "\"max_tokens\""},
      {"{\"offset\": 1, \"prompt_tokens\": 3, \"max_tokens\": 2, \"session\": []}", "\"session\""},
  };
  for (const Case& wrong : kCases) {
    EXPECT_THAT(ParseTrace(absl::StrCat(good, wrong.line)),
                StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr("line 2"), HasSubstr(wrong.message))))
        << wrong.line;
  }
  EXPECT_THAT(ParseTrace("\n \n"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("no request")));
}

TEST(WorkloadTest, RequestsDependOnTheSeedAndTheirNumberAlone) {
  WorkloadOptions options;
  options.seed = 5;
  options.prompt_tokens = {10, 20};
  options.max_tokens = {1, 1000};
  options.requests = 200;
  Workload closed(options);
  options.arrivals.emplace();
  options.arrivals->rate = 100;
  Workload open(options);
  std::vector<uint32_t> prompts;
  absl::Duration last;
  for (uint64_t i = 0; i < 200; ++i) {
    const auto a = closed.Next();
    const auto b = open.Next();
    ASSERT_TRUE(a.has_value() && b.has_value());
    EXPECT_EQ(a->index, i);
    EXPECT_FALSE(a->due.has_value());
    ASSERT_TRUE(b->due.has_value());
    EXPECT_GE(*b->due, last);
    last = *b->due;
    EXPECT_EQ(a->prompt_tokens, b->prompt_tokens);
    EXPECT_EQ(a->max_tokens, b->max_tokens);
    prompts.push_back(a->prompt_tokens);
  }
  EXPECT_FALSE(closed.Next().has_value());
  EXPECT_THAT(prompts, Each(AllOf(Ge(10u), Le(20u))));
  EXPECT_EQ(*std::min_element(prompts.begin(), prompts.end()), 10);
  EXPECT_EQ(*std::max_element(prompts.begin(), prompts.end()), 20);

  options.seed = 6;
  EXPECT_NE(Workload(options).Next()->due, Arrivals({100, true, absl::ZeroDuration(), 5}).Next());
}

TEST(WorkloadTest, DurationEndsWhatIsDueAtItsEndOrLater) {
  WorkloadOptions options;
  options.arrivals.emplace();
  options.arrivals->rate = 10;
  options.arrivals->poisson = false;
  options.duration = absl::Seconds(1);
  Workload workload(options);
  int count = 0;
  while (workload.Next().has_value()) ++count;
  EXPECT_EQ(count, 10);  // 0, 0.1, ... 0.9.

  WorkloadOptions of_trace;
  const auto trace = ParseTrace(
      "{\"offset\": 0, \"prompt_tokens\": 3, \"max_tokens\": 0}\n{\"offset\": 1, \"prompt_tokens\": 4, "
      "\"max_tokens\": 1}\n{\"offset\": 2, \"prompt_tokens\": 4, \"max_tokens\": 1}\n");
  ASSERT_THAT(trace, IsOk());
  of_trace.trace = *trace;
  of_trace.duration = absl::Seconds(2);
  Workload two(of_trace);
  EXPECT_EQ(two.Next()->prompt_tokens, 3);
  EXPECT_EQ(two.Next()->due, absl::Seconds(1));
  EXPECT_FALSE(two.Next().has_value());
}

TEST(WorkloadTest, PromptsAreSeededAndNeverHaveTheEndOfText) {
  const std::vector<uint32_t> prompt = RandomPrompt(1, 2, 5000, 4);
  EXPECT_THAT(prompt, AllOf(SizeIs(5000), Each(AllOf(Ge(1u), Le(3u)))));
  for (const uint32_t id : {1, 2, 3}) EXPECT_GT(std::count(prompt.begin(), prompt.end(), id), 1500);
  EXPECT_EQ(RandomPrompt(1, 2, 5000, 4), prompt);
  EXPECT_NE(RandomPrompt(1, 3, 5000, 4), prompt);
  EXPECT_NE(RandomPrompt(2, 2, 5000, 4), prompt);
  EXPECT_THAT(RandomPrompt(1, 2, 3, 2), ElementsAre(1, 1, 1));
}

TEST(ConversationsTest, TheOneThatIsIdleForLongestComesFirst) {
  Conversations conversations(2);
  EXPECT_EQ(conversations.TakeIdle(), 0);
  EXPECT_EQ(conversations.TakeIdle(), 1);
  EXPECT_FALSE(conversations.HasIdle());
  conversations.GiveBack(1);
  conversations.GiveBack(0);
  EXPECT_EQ(conversations.TakeIdle(), 1);
}

TEST(ConversationsTest, TurnsOfOneAreCalledInOrderAlsoPastThoseThatGaveUp) {
  Conversations conversations(2);
  EXPECT_EQ(conversations.Enqueue(1), 0);
  EXPECT_EQ(conversations.Enqueue(1), 1);
  EXPECT_EQ(conversations.Enqueue(1), 2);
  EXPECT_EQ(conversations.Enqueue(0), 0);
  EXPECT_TRUE(conversations.IsCalled(1, 0));
  EXPECT_TRUE(conversations.IsCalled(0, 0));
  EXPECT_FALSE(conversations.IsCalled(1, 1));
  conversations.End(1, 1);  // It did not want to wait.
  EXPECT_TRUE(conversations.IsCalled(1, 0));
  conversations.End(1, 0);
  EXPECT_TRUE(conversations.IsCalled(1, 2));
}

}  // namespace
}  // namespace rwkv::rwkvctl
