#include "services/common/tracing/tracer.h"

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/common/metrics.h"
#include "services/common/tracing/trace_context.h"
#include "tests/testing/span_collector.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/wait_until.h"

namespace rwkv::common {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::SpanCollector;
using ::rwkv::testing::StatusIs;
using ::testing::HasSubstr;
using ::testing::SizeIs;
using Received = std::vector<SpanCollector::Received>;

constexpr char kParent[] = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
constexpr char kUnsampled[] = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00";
const absl::Duration kPatience = absl::Seconds(30);

class TracerTest : public ::testing::Test {
 protected:
  TracerTest() : metrics_(*Metrics::Create("")) {
    options_.endpoint = collector_.address();
    options_.service = "rwkv-test";
    options_.process = "test-0";
  }

  double Count(const std::string& result) {
    return metrics_->Counter("rwkv_trace_spans_total", "", {{"result", result}}).Value();
  }
  std::unique_ptr<Tracer> Create() {
    absl::StatusOr<std::unique_ptr<Tracer>> tracer = Tracer::Create(options_, metrics_.get());
    EXPECT_OK(tracer.status());
    return *std::move(tracer);
  }

  SpanCollector collector_;
  std::unique_ptr<Metrics> metrics_;
  Tracer::Options options_;
};

TEST_F(TracerTest, ASpanComesWithItsParentAndItsProcess) {
  const std::unique_ptr<Tracer> tracer = Create();
  std::unique_ptr<Span> span = tracer->Begin("work", Span::kServer, ParseTraceParent(kParent, "vendor=abc"));
  ASSERT_NE(span, nullptr);
  span->Set("text", "words");
  span->Set("number", int64_t{5});
  span->SetError("it broke");
  const std::unique_ptr<Span> child = tracer->Begin("part", Span::kInternal, span->context());
  child->End();
  span->End();
  span->Set("late", "nobody sees it");
  ASSERT_TRUE(collector_.WaitUntil([](const Received& spans) { return spans.size() == 2; }, absl::Now() + kPatience));
  const Received spans = collector_.spans();
  EXPECT_EQ(spans[0].process, "test-0");
  EXPECT_EQ(spans[0].service, "rwkv-test");
  EXPECT_EQ(spans[0].span.parent_span_id(), spans[1].span.span_id());
  EXPECT_EQ(spans[0].span.trace_id(), spans[1].span.trace_id());
  EXPECT_EQ(spans[1].span.parent_span_id(), ParseTraceParent(kParent).span_id);
  EXPECT_EQ(spans[1].span.trace_id(), ParseTraceParent(kParent).trace_id);
  EXPECT_EQ(spans[1].span.trace_state(), "vendor=abc");
  EXPECT_EQ(spans[1].Attribute("text"), "words");
  EXPECT_EQ(spans[1].Attribute("number"), "5");
  EXPECT_EQ(spans[1].Attribute("late"), "");
  EXPECT_EQ(spans[1].span.status().message(), "it broke");
  EXPECT_GE(spans[1].span.end_time_unix_nano(), spans[1].span.start_time_unix_nano());
}

TEST_F(TracerTest, WhoBeganTheTraceDecides) {
  options_.sample = 0;
  std::unique_ptr<Tracer> tracer = Create();
  EXPECT_NE(tracer->Begin("a", Span::kServer, ParseTraceParent(kParent)), nullptr);
  EXPECT_EQ(tracer->Begin("b", Span::kServer, ParseTraceParent(kUnsampled)), nullptr);
  EXPECT_EQ(tracer->Begin("c", Span::kServer, {}), nullptr);
  options_.sample = 1;
  tracer = Create();
  EXPECT_NE(tracer->Begin("d", Span::kServer, {}), nullptr);
  EXPECT_EQ(tracer->Begin("e", Span::kServer, ParseTraceParent(kUnsampled)), nullptr);
}

TEST_F(TracerTest, AShareOfTheTracesThatBeginHereIsTaken) {
  options_.sample = 0.25;
  options_.max_queued = 10000;
  const std::unique_ptr<Tracer> tracer = Create();
  int taken = 0;
  for (int i = 0; i < 4000; ++i) taken += tracer->Begin("a", Span::kServer, {}) != nullptr ? 1 : 0;
  EXPECT_NEAR(taken, 1000, 200);  // Seven standard deviations.
}

TEST_F(TracerTest, WhatIsLeftAtTheEndIsSent) {
  options_.interval = absl::Hours(1);
  options_.flush_timeout = kPatience;
  std::unique_ptr<Tracer> tracer = Create();
  for (int i = 0; i < 1000; ++i) tracer->Begin(absl::StrCat(i), Span::kInternal, {});
  tracer = nullptr;
  EXPECT_THAT(collector_.spans(), SizeIs(1000));
  EXPECT_EQ(Count("exported"), 1000);
  EXPECT_EQ(Count("dropped"), 0);
}

TEST_F(TracerTest, ACollectorThatHangsCostsNothingButItsSpans) {
  collector_.Hang(true);
  options_.max_queued = 100;
  options_.max_batch = 10;
  options_.flush_timeout = absl::Milliseconds(50);
  std::unique_ptr<Tracer> tracer = Create();
  const absl::Time begin = absl::Now();
  for (int i = 0; i < 10000; ++i) tracer->Begin("a", Span::kInternal, {});
  tracer = nullptr;
  EXPECT_LT(absl::Now() - begin, options_.export_timeout);  // Neither recording nor the end waited for it.
  EXPECT_EQ(Count("dropped"), 10000);
  EXPECT_EQ(Count("exported"), 0);
}

TEST_F(TracerTest, ACollectorThatIsNotThereCostsNothingButItsSpans) {
  options_.endpoint = "127.0.0.1:1";
  options_.flush_timeout = absl::Milliseconds(50);
  std::unique_ptr<Tracer> tracer = Create();
  for (int i = 0; i < 10000; ++i) tracer->Begin("a", Span::kInternal, {});
  const absl::Time begin = absl::Now();
  tracer = nullptr;
  EXPECT_LT(absl::Now() - begin, options_.export_timeout);
  EXPECT_EQ(Count("dropped"), 10000);
}

TEST_F(TracerTest, ACollectorThatComesBackGetsWhatIsStillThere) {
  collector_.Hang(true);
  options_.export_timeout = absl::Milliseconds(100);
  options_.max_tries = 1000;
  const std::unique_ptr<Tracer> tracer = Create();
  tracer->Begin("a", Span::kInternal, {});
  ASSERT_TRUE(testing::WaitUntil([this] { return collector_.calls() >= 2; }, kPatience));  // It is tried again.
  collector_.Hang(false);
  EXPECT_TRUE(collector_.WaitUntil([](const Received& spans) { return !spans.empty(); }, absl::Now() + kPatience));
}

TEST_F(TracerTest, WithoutACollectorThereIsNothing) {
  options_.endpoint = "";
  EXPECT_EQ(Create(), nullptr);
}

TEST_F(TracerTest, WrongOptionsAreNamed) {
  options_.endpoint = "https://collector";
  EXPECT_THAT(Tracer::Create(options_, metrics_.get()).status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("collector")));
  options_.endpoint = collector_.address();
  options_.sample = 1.5;
  EXPECT_THAT(Tracer::Create(options_, metrics_.get()).status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("1.5")));
}

}  // namespace
}  // namespace rwkv::common
