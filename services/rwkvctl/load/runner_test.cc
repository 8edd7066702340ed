// A load's runner against a router in memory, in time that a test turns: one request runs at a time.
#include "services/rwkvctl/load/runner.h"

#include <algorithm>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/generation.pb.h"
#include "services/common/grpc_status.h"
#include "services/router/client/fake_router_client.h"
#include "services/router/client/router_client.h"
#include "services/rwkvctl/load/load_clock.h"
#include "services/rwkvctl/load/report.h"
#include "services/rwkvctl/load/workload.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::rwkvctl {
namespace {

using ::rwkv::testing::StatusIs;
using ::testing::AllOf;
using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::Ge;
using ::testing::IsEmpty;
using ::testing::Le;
using ::testing::Pair;
using ::testing::SizeIs;

// Stands still until somebody turns it, or waits for a time. For one thread that sends.
class FakeLoadClock : public LoadClock {
 public:
  absl::Duration Now() override {
    absl::MutexLock lock(&mutex_);
    return now_;
  }
  bool AwaitUntil(absl::Mutex& mutex, const absl::Condition& condition, absl::Duration time) override {
    mutex.AssertHeld();
    if (time == absl::InfiniteDuration()) {
      mutex.Await(condition);
      return true;
    }
    if (condition.Eval()) return true;
    absl::MutexLock lock(&mutex_);
    now_ = std::max(now_, time);
    return false;
  }
  void Advance(absl::Duration duration) {
    absl::MutexLock lock(&mutex_);
    now_ += duration;
  }

 private:
  absl::Mutex mutex_;
  absl::Duration now_ ABSL_GUARDED_BY(mutex_) = absl::Seconds(1000);
};

// One request at a time, each token half a second after what was before it.
class LoadRunnerTest : public ::testing::Test {
 protected:
  LoadRunnerTest() {
    state_.answer = "abcdefgh";
    state_.on_token = [this](uint64_t) { clock_.Advance(absl::Milliseconds(500)); };
    options_.vocab_size = 256;
    options_.workload.prompt_tokens = {3, 3};
    options_.workload.max_tokens = {2, 2};
  }

  void SetConstantRate(double rate) {
    options_.workload.arrivals.emplace();
    options_.workload.arrivals->rate = rate;
    options_.workload.arrivals->poisson = false;
  }

  LoadReport Run() {
    LoadRunner runner(options_, &client_, &clock_, [](const LoadProgress&) {});
    return runner.Run();
  }

  FakeLoadClock clock_;
  LoadOptions options_;
  router::FakeRouterClient::State state_;
  router::FakeRouterClient client_{&state_};
};

TEST_F(LoadRunnerTest, TimesCountFromWhenARequestIsDueAlsoWhenItIsSentLate) {
  SetConstantRate(10);
  options_.workload.requests = 5;
  const LoadReport report = Run();
  // Each takes a second, and one begins where the one before ends, though they are due every tenth of a second.
  EXPECT_EQ(report.completed, 5);
  EXPECT_EQ(report.ttft.min(), absl::Milliseconds(500));
  EXPECT_EQ(report.ttft.max(), absl::Milliseconds(4500 - 400));
  EXPECT_EQ(report.end_to_end.max(), absl::Milliseconds(5000 - 400));
  EXPECT_EQ(report.send_delay.max(), absl::Milliseconds(4000 - 400));
  EXPECT_EQ(report.send_delay.min(), absl::ZeroDuration());
  EXPECT_EQ(report.inter_token.count(), 5);
  EXPECT_EQ(report.inter_token.max(), absl::Milliseconds(500));
  EXPECT_EQ(report.elapsed, absl::Seconds(5));
  EXPECT_EQ(report.generated_tokens, 10);
  EXPECT_EQ(report.prompt_tokens, 15);
}

TEST_F(LoadRunnerTest, WhatIsDueLaterWaitsForItsTime) {
  SetConstantRate(0.5);
  options_.workload.requests = 3;
  const LoadReport report = Run();
  EXPECT_EQ(report.ttft.max(), absl::Milliseconds(500));
  EXPECT_EQ(report.elapsed, absl::Seconds(5));  // Due at 0, 2, 4 s.
}

TEST_F(LoadRunnerTest, AClosedLoopBeginsNothingAfterItsDuration) {
  options_.workload.duration = absl::Milliseconds(3500);
  const LoadReport report = Run();
  EXPECT_EQ(report.completed, 4);
  EXPECT_EQ(report.elapsed, absl::Seconds(4));
  EXPECT_EQ(report.send_delay.max(), absl::ZeroDuration());
}

TEST_F(LoadRunnerTest, RequestsCarryTheirPromptLengthAndSampling) {
  options_.workload.requests = 2;
  options_.workload.seed = 4;
  options_.model = "fake";
  options_.sampling.set_temperature(0.5f);
  Run();
  ASSERT_THAT(state_.generate_requests, SizeIs(2));
  for (uint64_t index = 0; index < 2; ++index) {
    const v1::GenerateRequest& request = state_.generate_requests[index];
    EXPECT_EQ(request.model(), "fake");
    EXPECT_EQ(std::vector<uint32_t>(request.tokens().ids().begin(), request.tokens().ids().end()),
              RandomPrompt(4, index, 3, 256));
    EXPECT_EQ(request.max_tokens(), 2);
    EXPECT_EQ(request.sampling().temperature(), 0.5f);
    EXPECT_TRUE(request.ignore_end_of_text());
    EXPECT_EQ(request.session_id(), "");
  }
  EXPECT_THAT(state_.generate_deadlines, Each(absl::InfiniteFuture()));
}

TEST_F(LoadRunnerTest, ConversationsTakeTurnsAndEndWithTheirSessions) {
  options_.workload.requests = 7;
  options_.sessions = 2;
  options_.turns = 3;
  options_.keep_sessions = true;
  const LoadReport report = Run();
  EXPECT_EQ(report.completed, 7);
  std::vector<std::string> ids;
  for (const v1::GenerateRequest& request : state_.generate_requests) ids.push_back(request.session_id());
  // Two have three turns each, in turn, and then another begins.
  ASSERT_THAT(ids, SizeIs(7));
  EXPECT_THAT(ids, ElementsAre(ids[0], ids[1], ids[0], ids[1], ids[0], ids[1], ids[6]));
  EXPECT_THAT((std::set<std::string>{ids[0], ids[1], ids[6]}), SizeIs(3));
  EXPECT_THAT(state_.logs, SizeIs(3));
  EXPECT_THAT(state_.logs[ids[0]], SizeIs(3 * (3 + 2)));
  EXPECT_THAT(state_.generate_requests, Each(::testing::Property(&v1::GenerateRequest::request_id, ::testing::Ne(""))));

  state_ = router::FakeRouterClient::State();
  options_.keep_sessions = false;
  EXPECT_EQ(Run().completed, 7);
  EXPECT_THAT(state_.generate_requests, SizeIs(7));
  EXPECT_THAT(state_.logs, IsEmpty());
}

TEST_F(LoadRunnerTest, AConversationWhoseTurnFailsIsGivenUp) {
  options_.workload.requests = 2;
  options_.sessions = 1;
  options_.turns = 10;
  options_.keep_sessions = true;  // The fake gives a deleted one's name to the next.
  state_.first_statuses = {absl::InternalError("not finite")};
  const LoadReport report = Run();
  EXPECT_EQ(report.completed, 1);
  EXPECT_THAT(report.errors, ElementsAre(Pair("INTERNAL", 1)));
  EXPECT_THAT(report.first_error, StatusIs(absl::StatusCode::kInternal));
  ASSERT_THAT(state_.generate_requests, SizeIs(2));
  EXPECT_NE(state_.generate_requests[0].session_id(), state_.generate_requests[1].session_id());
}

absl::Status Refusal() {
  return common::WithRetryInfo(absl::ResourceExhaustedError("too many requests wait"), absl::Seconds(3));
}

TEST_F(LoadRunnerTest, ARefusalIsAFailureUnlessItIsTriedAgain) {
  options_.workload.requests = 1;
  state_.first_statuses = {Refusal(), Refusal()};
  LoadReport report = Run();
  EXPECT_EQ(report.completed, 0);
  EXPECT_EQ(report.refusal.count(), 1);
  EXPECT_THAT(report.errors, ElementsAre(Pair("RESOURCE_EXHAUSTED", 1)));

  options_.retry = true;
  state_.first_statuses = {Refusal(), Refusal()};
  report = Run();
  EXPECT_EQ(report.completed, 1);
  EXPECT_EQ(report.refusal.count(), 2);
  EXPECT_THAT(report.errors, IsEmpty());
  EXPECT_EQ(report.ttft.max(), absl::Milliseconds(6500));  // Twice as long as it was told, then the token.
  EXPECT_EQ(report.send_delay.max(), absl::ZeroDuration());

  // An error that does not say when to come back is none to come back from.
  state_.first_statuses = {absl::ResourceExhaustedError("too large")};
  report = Run();
  EXPECT_EQ(report.refusal.count(), 0);
  EXPECT_THAT(report.errors, ElementsAre(Pair("RESOURCE_EXHAUSTED", 1)));

  // Nor is one that says: after your deadline.
  options_.deadline = absl::Seconds(4);
  state_.first_statuses = {Refusal(), Refusal()};
  report = Run();
  EXPECT_EQ(report.refusal.count(), 2);
  EXPECT_THAT(report.errors, ElementsAre(Pair("RESOURCE_EXHAUSTED", 1)));
  EXPECT_EQ(report.elapsed, absl::Seconds(3));
}

TEST_F(LoadRunnerTest, ADeadlineCountsFromWhenARequestIsDueAndTheRouterHearsOfIt) {
  SetConstantRate(10);
  options_.workload.requests = 4;
  options_.deadline = absl::Milliseconds(1500);
  const absl::Time before = absl::Now();
  const LoadReport report = Run();
  const absl::Time after = absl::Now();
  // The second is sent 0.9 s late, when 0.6 s are left; the others would be sent after theirs.
  EXPECT_EQ(report.completed, 2);
  EXPECT_THAT(report.errors, ElementsAre(Pair("DEADLINE_EXCEEDED", 2)));
  ASSERT_THAT(state_.generate_deadlines, SizeIs(2));
  EXPECT_THAT(state_.generate_deadlines[0],
              AllOf(Ge(before + absl::Milliseconds(1500)), Le(after + absl::Milliseconds(1500))));
  EXPECT_THAT(state_.generate_deadlines[1],
              AllOf(Ge(before + absl::Milliseconds(600)), Le(after + absl::Milliseconds(600))));
}

TEST_F(LoadRunnerTest, StoppedItEndsItsRequestsAndReports) {
  options_.workload.duration = absl::Hours(1);
  options_.workload.max_tokens = {8, 8};
  LoadRunner runner(options_, &client_, &clock_, [](const LoadProgress&) {});
  int tokens = 0;
  state_.on_token = [&](uint64_t) {
    clock_.Advance(absl::Seconds(1));
    if (++tokens == 8 + 4) runner.Stop();
  };
  const LoadReport report = runner.Run();
  EXPECT_EQ(report.completed, 1);
  EXPECT_EQ(report.interrupted, 1);
  EXPECT_EQ(report.failed(), 0);
  EXPECT_EQ(report.generated_tokens, 8 + 3);
  EXPECT_EQ(report.elapsed, absl::Seconds(12));
}

TEST_F(LoadRunnerTest, WhatIsAnsweredInSpiteOfAStopIsCompleted) {
  options_.workload.duration = absl::Hours(1);
  options_.workload.max_tokens = {0, 0};
  LoadRunner runner(options_, &client_, &clock_, [](const LoadProgress&) {});
  state_.answer_to = [&](const std::string&) {
    runner.Stop();
    return "";
  };
  const LoadReport report = runner.Run();
  EXPECT_EQ(report.completed, 1);
  EXPECT_EQ(report.interrupted, 0);
}

TEST_F(LoadRunnerTest, StoppedBeforeItBeginsItSendsNothing) {
  options_.workload.duration = absl::Hours(1);
  LoadRunner runner(options_, &client_, &clock_, [](const LoadProgress&) {});
  runner.Stop();
  EXPECT_EQ(runner.Run().completed, 0);
  EXPECT_THAT(state_.generate_requests, IsEmpty());
}

}  // namespace
}  // namespace rwkv::rwkvctl
