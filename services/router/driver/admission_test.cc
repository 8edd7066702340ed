// Who runs, who waits, who is refused; slow clients; drain.
#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/generation.pb.h"
#include "services/common/grpc_status.h"
#include "services/router/driver/turn_manager.h"
#include "services/router/testing/fake_cluster.h"
#include "services/router/testing/turn_testing.h"
#include "services/worker/client/fake_worker.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::ElementsAreArray;
using ::testing::Ge;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Le;
using worker::FakeModel;
using worker::FakePipeline;

TEST(AdmissionTest, CancelFreesTheSlotForTheNext) {
  FakePipeline::Options pipeline;
  pipeline.slots = 1;
  FakeCluster cluster(pipeline);
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call first = cluster.Start(Request(Prompt(1), 1000));
  cluster.pipeline().AllowSteps(5);
  ASSERT_TRUE(first.stream->WaitReceived(1));
  cluster.router().Cancel(first.id);
  EXPECT_THAT(first.stream->Wait(), StatusIs(absl::StatusCode::kCancelled));
  cluster.pipeline().ResumeSteps();
  const FakeCluster::Answer second = cluster.Generate(Request(Prompt(2), 5));
  ASSERT_THAT(second.status, IsOk());
  EXPECT_THAT(second.tokens, ElementsAreArray(FakeModel::Greedy(Prompt(2), 5, kVocabulary)));
  EXPECT_TRUE(WaitUntil([&] { return cluster.pipeline().stats().slots_used == 0; }));
  EXPECT_TRUE(WaitUntil([&] { return cluster.router().counts().running == 0; }));
}

TEST(AdmissionTest, FullQueuesAnswerAtOnce) {
  TurnManager::Options options;
  options.max_running = 2;
  options.max_waiting = 3;
  FakeCluster cluster({}, options);
  cluster.pipeline().PauseSteps();
  std::vector<FakeCluster::Call> calls;
  for (uint32_t i = 0; i < 5; ++i) calls.push_back(cluster.Start(Request(Prompt(i), 3)));
  ASSERT_TRUE(WaitUntil([&] { return cluster.router().counts().waiting == 3; }));
  std::vector<absl::Duration> took;
  for (int i = 0; i < 20; ++i) {
    const absl::Time begin = absl::Now();
    const absl::Status status = cluster.Generate(Request(Prompt(9), 3)).status;
    took.push_back(absl::Now() - begin);
    EXPECT_THAT(status, StatusIs(absl::StatusCode::kResourceExhausted));
    EXPECT_TRUE(common::GetRetryDelay(status).has_value());
  }
  std::sort(took.begin(), took.end());
  EXPECT_LT(took[took.size() / 2], absl::Milliseconds(10));
  cluster.pipeline().ResumeSteps();
  for (uint32_t i = 0; i < 5; ++i) {
    EXPECT_THAT(cluster.Finish(calls[i]).tokens, ElementsAreArray(FakeModel::Greedy(Prompt(i), 3, kVocabulary)));
  }
}

TEST(AdmissionTest, ASlowClientPausesItsTurnAndOthersGoOn) {
  TurnManager::Options options;
  options.max_stream_messages = 4;
  FakeCluster cluster({}, options);
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call slow = cluster.Start(Request(Prompt(1), 500));
  slow.stream->Hold();
  cluster.pipeline().ResumeSteps();
  ASSERT_TRUE(slow.stream->WaitReceived(4));
  EXPECT_THAT(cluster.Generate(Request(Prompt(2), 100)).tokens,
              ElementsAreArray(FakeModel::Greedy(Prompt(2), 100, kVocabulary)));
  EXPECT_EQ(slow.stream->received().size(), 4);
  EXPECT_THAT(cluster.metrics().generated_tokens.Value(), Le(100 + 4 + 4 + 1));
  slow.stream->LetGo();
  EXPECT_THAT(cluster.Finish(slow).tokens, ElementsAreArray(FakeModel::Greedy(Prompt(1), 500, kVocabulary)));
}

TEST(AdmissionTest, AClientThatTakesNothingIsDropped) {
  TurnManager::Options options;
  options.max_stream_messages = 4;
  options.slow_client_timeout = absl::Milliseconds(100);
  FakeCluster cluster({}, options);
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call slow = cluster.Start(Request(Prompt(1), 500));
  slow.stream->Hold();
  cluster.pipeline().ResumeSteps();
  EXPECT_THAT(slow.stream->Wait(), StatusIs(absl::StatusCode::kResourceExhausted));
  EXPECT_TRUE(WaitUntil([&] { return cluster.pipeline().stats().slots_used == 0; }));
}

TEST(AdmissionTest, DrainLetsShortTurnsEndAndPausesLongOnes) {
  FakeCluster cluster;
  cluster.CreateSession("s");
  cluster.CreateSession("t");
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call short_turn = cluster.Start(SessionRequest("s", "a", Prompt(1), 3));
  const FakeCluster::Call long_turn = cluster.Start(SessionRequest("t", "a", Prompt(2), 500));
  ASSERT_TRUE(WaitUntil([&] { return cluster.router().counts().running == 2; }));
  std::thread drain([&] { cluster.router().Drain(absl::Now() + absl::Seconds(5)); });
  // As many steps as it takes: the long turn must not use up those of the short one.
  EXPECT_TRUE(WaitUntil([&] {
    cluster.pipeline().AllowSteps(1);
    return short_turn.stream->closed();
  }));
  EXPECT_THAT(cluster.Finish(short_turn).tokens, ElementsAreArray(FakeModel::Greedy(Prompt(1), 3, kVocabulary)));
  ASSERT_TRUE(WaitUntil([&] { return cluster.router().draining(); }));
  const absl::Status refused = cluster.Generate(Request(Prompt(3), 3)).status;
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kUnavailable));
  EXPECT_TRUE(common::GetRetryDelay(refused).has_value());
  EXPECT_THAT(long_turn.stream->Wait(), StatusIs(absl::StatusCode::kUnavailable));
  cluster.pipeline().ResumeSteps();
  drain.join();
  EXPECT_THAT(cluster.metrics().snapshots_committed.Value(), Ge(2));
  const size_t received = long_turn.stream->received().size();
  cluster.RestartRouter();
  v1::GenerateRequest resume = SessionRequest("t", "a", Prompt(2), 500);
  resume.set_resume_from(received);
  const FakeCluster::Answer rest = cluster.Generate(resume);
  ASSERT_THAT(rest.status, IsOk());
  const std::vector<uint32_t> all = FakeModel::Greedy(Prompt(2), 500, kVocabulary);
  EXPECT_THAT(rest.tokens, ElementsAreArray(std::vector<uint32_t>(all.begin() + received, all.end())));
}

TEST(AdmissionTest, ADrainDoesNotLetThoseThatWaitWait) {
  TurnManager::Options options;
  options.max_running = 1;
  FakeCluster cluster({}, options);
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call running = cluster.Start(Request(Prompt(1), 3));
  const FakeCluster::Call waiting = cluster.Start(Request(Prompt(2), 3));
  ASSERT_TRUE(WaitUntil([&] { return cluster.router().counts().waiting == 1; }));
  std::thread drain([&] { cluster.router().Drain(absl::Now() + kTestLimit); });
  EXPECT_THAT(waiting.stream->Wait(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("going away")));
  EXPECT_FALSE(running.stream->closed());
  cluster.pipeline().ResumeSteps();
  EXPECT_THAT(cluster.Finish(running).tokens, ElementsAreArray(FakeModel::Greedy(Prompt(1), 3, kVocabulary)));
  drain.join();
}

TEST(AdmissionTest, WhoWaitsIsStartedInTurn) {
  TurnManager::Options options;
  options.max_running = 1;
  FakeCluster cluster({}, options);
  cluster.pipeline().PauseSteps();
  std::vector<FakeCluster::Call> calls;
  for (uint32_t i = 0; i < 4; ++i) {
    calls.push_back(cluster.Start(Request(Prompt(i), 2)));
    ASSERT_TRUE(WaitUntil([&] { return cluster.router().counts().waiting == static_cast<int>(i); }));
  }
  for (uint32_t i = 0; i < 4; ++i) {
    ASSERT_TRUE(WaitUntil([&] {
      cluster.pipeline().AllowSteps(1);
      return calls[i].stream->closed();
    }));
    for (uint32_t later = i + 2; later < 4; ++later) EXPECT_THAT(calls[later].stream->received(), IsEmpty());
  }
}

TEST(AdmissionTest, WithoutAFreeSlotACallIsNotBegun) {
  FakePipeline::Options pipeline;
  pipeline.slots = 1;
  FakeCluster cluster(pipeline);
  cluster.CreateSession("s");
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call running = cluster.Start(Request(Prompt(1), 3));
  const FakeCluster::Call waiting = cluster.Start(SessionRequest("s", "a", Prompt(2), 3));
  ASSERT_TRUE(WaitUntil([&] { return cluster.router().counts().waiting == 1; }));
  EXPECT_THAT(cluster.Log("s"), IsEmpty());
  // What needs no slot does not wait for one.
  EXPECT_THAT(Rewind(cluster, "t", 0), StatusIs(absl::StatusCode::kNotFound));
  cluster.pipeline().ResumeSteps();
  EXPECT_THAT(cluster.Finish(running).status, IsOk());
  EXPECT_THAT(cluster.Finish(waiting).tokens, ElementsAreArray(FakeModel::Greedy(Prompt(2), 3, kVocabulary)));
}

// What an operator sees of it.
TEST(AdmissionTest, MetricsSayWhatIsThere) {
  FakePipeline::Options pipeline;
  pipeline.slots = 4;
  FakeCluster cluster(pipeline);
  cluster.CreateSession("s");
  ASSERT_THAT(cluster.Generate(SessionRequest("s", "a", Prompt(1), 5)).status, IsOk());
  ASSERT_THAT(cluster.Generate(SessionRequest("s", "b", Prompt(1), 5)).status, IsOk());
  EXPECT_THAT(cluster.Generate(v1::GenerateRequest()).status, StatusIs(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(cluster.Generate(SessionRequest("t", "a", Prompt(1), 5)).status, StatusIs(absl::StatusCode::kNotFound));
  cluster.pipeline().PauseSteps();
  std::vector<FakeCluster::Call> calls;
  for (uint32_t i = 0; i < 6; ++i) calls.push_back(cluster.Start(Request(Prompt(i), 3)));
  ASSERT_TRUE(WaitUntil([&] { return cluster.Exported("rwkv_router_waiting_turns") == 2; }));
  EXPECT_TRUE(WaitUntil([&] { return cluster.Exported("rwkv_router_slots", "state", "used") == 4; }));
  EXPECT_EQ(cluster.Exported("rwkv_router_running_turns"), 4);
  EXPECT_EQ(cluster.Exported("rwkv_router_slots", "state", "warm"), 0);
  EXPECT_EQ(cluster.Exported("rwkv_router_slots", "state", "free"), 0);
  EXPECT_TRUE(WaitUntil([&] { return cluster.Exported("rwkv_router_microbatches_in_flight") >= 1; }));
  cluster.router().Cancel(calls[5].id);
  cluster.pipeline().ResumeSteps();
  for (int i = 0; i < 5; ++i) EXPECT_THAT(cluster.Finish(calls[i]).status, IsOk());
  ASSERT_THAT(cluster.Generate(SessionRequest("s", "c", Prompt(1), 5)).status, IsOk());
  EXPECT_TRUE(WaitUntil([&] { return cluster.Exported("rwkv_router_slots", "state", "warm") == 1; }));
  EXPECT_EQ(cluster.Exported("rwkv_router_slots", "state", "free"), 3);
  EXPECT_EQ(cluster.Exported("rwkv_router_slots", "state", "used"), 0);
  EXPECT_EQ(cluster.Exported("rwkv_router_waiting_turns"), 0);
  EXPECT_TRUE(WaitUntil([&] { return cluster.Exported("rwkv_router_running_turns") == 0; }));
  EXPECT_EQ(cluster.Exported("rwkv_router_microbatches_in_flight"), 0);
  EXPECT_EQ(cluster.Exported("rwkv_router_errors_total", "cause", "bad_request"), 1);
  EXPECT_EQ(cluster.Exported("rwkv_router_errors_total", "cause", "not_found"), 1);
  EXPECT_EQ(cluster.Exported("rwkv_router_errors_total", "cause", "client_gone"), 1);
  EXPECT_EQ(cluster.Exported("rwkv_router_turns_finished_total", "reason", "length"), 8);
  EXPECT_EQ(cluster.Exported("rwkv_router_turns_finished_total", "reason", "stop_token"), 0);
  EXPECT_EQ(cluster.Exported("rwkv_router_tokens_total", "kind", "generated"), 15 + 15);
  EXPECT_EQ(cluster.Exported("rwkv_router_tokens_total", "kind", "prompt"), 90);  // Of what was begun, t's too.
  EXPECT_EQ(cluster.Exported("rwkv_router_tokens_total", "kind", "reused"), 14 + 29);
  EXPECT_EQ(cluster.Exported("rwkv_router_epochs_total"), 1);
  EXPECT_EQ(cluster.Exported("rwkv_router_epochs_lost_total"), 0);
  EXPECT_EQ(cluster.Exported("rwkv_router_ttft_seconds"), 8);
  EXPECT_EQ(cluster.Exported("rwkv_router_inter_token_seconds"), 30 - 8);
  EXPECT_EQ(cluster.Exported("rwkv_router_queue_seconds"), 8);
}

}  // namespace
}  // namespace rwkv::router
