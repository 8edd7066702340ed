// What a load tells of its requests: quantiles, the report, the line that shows how far it is.
#include "services/rwkvctl/load/report.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <random>
#include <sstream>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/rwkvctl/load/histogram.h"
#include "services/rwkvctl/load/progress_line.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::rwkvctl {
namespace {

using ::rwkv::testing::StatusIs;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

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
