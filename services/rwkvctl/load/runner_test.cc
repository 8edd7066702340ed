// A load's runner against a router in memory: in time that a test turns, where one request runs at a time, and in real
// time, where what counts is how many do.
#include "services/rwkvctl/load/runner.h"

#include <algorithm>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/sessions.pb.h"
#include "services/common/grpc_status.h"
#include "services/router/client/cancellation.h"
#include "services/router/client/fake_router_client.h"
#include "services/router/client/router_client.h"
#include "services/rwkvctl/load/load_clock.h"
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
using ::testing::IsEmpty;
using ::testing::Le;
using ::testing::Pair;
using ::testing::SizeIs;

constexpr absl::Duration kPatience = absl::Seconds(40);  // Below the test's own limit.

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

// Holds requests until they are let go, and knows how many there are. Sessions are "s0", "s1", ...
class GateClient : public router::FakeRouterClient {
 public:
  GateClient() : FakeRouterClient(&state_) {}

  absl::Status Generate(const v1::GenerateRequest& request, GenerateCallback callback,
                        router::Cancellation* cancellation, absl::Time) override {
    {
      absl::MutexLock lock(&mutex_);
      requests_.push_back(request);
      if (!request.session_id().empty() && !sessions_.insert(request.session_id()).second) overlaps_ = true;
      most_ = std::max(most_, ++running_);
      const auto go = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return open_ || cancellation->cancelled(); };
      // A cancellation is not seen by the mutex, so look again and again.
      const absl::Time limit = absl::Now() + kPatience;
      while (!mutex_.AwaitWithTimeout(absl::Condition(&go), absl::Milliseconds(10)) && absl::Now() < limit) {
      }
      --running_;
      sessions_.erase(request.session_id());
      if (!open_) return cancellation->cancelled() ? absl::CancelledError("") : absl::DeadlineExceededError("held");
    }
    v1::GenerateResponse response;
    response.set_token_id(1);
    if (absl::Status status = callback(response); !status.ok()) return status;
    v1::GenerateResponse last;
    last.mutable_finish()->set_prompt_tokens(request.tokens().ids_size());
    return callback(last);
  }

  absl::StatusOr<v1::Session> CreateSession(const v1::SessionsCreateRequest&) override {
    absl::MutexLock lock(&mutex_);
    v1::Session session;
    session.set_id(absl::StrCat("s", created_++));
    return session;
  }
  absl::Status DeleteSession(const v1::SessionsDeleteRequest&) override {
    absl::MutexLock lock(&mutex_);
    ++deleted_;
    return absl::OkStatus();
  }

  // Whether so many run at a time before patience ends.
  bool WaitForRunning(int count) {
    absl::MutexLock lock(&mutex_);
    const auto reached = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return running_ >= count; };
    return mutex_.AwaitWithTimeout(absl::Condition(&reached), kPatience);
  }
  void Open() {
    absl::MutexLock lock(&mutex_);
    open_ = true;
  }
  int most() {
    absl::MutexLock lock(&mutex_);
    return most_;
  }
  bool overlaps() {
    absl::MutexLock lock(&mutex_);
    return overlaps_;
  }
  int created() {
    absl::MutexLock lock(&mutex_);
    return created_;
  }
  int deleted() {
    absl::MutexLock lock(&mutex_);
    return deleted_;
  }
  std::vector<v1::GenerateRequest> requests() {
    absl::MutexLock lock(&mutex_);
    return requests_;
  }

 private:
  State state_;
  absl::Mutex mutex_;
  bool open_ ABSL_GUARDED_BY(mutex_) = false;
  bool overlaps_ ABSL_GUARDED_BY(mutex_) = false;  // Two turns of one session.
  int running_ ABSL_GUARDED_BY(mutex_) = 0;
  int most_ ABSL_GUARDED_BY(mutex_) = 0;
  int created_ ABSL_GUARDED_BY(mutex_) = 0;
  int deleted_ ABSL_GUARDED_BY(mutex_) = 0;
  std::set<std::string> sessions_ ABSL_GUARDED_BY(mutex_);
  std::vector<v1::GenerateRequest> requests_ ABSL_GUARDED_BY(mutex_);
};

class LoadRunnerAtOnceTest : public ::testing::Test {
 protected:
  LoadRunnerAtOnceTest() {
    options_.vocab_size = 256;
    options_.workload.prompt_tokens = {3, 3};
    options_.workload.max_tokens = {1, 1};
  }

  SteadyLoadClock clock_;
  LoadOptions options_;
  GateClient client_;
};

TEST_F(LoadRunnerAtOnceTest, AClosedLoopHasItsStreamsAtOnceAndNoMore) {
  options_.max_in_flight = 5;
  options_.workload.requests = 40;
  LoadRunner runner(options_, &client_, &clock_, [](const LoadProgress&) {});
  std::thread opener([this] {
    EXPECT_TRUE(client_.WaitForRunning(5));
    client_.Open();
  });
  const LoadReport report = runner.Run();
  opener.join();
  EXPECT_EQ(report.completed, 40);
  EXPECT_EQ(client_.most(), 5);
}

TEST_F(LoadRunnerAtOnceTest, AnOpenLoopSendsThoughNoneIsAnsweredUpToItsBound) {
  options_.max_in_flight = 6;
  options_.workload.requests = 30;
  options_.workload.arrivals.emplace();
  options_.workload.arrivals->rate = 5000;
  LoadRunner runner(options_, &client_, &clock_, [](const LoadProgress&) {});
  std::thread opener([this] {
    EXPECT_TRUE(client_.WaitForRunning(6));
    client_.Open();
  });
  const LoadReport report = runner.Run();
  opener.join();
  EXPECT_EQ(report.completed, 30);
  EXPECT_EQ(client_.most(), 6);
  EXPECT_EQ(report.send_delay.count(), 30);
}

TEST_F(LoadRunnerAtOnceTest, NoTwoTurnsOfAConversationAreSentAtOnce) {
  options_.max_in_flight = 8;
  options_.workload.requests = 60;
  options_.sessions = 3;
  options_.turns = 4;
  LoadRunner runner(options_, &client_, &clock_, [](const LoadProgress&) {});
  std::thread opener([this] {
    EXPECT_TRUE(client_.WaitForRunning(3));
    client_.Open();
  });
  EXPECT_EQ(runner.Run().completed, 60);
  opener.join();
  EXPECT_LE(client_.most(), 3);
  EXPECT_FALSE(client_.overlaps());
  // Twenty turns of each of three would be five sessions each; who is quicker has more.
  EXPECT_THAT(client_.created(), AllOf(Ge(15), Le(17)));
  EXPECT_EQ(client_.deleted(), client_.created());
}

TEST_F(LoadRunnerAtOnceTest, TurnsOfATracesConversationsFollowEachOtherInOrder) {
  std::string jsonl;
  for (int i = 0; i < 40; ++i) {
    absl::StrAppend(&jsonl, "{\"offset\": 0, \"prompt_tokens\": ", i + 1, ", \"max_tokens\": 1",
                    i % 5 == 4 ? "" : absl::StrCat(", \"session\": ", i % 5), "}\n");
  }
  const auto trace = ParseTrace(jsonl);
  ASSERT_THAT(trace, IsOk());
  options_.workload.trace = *trace;
  options_.max_in_flight = 16;
  LoadRunner runner(options_, &client_, &clock_, [](const LoadProgress&) {});
  std::thread opener([this] {
    EXPECT_TRUE(client_.WaitForRunning(4));
    client_.Open();
  });
  EXPECT_EQ(runner.Run().completed, 40);
  opener.join();
  EXPECT_FALSE(client_.overlaps());
  EXPECT_EQ(client_.created(), 4);
  EXPECT_EQ(client_.deleted(), 4);
  std::map<std::string, std::vector<int>> lengths;
  for (const v1::GenerateRequest& request : client_.requests()) {
    lengths[request.session_id()].push_back(request.tokens().ids_size());
  }
  EXPECT_THAT(lengths, SizeIs(5));
  for (const auto& [session, of_session] : lengths) {
    EXPECT_THAT(of_session, SizeIs(8));
    if (session.empty()) continue;
    EXPECT_TRUE(std::is_sorted(of_session.begin(), of_session.end())) << session;
  }
}

TEST_F(LoadRunnerAtOnceTest, AStopReachesAllThatRunOrWait) {
  options_.max_in_flight = 8;  // Of which six wait for a conversation.
  options_.sessions = 2;
  LoadRunner runner(options_, &client_, &clock_, [](const LoadProgress&) {});
  std::thread stopper([&] {
    EXPECT_TRUE(client_.WaitForRunning(2));
    runner.Stop();
  });
  const LoadReport report = runner.Run();
  stopper.join();
  EXPECT_EQ(report.completed, 0);
  EXPECT_EQ(report.failed(), 0);
  EXPECT_THAT(report.interrupted, AllOf(Ge(2u), Le(8u)));
  EXPECT_EQ(client_.deleted(), 2);
}

TEST_F(LoadRunnerAtOnceTest, TellsHowFarItIs) {
  options_.max_in_flight = 2;
  options_.workload.requests = 3;
  options_.progress_interval = absl::Milliseconds(5);
  int calls = 0;
  LoadProgress seen;
  LoadRunner runner(options_, &client_, &clock_, [&](const LoadProgress& progress) {
    seen = progress;
    if (++calls != 3) return;
    EXPECT_TRUE(client_.WaitForRunning(2));
    client_.Open();
  });
  const LoadReport report = runner.Run();
  EXPECT_EQ(report.completed, 3);
  EXPECT_GE(calls, 3);
  EXPECT_GE(seen.elapsed, absl::Milliseconds(15));
  EXPECT_THAT(seen.in_flight(), AllOf(Ge(0u), Le(2u)));
}

}  // namespace
}  // namespace rwkv::rwkvctl
