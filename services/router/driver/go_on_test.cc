// A pipeline decodes by itself, as far as it was told; what the router promises stays.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
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
using ::testing::ElementsAreArray;
using ::testing::Ge;
using ::testing::Le;
using worker::FakeModel;
using worker::FakePipeline;

// By the number of stages.
class GoOnTest : public ::testing::TestWithParam<int> {
 protected:
  static FakePipeline::Options Pipeline() {
    FakePipeline::Options options;
    options.stage_count = GetParam();
    return options;
  }
};

INSTANTIATE_TEST_SUITE_P(Stages, GoOnTest, ::testing::Values(1, 2, 3));

std::vector<uint32_t> Undisturbed(int count) { return FakeModel::Greedy(Prompt(1), count, kVocabulary); }

// The answer of a turn in session "s" is `answer`, and the next turn goes on in its slot.
void ExpectNextIsWarm(FakeCluster& cluster, const std::vector<uint32_t>& answer) {
  EXPECT_EQ(cluster.Log("s"), Concat(Prompt(1), answer));
  const FakeCluster::Answer next = cluster.Generate(SessionRequest("s", "next", Prompt(2), 5));
  ASSERT_THAT(next.status, IsOk());
  const std::vector<uint32_t> log = Concat(Concat(Prompt(1), answer), Prompt(2));
  EXPECT_THAT(next.tokens, ElementsAreArray(FakeModel::Greedy(log, 5, kVocabulary)));
  EXPECT_EQ(cluster.pipeline().stats().attaches_warm, 1);
}

TEST_P(GoOnTest, TheWorkerDecodesByItself) {
  FakeCluster cluster(Pipeline());
  const FakeCluster::Answer answer = cluster.Generate(Request(Prompt(1), 300));
  ASSERT_THAT(answer.status, IsOk());
  EXPECT_THAT(answer.tokens, ElementsAreArray(Undisturbed(300)));
  EXPECT_EQ(cluster.pipeline().stats().own_steps, 299) << "the router asked for the first alone";
  EXPECT_EQ(cluster.pipeline().stats().rows, 10 + 299) << "it went too far";
}

TEST_P(GoOnTest, ASessionsSlotIsWhereItsLogIs) {
  FakeCluster cluster(Pipeline());
  cluster.CreateSession("s");
  const FakeCluster::Answer answer = cluster.Generate(SessionRequest("s", "a", Prompt(1), 300));
  ASSERT_THAT(answer.status, IsOk());
  EXPECT_THAT(answer.tokens, ElementsAreArray(Undisturbed(300)));
  EXPECT_EQ(cluster.pipeline().stats().own_steps, 299);
  ExpectNextIsWarm(cluster, answer.tokens);
}

TEST_P(GoOnTest, AStopTokenEndsItWhereItIs) {
  FakeCluster cluster(Pipeline());
  cluster.CreateSession("s");
  v1::GenerateRequest request = SessionRequest("s", "a", Prompt(1), 300);
  request.add_stop_token_ids(Undisturbed(9)[8]);
  const FakeCluster::Answer answer = cluster.Generate(request);
  ASSERT_THAT(answer.status, IsOk());
  EXPECT_THAT(answer.tokens, ElementsAreArray(Undisturbed(8)));
  EXPECT_EQ(cluster.pipeline().stats().rows, 10 + 8) << "it went too far";
  ExpectNextIsWarm(cluster, answer.tokens);
}

// A text that ends an answer is seen by the router alone: a session's slot must not go beyond it, so its worker waits
// where one may end.
TEST_P(GoOnTest, WithAStopStringASessionGoesOnToWhereItEnds) {
  FakePipeline::Options world = WorldPipeline();
  world.stage_count = GetParam();
  FakeCluster cluster(world);
  cluster.CreateSession("s");
  v1::GenerateRequest request;
  request.set_text("hello");
  request.set_max_tokens(20);
  const FakeCluster::Answer whole = cluster.Generate(request);
  ASSERT_THAT(whole.status, IsOk());
  request.add_stop(std::string(cluster.tokenizer().TokenBytes(whole.tokens[5])));
  const int64_t own_steps = cluster.pipeline().stats().own_steps;
  EXPECT_EQ(own_steps, 19);
  request.set_session_id("s");
  request.set_request_id("a");
  const FakeCluster::Answer with_session = cluster.Generate(request);
  EXPECT_EQ(with_session.finish.reason(), v1::FINISH_REASON_STOP_STRING);
  EXPECT_EQ(cluster.pipeline().stats().own_steps, own_steps + static_cast<int64_t>(with_session.tokens.size()) - 1)
      << "asked for the first, and not a step beyond the last";
  v1::GenerateRequest next;
  next.set_text("and");
  next.set_max_tokens(3);
  next.set_session_id("s");
  next.set_request_id("next");
  const int64_t warm = cluster.pipeline().stats().attaches_warm;
  ASSERT_THAT(cluster.Generate(next).status, IsOk());
  EXPECT_EQ(cluster.pipeline().stats().attaches_warm, warm + 1) << "its slot is where its log is";
  const int64_t own_steps_then = cluster.pipeline().stats().own_steps;
  request.clear_session_id();
  request.clear_request_id();
  const FakeCluster::Answer without = cluster.Generate(request);
  EXPECT_EQ(without.finish.reason(), v1::FINISH_REASON_STOP_STRING);
  EXPECT_THAT(without.tokens, ElementsAreArray(with_session.tokens));
  EXPECT_THAT(cluster.pipeline().stats().own_steps,
              Ge(own_steps_then + static_cast<int64_t>(without.tokens.size()) - 1));
  EXPECT_TRUE(WaitUntil([&] { return cluster.router().counts().running == 0; }));
}

TEST_P(GoOnTest, WhereAStopStringMightHaveEndedItGoesOn) {
  FakePipeline::Options world = WorldPipeline();
  world.stage_count = GetParam();
  FakeCluster cluster(world);
  cluster.CreateSession("s");
  v1::GenerateRequest request;
  request.set_text("hello");
  request.set_max_tokens(40);
  const FakeCluster::Answer whole = cluster.Generate(request);
  ASSERT_THAT(whole.status, IsOk());
  // Each ends with a token of the answer, and none is met.
  for (int i = 3; i < 39 && request.stop_size() < 3; ++i) {
    const absl::string_view token = cluster.tokenizer().TokenBytes(whole.tokens[i]);
    const bool is_ascii = std::all_of(token.begin(), token.end(), [](char byte) { return byte > 0; });
    if (is_ascii && !token.empty()) request.add_stop(absl::StrCat("never ", token));
  }
  ASSERT_THAT(request.stop_size(), Ge(1));
  request.set_session_id("s");
  request.set_request_id("a");
  const FakeCluster::Answer answer = cluster.Generate(request);
  ASSERT_THAT(answer.status, IsOk());
  EXPECT_THAT(answer.tokens, ElementsAreArray(whole.tokens));
  EXPECT_EQ(answer.finish.reason(), v1::FINISH_REASON_LENGTH);
}

TEST_P(GoOnTest, ACancelledTurnIsRetiredWhereItsSlotIs) {
  FakeCluster cluster(Pipeline());
  cluster.CreateSession("s");
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call call = cluster.Start(SessionRequest("s", "a", Prompt(1), 300));
  cluster.pipeline().AllowSteps(20);
  ASSERT_TRUE(call.stream->WaitReceived(20));
  cluster.router().Cancel(call.id);
  ASSERT_TRUE(WaitUntil([&] { return cluster.router().counts().running == 0; }))
      << "it waits for more than the command to stop";
  EXPECT_EQ(cluster.Log("s"), Concat(Prompt(1), Undisturbed(20)));
  EXPECT_EQ(cluster.pipeline().stats().rows, 10 + 19);
  cluster.pipeline().ResumeSteps();
  v1::GenerateRequest again = SessionRequest("s", "a", Prompt(1), 300);
  again.set_resume_from(20);
  const FakeCluster::Answer answer = cluster.Generate(again);
  ASSERT_THAT(answer.status, IsOk());
  EXPECT_THAT(Concat(Undisturbed(20), answer.tokens), ElementsAreArray(Undisturbed(300)));
  EXPECT_EQ(cluster.pipeline().stats().attaches_warm, 1);
}

TEST_P(GoOnTest, WithoutASessionACancelFreesTheSlot) {
  FakeCluster cluster(Pipeline());
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call call = cluster.Start(Request(Prompt(1), 300));
  cluster.pipeline().AllowSteps(5);
  ASSERT_TRUE(call.stream->WaitReceived(5));
  cluster.router().Cancel(call.id);
  EXPECT_TRUE(WaitUntil([&] { return cluster.pipeline().stats().slots_used == 0; }));
}

TEST_P(GoOnTest, SnapshotsAreTakenOnTheWay) {
  TurnManager::Options options;
  options.snapshot_interval_tokens = 32;
  FakeCluster cluster(Pipeline(), options);
  cluster.CreateSession("s");
  const FakeCluster::Answer answer = cluster.Generate(SessionRequest("s", "a", Prompt(1), 300));
  ASSERT_THAT(answer.status, IsOk());
  EXPECT_THAT(answer.tokens, ElementsAreArray(Undisturbed(300)));
  EXPECT_TRUE(WaitUntil([&] { return cluster.pipeline().stats().saves >= 2; })) << "one at its end";
  EXPECT_TRUE(WaitUntil([&] { return cluster.metrics().snapshots_committed.Value() >= 2; }));
  EXPECT_EQ(cluster.metrics().snapshots_failed.Value(), 0) << "a slot was not where it was taken to be";
}

TEST_P(GoOnTest, AClientThatTakesNothingStopsIt) {
  FakeCluster cluster(Pipeline());
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call call = cluster.Start(Request(Prompt(1), 1000));
  call.stream->Hold();
  cluster.pipeline().ResumeSteps();
  ASSERT_TRUE(call.stream->WaitReceived(64));
  ASSERT_THAT(cluster.Generate(Request(Prompt(2), 300)).status, IsOk());  // Time enough to go too far.
  EXPECT_THAT(cluster.pipeline().stats().rows, Le(10 + 128 + 10 + 300));
  call.stream->LetGo();
  const FakeCluster::Answer answer = cluster.Finish(call);
  ASSERT_THAT(answer.status, IsOk());
  EXPECT_THAT(answer.tokens, ElementsAreArray(Undisturbed(1000)));
}

TEST_P(GoOnTest, NothingIsShownThatIsNotDurableAndDecodingWaitsForCommits) {
  TurnManager::Options options;
  options.max_uncommitted_tokens = 16;
  FakeCluster cluster(Pipeline(), options);
  cluster.CreateSession("s");
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call call = cluster.Start(SessionRequest("s", "a", Prompt(1), 300));
  ASSERT_TRUE(WaitUntil([&] { return cluster.pipeline().stats().attaches_fresh == 1; }));
  cluster.store().FailAppendsWith(absl::UnavailableError("the log is away"));
  cluster.pipeline().ResumeSteps();
  ASSERT_THAT(cluster.Generate(Request(Prompt(2), 300)).status, IsOk());  // Time enough to go too far.
  EXPECT_THAT(call.stream->received(), ::testing::IsEmpty());
  EXPECT_THAT(cluster.pipeline().stats().rows, Le(10 + 16 + 10 + 300));
  cluster.store().FailAppendsWith(absl::OkStatus());
  const FakeCluster::Answer answer = cluster.Finish(call);
  ASSERT_THAT(answer.status, IsOk());
  EXPECT_THAT(answer.tokens, ElementsAreArray(Undisturbed(300)));
}

TEST_P(GoOnTest, ALostEpochAndARefusedEntryChangeNoToken) {
  FakeCluster cluster(Pipeline());
  cluster.CreateSession("s");
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call call = cluster.Start(SessionRequest("s", "a", Prompt(1), 100));
  cluster.pipeline().AllowSteps(20);
  ASSERT_TRUE(call.stream->WaitReceived(20));
  cluster.pipeline().BreakEpoch();
  cluster.pipeline().AllowSteps(20);
  ASSERT_TRUE(call.stream->WaitReceived(30));
  cluster.pipeline().FailEntries(1, absl::AbortedError("refused"));
  cluster.pipeline().ResumeSteps();
  const FakeCluster::Answer answer = cluster.Finish(call);
  ASSERT_THAT(answer.status, IsOk());
  EXPECT_THAT(answer.tokens, ElementsAreArray(Undisturbed(100)));
  EXPECT_EQ(cluster.Log("s"), Concat(Prompt(1), answer.tokens));
}

TEST_P(GoOnTest, AWorkerThatStandsStillLosesItsEpoch) {
  TurnManager::Options options;
  options.progress_timeout = absl::Milliseconds(200);
  FakeCluster cluster(Pipeline(), options);
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call call = cluster.Start(Request(Prompt(1), 100));
  cluster.pipeline().AllowSteps(20);
  ASSERT_TRUE(call.stream->WaitReceived(20));
  const int64_t epochs = cluster.pipeline().stats().epochs;
  ASSERT_TRUE(WaitUntil([&] { return cluster.pipeline().stats().epochs > epochs; }));
  cluster.pipeline().ResumeSteps();
  const FakeCluster::Answer answer = cluster.Finish(call);
  ASSERT_THAT(answer.status, IsOk());
  EXPECT_THAT(answer.tokens, ElementsAreArray(Undisturbed(100)));
}

TEST_P(GoOnTest, ManyAtATimeShareTheSteps) {
  FakeCluster cluster(Pipeline());
  cluster.pipeline().PauseSteps();
  std::vector<FakeCluster::Call> calls;
  for (int i = 1; i <= 8; ++i) calls.push_back(cluster.Start(Request(Prompt(i), 40)));
  ASSERT_TRUE(WaitUntil([&] { return cluster.router().counts().running == 8; }));
  cluster.pipeline().ResumeSteps();
  for (int i = 1; i <= 8; ++i) {
    const FakeCluster::Answer answer = cluster.Finish(calls[i - 1]);
    ASSERT_THAT(answer.status, IsOk());
    EXPECT_THAT(answer.tokens, ElementsAreArray(FakeModel::Greedy(Prompt(i), 40, kVocabulary)));
  }
}

}  // namespace
}  // namespace rwkv::router
