// What a load is made of, without a clock: arrivals, lengths, prompts, whose turn it is, quantiles, the report.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <random>
#include <sstream>
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
#include "services/rwkvctl/load/histogram.h"
#include "services/rwkvctl/load/progress_line.h"
#include "services/rwkvctl/load/random.h"
#include "services/rwkvctl/load/report.h"
#include "services/rwkvctl/load/workload.h"
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

// The quantile of the times themselves, by nearest rank.
absl::Duration Exact(std::vector<absl::Duration> times, double q) {
  std::sort(times.begin(), times.end());
  const auto rank = static_cast<size_t>(std::ceil(q * static_cast<double>(times.size())));
  return times[std::max<size_t>(rank, 1) - 1];
}

TEST(HistogramTest, QuantilesAreWithinTheErrorOfTheExactOnes) {
  std::mt19937_64 random(3);
  std::lognormal_distribution<double> latencies(-3, 2);
  std::uniform_real_distribution<double> flat(0, 5);
  std::bernoulli_distribution slow(0.01);
  const std::vector<std::function<double()>> kinds = {
      [&] { return latencies(random); }, [&] { return flat(random); },
      [&] { return slow(random) ? 30.0 : 0.01; },  // Two humps, nothing between.
      [&] { return 1e-9 * std::floor(flat(random) * 60); }};
  for (size_t kind = 0; kind < kinds.size(); ++kind) {
    for (const int count : {1, 2, 3, 100, 10000}) {
      DurationHistogram histogram;
      std::vector<absl::Duration> times;
      for (int i = 0; i < count; ++i) {
        times.push_back(absl::Nanoseconds(std::floor(kinds[kind]() * 1e9)));
        histogram.Add(times.back());
      }
      for (const double q : {0.0, 0.01, 0.5, 0.9, 0.99, 0.999, 1.0}) {
        const absl::Duration exact = Exact(times, q);
        EXPECT_LE(absl::AbsDuration(histogram.Quantile(q) - exact), exact * DurationHistogram::kRelativeError)
            << "kind " << kind << ", " << count << " times, q " << q << ": " << histogram.Quantile(q) << ", exactly "
            << exact;
      }
      EXPECT_EQ(histogram.min(), Exact(times, 0));
      EXPECT_EQ(histogram.max(), Exact(times, 1));
      EXPECT_EQ(histogram.count(), count);
      absl::Duration sum;
      for (const absl::Duration time : times) sum += time;
      EXPECT_NEAR(absl::ToDoubleSeconds(histogram.mean()), absl::ToDoubleSeconds(sum) / count, 1.5e-9);
    }
  }
}

TEST(HistogramTest, EveryPowerOfTwoAndItsNeighboursAreWithinTheError) {
  for (int bit = 0; bit < 63; ++bit) {
    for (const int64_t neighbour : {-1, 0, 1}) {
      const int64_t value = (int64_t{1} << bit) + neighbour;
      DurationHistogram histogram;
      // Beside others, so that neither the smallest nor the largest time helps.
      histogram.Add(absl::ZeroDuration());
      histogram.Add(absl::Nanoseconds(value));
      histogram.Add(absl::InfiniteDuration());
      const double read = static_cast<double>(absl::ToInt64Nanoseconds(histogram.Quantile(0.5)));
      EXPECT_LE(std::abs(read - static_cast<double>(value)),
                static_cast<double>(value) * DurationHistogram::kRelativeError)
          << value;
    }
  }
}

TEST(HistogramTest, WithoutTimesAllIsZeroAndNegativeOnesCountAsZero) {
  DurationHistogram histogram;
  EXPECT_EQ(histogram.Quantile(0.5), absl::ZeroDuration());
  EXPECT_EQ(histogram.mean(), absl::ZeroDuration());
  EXPECT_EQ(histogram.max(), absl::ZeroDuration());
  histogram.Add(-absl::Seconds(1));
  EXPECT_EQ(histogram.max(), absl::ZeroDuration());
  EXPECT_EQ(histogram.Quantile(1), absl::ZeroDuration());
  EXPECT_EQ(histogram.count(), 1);
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

RequestOutcome Outcome(double due, double sent, const std::vector<double>& tokens, double ended) {
  RequestOutcome outcome;
  outcome.due = absl::Seconds(due);
  outcome.sent = absl::Seconds(sent);
  for (const double token : tokens) outcome.tokens.push_back(absl::Seconds(token));
  outcome.ended = absl::Seconds(ended);
  outcome.prompt_tokens = 10;
  outcome.reused_tokens = 3;
  return outcome;
}

TEST(ReportTest, CountsEachTokenAndTimesFromWhenARequestWasDue) {
  LoadReport report({absl::Seconds(2), absl::Seconds(1)});
  report.Add(Outcome(1, 1.5, {3, 4, 5}, 5));            // 2 s to the first token, 1 s between: just good.
  report.Add(Outcome(2, 2, {4.5, 5}, 6));               // Late.
  report.Add(Outcome(3, 3, {4, 5, 6.5}, 7));            // Slow: 1.25 s on average.
  report.Add(Outcome(3, 3, {}, 4));                     // Nothing but its input: good.
  RequestOutcome failed = Outcome(4, 4, {4.5, 5}, 10);  // Its tokens came, and count.
  failed.status = absl::UnavailableError("gone");
  failed.refused_after = {absl::Milliseconds(4), absl::Milliseconds(7)};
  report.Add(failed);
  RequestOutcome never = Outcome(5, 0, {}, 6);
  never.sent = absl::InfiniteDuration();
  never.status = absl::DeadlineExceededError("late");
  report.Add(never);
  RequestOutcome stopped = Outcome(5, 5, {6}, 8);
  stopped.status = absl::CancelledError("stopped");
  stopped.interrupted = true;
  report.Add(stopped);

  EXPECT_EQ(report.completed, 4);
  EXPECT_EQ(report.good, 2);
  EXPECT_EQ(report.good_tokens, 3);
  EXPECT_EQ(report.failed(), 2);
  EXPECT_EQ(report.interrupted, 1);
  EXPECT_EQ(report.refusal.count(), 2);
  EXPECT_EQ(report.refusal.max(), absl::Milliseconds(7));
  EXPECT_EQ(report.generated_tokens, 11);
  EXPECT_EQ(report.prompt_tokens, 40);
  EXPECT_EQ(report.reused_tokens, 12);
  EXPECT_THAT(report.first_error, StatusIs(absl::StatusCode::kUnavailable));
  EXPECT_EQ(report.ttft.count(), 5);
  EXPECT_EQ(report.ttft.max(), absl::Milliseconds(2500));
  EXPECT_EQ(report.inter_token.count(), 6);
  EXPECT_EQ(report.inter_token.max(), absl::Milliseconds(1500));
  EXPECT_EQ(report.end_to_end.count(), 4);
  EXPECT_EQ(report.end_to_end.max(), absl::Seconds(4));
  EXPECT_EQ(report.send_delay.count(), 6);
  EXPECT_EQ(report.send_delay.max(), absl::Milliseconds(500));
  EXPECT_EQ(report.elapsed, absl::Seconds(10));

  const Json json = LoadReportToJson(report);
  EXPECT_EQ(json["requests"]["completed"], 4);
  EXPECT_EQ(json["requests"]["per_second"], 0.4);
  EXPECT_EQ(json["errors"].dump(), "{\"DEADLINE_EXCEEDED\":1,\"UNAVAILABLE\":1}");
  EXPECT_EQ(json["tokens"]["generated"], 11);
  EXPECT_EQ(json["tokens"]["generated_per_second"], 1.1);
  EXPECT_EQ(json["tokens"]["prompt_per_second"], 4.0);
  EXPECT_EQ(json["ttft_seconds"]["max"], 2.5);
  EXPECT_EQ(json["inter_token_seconds"]["count"], 6);
  EXPECT_EQ(json["end_to_end_seconds"]["max"], 4.0);
  EXPECT_EQ(json["send_delay_seconds"]["max"], 0.5);
  EXPECT_EQ(json["requests"]["refusals"], 2);
  EXPECT_EQ(json["refusal_seconds"]["max"], 0.007);
  EXPECT_EQ(json["goodput"]["ttft_limit_seconds"], 2.0);
  EXPECT_EQ(json["goodput"]["requests_per_second"], 0.2);
  EXPECT_EQ(json["goodput"]["tokens_per_second"], 0.3);
  EXPECT_THAT(LoadReportToTable(report),
              AllOf(HasSubstr("first token"), HasSubstr("until refused"), HasSubstr("2.5 s"),
                    HasSubstr("failed: UNAVAILABLE        1"), HasSubstr("within the limits"), HasSubstr("interrupted"),
                    HasSubstr("1.1/s"), HasSubstr("in 10 s")));
}

TEST(ReportTest, OnlyWhatEndsAndComesInTheMeasuredTimeCounts) {
  LoadReport report({absl::Seconds(2), absl::nullopt}, {absl::Seconds(10), absl::Seconds(20)});
  RequestOutcome early = Outcome(1, 1, {8, 9}, 9.5);
  early.refused_after = {absl::Milliseconds(4)};
  report.Add(early);
  report.Add(Outcome(8, 8, {9, 11, 14}, 14));       // Completed, and good; two of its tokens came in time.
  report.Add(Outcome(15, 15, {19, 19.5, 20}, 20));  // Two of its tokens; it ended too late.
  report.Add(Outcome(12, 12.5, {15}, 19));          // Completed, and late.
  RequestOutcome failed = Outcome(16, 16, {}, 21);
  failed.status = absl::UnavailableError("gone");
  report.Add(failed);

  EXPECT_EQ(report.completed, 2);
  EXPECT_EQ(report.good, 1);
  EXPECT_EQ(report.failed(), 0);
  EXPECT_EQ(report.generated_tokens, 5);
  EXPECT_EQ(report.inter_token.count(), 3);
  EXPECT_EQ(report.inter_token.max(), absl::Seconds(3));
  EXPECT_EQ(report.ttft.count(), 2);
  EXPECT_EQ(report.end_to_end.max(), absl::Seconds(7));
  EXPECT_EQ(report.send_delay.count(), 2);
  EXPECT_EQ(report.refusal.count(), 0);
  EXPECT_EQ(report.elapsed, absl::Seconds(10));
  EXPECT_EQ(LoadReportToJson(report)["requests"]["per_second"], 0.2);

  LoadReport short_one({}, {absl::Seconds(10), absl::Seconds(20)});
  short_one.Add(Outcome(1, 1, {8}, 9));
  EXPECT_EQ(short_one.elapsed, absl::ZeroDuration());
  short_one.Add(Outcome(1, 1, {8}, 14));
  EXPECT_EQ(short_one.elapsed, absl::Seconds(4));
}

TEST(ReportTest, WithoutRequestsThereAreNoRatesAndNoTimes) {
  const LoadReport report({});
  EXPECT_EQ(LoadReportToJson(report)["requests"]["per_second"], 0.0);
  EXPECT_EQ(LoadReportToJson(report)["goodput"].count("ttft_limit_seconds"), 0);
  EXPECT_THAT(LoadReportToTable(report), AllOf(HasSubstr("first token     -"), Not(HasSubstr("limits"))));
}

TEST(ReportTest, TimesHaveThreeDigits) {
  EXPECT_EQ(ShortDuration(absl::ZeroDuration()), "0");
  EXPECT_EQ(ShortDuration(absl::Nanoseconds(1500)), "1.5 us");
  EXPECT_EQ(ShortDuration(absl::Microseconds(12345)), "12.3 ms");
  EXPECT_EQ(ShortDuration(absl::Nanoseconds(999900000)), "1 s");
  EXPECT_EQ(ShortDuration(absl::Milliseconds(61230)), "61.2 s");
  EXPECT_EQ(ShortDuration(absl::Seconds(3661)), "3661 s");
}

TEST(ProgressLineTest, IsALineWithTheRateSinceTheLast) {
  std::ostringstream out;
  {
    LoadProgressLine line(out, /*is_terminal=*/false);
    EXPECT_EQ(line.interval(), absl::Seconds(10));
    line.Update({absl::Seconds(10), 9, 4, 2, 1, 300, absl::Milliseconds(20)});
    line.Update({absl::Seconds(20), 12, 8, 3, 1, 1100, absl::Milliseconds(1500)});
  }
  EXPECT_EQ(out.str(),
            "10 s: 9 sent, 3 in flight, 4 completed, 2 failed, 1 refused, 30.0 tokens/s, first token 20 ms\n"
            "20 s: 12 sent, 1 in flight, 8 completed, 3 failed, 1 refused, 80.0 tokens/s, first token 1.5 s\n");
}

TEST(ProgressLineTest, IsDrawnOverOnATerminalAndWipedAtTheEnd) {
  std::ostringstream out;
  {
    LoadProgressLine line(out, /*is_terminal=*/true);
    EXPECT_EQ(line.interval(), absl::Seconds(1));
    line.Update({absl::Seconds(1), 1, 0, 0, 0, 2, absl::ZeroDuration()});
  }
  EXPECT_EQ(out.str(),
            "\r\x1b[K1 s: 1 sent, 1 in flight, 0 completed, 0 failed, 0 refused, 2.0 tokens/s, first token 0\r\x1b[K");
  std::ostringstream untouched;
  { const LoadProgressLine line(untouched, /*is_terminal=*/true); }
  EXPECT_EQ(untouched.str(), "");
}

}  // namespace
}  // namespace rwkv::rwkvctl
