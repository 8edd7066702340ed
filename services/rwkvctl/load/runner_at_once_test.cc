// A load's runner against a router in memory, in real time: how many requests run at once.
#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/sessions.pb.h"
#include "services/router/client/cancellation.h"
#include "services/router/client/fake_router_client.h"
#include "services/rwkvctl/load/load_clock.h"
#include "services/rwkvctl/load/report.h"
#include "services/rwkvctl/load/runner.h"
#include "services/rwkvctl/load/workload.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::rwkvctl {
namespace {

using ::rwkv::testing::IsOk;
using ::testing::AllOf;
using ::testing::Ge;
using ::testing::Le;
using ::testing::SizeIs;

constexpr absl::Duration kPatience = absl::Seconds(40);  // Below the test's own limit.

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
