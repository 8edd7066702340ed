#include "services/router/turns/turn_manager.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <iostream>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "absl/types/span.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/state_store.pb.h"
#include "services/common/grpc_status.h"
#include "services/router/testing/fake_cluster.h"
#include "services/worker/client/fake_worker.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::AllOf;
using ::testing::Each;
using ::testing::ElementsAreArray;
using ::testing::Ge;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Le;
using ::testing::SizeIs;
using worker::FakeModel;
using worker::FakePipeline;

constexpr uint32_t kVocabulary = 1000;

std::vector<uint32_t> Prompt(uint32_t salt, int count = 10) {
  std::vector<uint32_t> tokens;
  for (int i = 0; i < count; ++i) tokens.push_back((salt * 31 + i * 7 + 1) % kVocabulary);
  return tokens;
}

std::vector<uint32_t> Concat(std::vector<uint32_t> a, const std::vector<uint32_t>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

absl::StatusOr<v1::FindSnapshotResponse> NewestSnapshot(FakeCluster& cluster, const std::string& session) {
  v1::FindSnapshotRequest find;
  find.set_session_id(session);
  find.set_at_or_before(1000);
  find.set_model_fingerprint(cluster.router().model()->info.fingerprint());
  return cluster.store().FindSnapshot(find, absl::Now() + kTestLimit);
}

TEST(TurnManagerTest, GeneratesTheModelsTokens) {
  FakeCluster cluster;
  const FakeCluster::Answer answer = cluster.Generate(Request(Prompt(1), 20));
  ASSERT_THAT(answer.status, IsOk());
  EXPECT_THAT(answer.tokens, ElementsAreArray(FakeModel::Greedy(Prompt(1), 20, kVocabulary)));
  EXPECT_EQ(answer.finish.reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(answer.finish.prompt_tokens(), 10);
  EXPECT_EQ(answer.finish.generated_tokens(), 20);
  EXPECT_EQ(answer.finish.session_tokens(), 0);
  EXPECT_EQ(answer.text, "");
  EXPECT_TRUE(WaitUntil([&] { return cluster.pipeline().stats().slots_used == 0; }));
}

TEST(TurnManagerTest, ConcurrentTurnsEqualTheirSoloRuns) {
  FakePipeline::Options pipeline;
  pipeline.stage_count = 3;
  pipeline.layers = 6;
  pipeline.slots = 12;  // Fewer than turns: slots change hands.
  pipeline.max_batch_tokens = 16;
  FakeCluster cluster(pipeline);
  std::vector<FakeCluster::Call> calls;
  std::vector<std::vector<uint32_t>> expected;
  for (uint32_t i = 0; i < 32; ++i) {
    v1::GenerateRequest request = Request(Prompt(i, 1 + i * 5 % 60), 10 + i);
    if (i % 2 == 1) {
      cluster.CreateSession(absl::StrCat("session-", i));
      request.set_session_id(absl::StrCat("session-", i));
    }
    if (i % 3 == 0) {
      request.mutable_sampling()->set_temperature(1);
      request.mutable_sampling()->set_seed(i);
    }
    expected.push_back(FakeModel::Generate(Prompt(i, 1 + i * 5 % 60), 10 + i, request.sampling(), kVocabulary));
    calls.push_back(cluster.Start(request));
  }
  for (uint32_t i = 0; i < 32; ++i) {
    SCOPED_TRACE(i);
    const FakeCluster::Answer answer = cluster.Finish(calls[i]);
    ASSERT_THAT(answer.status, IsOk());
    EXPECT_THAT(answer.tokens, ElementsAreArray(expected[i]));
  }
  const FakePipeline::Stats stats = cluster.pipeline().stats();
  EXPECT_THAT(stats.max_steps_in_flight, Le(4));
  EXPECT_THAT(stats.max_rows_in_step, Le(16));
  EXPECT_EQ(stats.refused_entries, 0);
}

TEST(TurnManagerTest, ASessionGoesOnInItsWarmSlot) {
  FakeCluster cluster;
  cluster.CreateSession("s");
  std::vector<uint32_t> log;
  for (uint32_t turn = 0; turn < 5; ++turn) {
    const std::vector<uint32_t> prompt = Prompt(turn);
    const FakeCluster::Answer answer = cluster.Generate(SessionRequest("s", absl::StrCat("r", turn), prompt, 7));
    ASSERT_THAT(answer.status, IsOk());
    EXPECT_EQ(answer.finish.reused_tokens(), log.size());
    log = Concat(log, prompt);
    EXPECT_THAT(answer.tokens, ElementsAreArray(FakeModel::Greedy(log, 7, kVocabulary)));
    log = Concat(log, answer.tokens);
    EXPECT_EQ(answer.finish.session_tokens(), log.size());
    EXPECT_EQ(answer.finish.request_id(), absl::StrCat("r", turn));
  }
  EXPECT_EQ(cluster.Log("s"), log);
  EXPECT_EQ(cluster.pipeline().stats().attaches_warm, 4);
  EXPECT_EQ(cluster.pipeline().stats().attaches_fresh, 1);
}

TEST(TurnManagerTest, AnotherRouterGoesOnFromTheSnapshot) {
  FakeCluster cluster;
  cluster.CreateSession("s");
  const FakeCluster::Answer first = cluster.Generate(SessionRequest("s", "a", Prompt(1), 7));
  ASSERT_THAT(first.status, IsOk());
  ASSERT_TRUE(WaitUntil([&] { return cluster.metrics().snapshots_committed.Value() == 1; }));
  cluster.RestartRouter();
  const std::vector<uint32_t> log = Concat(Concat(Prompt(1), first.tokens), Prompt(2));
  const FakeCluster::Answer second = cluster.Generate(SessionRequest("s", "b", Prompt(2), 7));
  ASSERT_THAT(second.status, IsOk());
  EXPECT_THAT(second.tokens, ElementsAreArray(FakeModel::Greedy(log, 7, kVocabulary)));
  EXPECT_EQ(second.finish.reused_tokens(), 17);
  EXPECT_EQ(cluster.pipeline().stats().attaches_snapshot, 1);
}

TEST(TurnManagerTest, ALostSnapshotCostsTimeOnly) {
  FakeCluster cluster;
  cluster.CreateSession("s");
  std::vector<uint32_t> log;
  for (uint32_t turn = 0; turn < 2; ++turn) {
    const FakeCluster::Answer answer = cluster.Generate(SessionRequest("s", absl::StrCat("r", turn), Prompt(turn), 4));
    log = Concat(Concat(log, Prompt(turn)), answer.tokens);
    ASSERT_TRUE(WaitUntil([&] { return cluster.metrics().snapshots_committed.Value() == turn + 1; }));
  }
  const auto newest = NewestSnapshot(cluster, "s");
  ASSERT_THAT(newest, IsOk());
  ASSERT_EQ(newest->manifest().position(), 28);
  cluster.pipeline().LoseSnapshot(newest->manifest().snapshot_id());
  cluster.RestartRouter();
  const FakeCluster::Answer answer = cluster.Generate(SessionRequest("s", "c", Prompt(9), 5));
  ASSERT_THAT(answer.status, IsOk());
  EXPECT_THAT(answer.tokens, ElementsAreArray(FakeModel::Greedy(Concat(log, Prompt(9)), 5, kVocabulary)));
  EXPECT_EQ(answer.finish.reused_tokens(), 14);  // The older one.
  EXPECT_EQ(cluster.metrics().snapshots_dropped.Value(), 1);
}

TEST(TurnManagerTest, AttachesThatFailAreTriedAgain) {
  TurnManager::Options options;
  options.retry_delay = absl::Milliseconds(1);
  FakeCluster cluster({}, options);
  cluster.pipeline().FailAttaches(3, absl::UnavailableError("the state store cannot be reached"));
  const FakeCluster::Answer answer = cluster.Generate(Request(Prompt(1), 5));
  ASSERT_THAT(answer.status, IsOk());
  EXPECT_THAT(answer.tokens, ElementsAreArray(FakeModel::Greedy(Prompt(1), 5, kVocabulary)));
}

TEST(TurnManagerTest, ARefusedEntryIsFedAgain) {
  TurnManager::Options options;
  options.retry_delay = absl::Milliseconds(1);
  FakeCluster cluster({}, options);
  cluster.CreateSession("s");
  cluster.pipeline().FailEntries(1, absl::AbortedError("slot 0 is at another position"));
  const FakeCluster::Answer answer = cluster.Generate(SessionRequest("s", "a", Prompt(1), 5));
  ASSERT_THAT(answer.status, IsOk());
  EXPECT_THAT(answer.tokens, ElementsAreArray(FakeModel::Greedy(Prompt(1), 5, kVocabulary)));
}

TEST(TurnManagerTest, AFailedSnapshotHarmsNobody) {
  FakeCluster cluster;
  cluster.CreateSession("s");
  cluster.pipeline().FailSaves(100, absl::ResourceExhaustedError("disk full"));
  const FakeCluster::Answer first = cluster.Generate(SessionRequest("s", "a", Prompt(1), 5));
  ASSERT_THAT(first.status, IsOk());
  ASSERT_TRUE(WaitUntil([&] { return cluster.metrics().snapshots_failed.Value() == 1; }));
  cluster.RestartRouter();
  const FakeCluster::Answer second = cluster.Generate(SessionRequest("s", "b", Prompt(2), 5));
  ASSERT_THAT(second.status, IsOk());
  EXPECT_EQ(second.finish.reused_tokens(), 0);
  EXPECT_THAT(second.tokens,
              ElementsAreArray(FakeModel::Greedy(Concat(Concat(Prompt(1), first.tokens), Prompt(2)), 5, kVocabulary)));
}

TEST(TurnManagerTest, LongTurnsAreSavedOnTheWay) {
  TurnManager::Options options;
  options.snapshot_interval_tokens = 10;
  FakeCluster cluster({}, options);
  cluster.CreateSession("s");
  ASSERT_THAT(cluster.Generate(SessionRequest("s", "a", Prompt(1), 100)).status, IsOk());
  EXPECT_TRUE(WaitUntil([&] { return cluster.metrics().snapshots_committed.Value() >= 4; }));
}

TEST(TurnManagerTest, CancelFreesTheSlotForTheNext) {
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

TEST(TurnManagerTest, ACancelledTurnGoesOnWhereItWas) {
  FakeCluster cluster;
  cluster.CreateSession("s");
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call first = cluster.Start(SessionRequest("s", "a", Prompt(1), 50));
  cluster.pipeline().AllowSteps(12);
  ASSERT_TRUE(first.stream->WaitReceived(5));
  cluster.router().Cancel(first.id);
  EXPECT_THAT(first.stream->Wait(), StatusIs(absl::StatusCode::kCancelled));
  cluster.pipeline().ResumeSteps();
  const size_t received = first.stream->received().size();
  v1::GenerateRequest resume = SessionRequest("s", "a", Prompt(1), 50);
  resume.set_resume_from(received);
  const FakeCluster::Answer rest = cluster.Generate(resume);
  ASSERT_THAT(rest.status, IsOk());
  EXPECT_EQ(rest.first_index, received);
  const std::vector<uint32_t> all = FakeModel::Greedy(Prompt(1), 50, kVocabulary);
  EXPECT_THAT(rest.tokens, ElementsAreArray(std::vector<uint32_t>(all.begin() + received, all.end())));
  EXPECT_EQ(rest.finish.generated_tokens(), 50);
  EXPECT_EQ(cluster.Log("s"), Concat(Prompt(1), all));
}

TEST(TurnManagerTest, ALostWorkerChangesNoToken) {
  for (const int killed : {0, 1}) {
    SCOPED_TRACE(killed);
    FakeCluster cluster;
    cluster.CreateSession("s");
    cluster.pipeline().PauseSteps();
    v1::GenerateRequest sampled = SessionRequest("s", "a", Prompt(1), 300);
    sampled.mutable_sampling()->set_temperature(1);
    sampled.mutable_sampling()->set_seed(7);
    const FakeCluster::Call with_session = cluster.Start(sampled);
    const FakeCluster::Call without = cluster.Start(Request(Prompt(2), 300));
    // As many steps as it takes: the turn that begins first must not use up those of the other.
    ASSERT_TRUE(WaitUntil([&] {
      cluster.pipeline().AllowSteps(1);
      return with_session.stream->received().size() >= 3 && without.stream->received().size() >= 3;
    }));
    cluster.pipeline().Kill(killed);
    ASSERT_TRUE(WaitUntil([&] { return !cluster.router().pipeline().state().serving; }));
    EXPECT_FALSE(with_session.stream->closed());
    cluster.pipeline().ResumeSteps();
    cluster.pipeline().Restart(killed);
    const FakeCluster::Answer a = cluster.Finish(with_session);
    const FakeCluster::Answer b = cluster.Finish(without);
    ASSERT_THAT(a.status, IsOk());
    ASSERT_THAT(b.status, IsOk());
    EXPECT_THAT(a.tokens, ElementsAreArray(FakeModel::Generate(Prompt(1), 300, sampled.sampling(), kVocabulary)));
    EXPECT_THAT(b.tokens, ElementsAreArray(FakeModel::Greedy(Prompt(2), 300, kVocabulary)));
    EXPECT_EQ(cluster.Log("s"), Concat(Prompt(1), a.tokens));
  }
}

TEST(TurnManagerTest, ManyEpochLossesUnderLoadChangeNoToken) {
  FakePipeline::Options pipeline;
  pipeline.slots = 6;
  pipeline.max_batch_tokens = 8;
  TurnManager::Options options;
  options.snapshot_interval_tokens = 16;
  options.retry_delay = absl::Milliseconds(1);
  FakeCluster cluster(pipeline, options);
  std::vector<FakeCluster::Call> calls;
  cluster.pipeline().PauseSteps();
  for (uint32_t i = 0; i < 12; ++i) {
    cluster.CreateSession(absl::StrCat("session-", i));
    calls.push_back(cluster.Start(SessionRequest(absl::StrCat("session-", i), "r", Prompt(i, 20), 80)));
  }
  for (int loss = 0; loss < 8; ++loss) {
    const int64_t steps = cluster.pipeline().stats().steps;
    cluster.pipeline().AllowSteps(15 + loss);
    ASSERT_TRUE(WaitUntil([&] { return cluster.pipeline().stats().steps > steps + 5; }));
    cluster.pipeline().BreakEpoch();
  }
  cluster.pipeline().ResumeSteps();
  for (uint32_t i = 0; i < 12; ++i) {
    const FakeCluster::Answer answer = cluster.Finish(calls[i]);
    ASSERT_THAT(answer.status, IsOk());
    EXPECT_THAT(answer.tokens, ElementsAreArray(FakeModel::Greedy(Prompt(i, 20), 80, kVocabulary)));
    EXPECT_EQ(cluster.Log(absl::StrCat("session-", i)), Concat(Prompt(i, 20), answer.tokens));
  }
}

TEST(TurnManagerTest, APipelineThatHangsIsOpenedAnew) {
  TurnManager::Options options;
  options.progress_timeout = absl::Milliseconds(200);
  FakeCluster cluster({}, options);
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call call = cluster.Start(Request(Prompt(1), 10));
  ASSERT_TRUE(WaitUntil([&] { return cluster.pipeline().stats().epochs >= 2; }));
  cluster.pipeline().ResumeSteps();
  const FakeCluster::Answer answer = cluster.Finish(call);
  ASSERT_THAT(answer.status, IsOk());
  EXPECT_THAT(answer.tokens, ElementsAreArray(FakeModel::Greedy(Prompt(1), 10, kVocabulary)));
}

TEST(TurnManagerTest, AStartedTurnDoesNotWaitForAPipelineForEver) {
  TurnManager::Options options;
  options.outage_timeout = absl::Milliseconds(50);
  FakeCluster cluster({}, options);
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call call = cluster.Start(Request(Prompt(1), 10));
  cluster.pipeline().Kill(1);
  EXPECT_THAT(call.stream->Wait(), StatusIs(absl::StatusCode::kUnavailable));
  const FakeCluster::Answer answer = cluster.Generate(Request(Prompt(1), 10));
  EXPECT_THAT(answer.status, StatusIs(absl::StatusCode::kUnavailable, HasSubstr("fake-1:1")));
  EXPECT_TRUE(common::GetRetryDelay(answer.status).has_value());
}

TEST(TurnManagerTest, NothingIsShownThatIsNotDurable) {
  FakeCluster cluster;
  cluster.CreateSession("s");
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call call = cluster.Start(SessionRequest("s", "a", Prompt(1), 100));
  cluster.pipeline().AllowSteps(5);
  ASSERT_TRUE(call.stream->WaitReceived(2));
  cluster.store().FailWith(absl::UnavailableError("the store is away"));
  const size_t shown = call.stream->received().size();
  const int64_t steps = cluster.pipeline().stats().steps;
  cluster.pipeline().ResumeSteps();
  ASSERT_TRUE(WaitUntil([&] { return cluster.pipeline().stats().steps >= steps + 50; }));  // Decoding goes on.
  EXPECT_THAT(call.stream->received().size(), Le(shown + 3));  // What was already on its way to the log.
  cluster.store().FailWith(absl::OkStatus());
  const FakeCluster::Answer answer = cluster.Finish(call);
  ASSERT_THAT(answer.status, IsOk());
  EXPECT_THAT(answer.tokens, ElementsAreArray(FakeModel::Greedy(Prompt(1), 100, kVocabulary)));
  EXPECT_EQ(cluster.Log("s"), Concat(Prompt(1), answer.tokens));
}

TEST(TurnManagerTest, DecodingWaitsForCommitsThatFallBehind) {
  TurnManager::Options options;
  options.max_uncommitted_tokens = 8;
  FakeCluster cluster({}, options);
  cluster.CreateSession("s");
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call call = cluster.Start(SessionRequest("s", "a", Prompt(1), 60));
  cluster.pipeline().AllowSteps(3);
  ASSERT_TRUE(call.stream->WaitReceived(1));
  cluster.store().FailWith(absl::UnavailableError("the store is away"));
  cluster.pipeline().ResumeSteps();
  // It comes to rest with at most the bound beyond what was committed.
  int64_t steps = -1;
  ASSERT_TRUE(WaitUntil([&] {
    const int64_t before = steps;
    steps = cluster.pipeline().stats().steps;
    absl::SleepFor(absl::Milliseconds(50));
    return before == steps;
  }));
  EXPECT_THAT(steps, Le(3 + 8 + 8 + 3));
  cluster.store().FailWith(absl::OkStatus());
  const FakeCluster::Answer answer = cluster.Finish(call);
  ASSERT_THAT(answer.status, IsOk());
  EXPECT_THAT(answer.tokens, ElementsAreArray(FakeModel::Greedy(Prompt(1), 60, kVocabulary)));
}

TEST(TurnManagerTest, ALostAnswerOfTheStoreDoublesNoToken) {
  FakeCluster cluster;
  cluster.CreateSession("s");
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call call = cluster.Start(SessionRequest("s", "a", Prompt(1), 40));
  cluster.pipeline().AllowSteps(5);
  ASSERT_TRUE(call.stream->WaitReceived(2));
  cluster.store().LoseAnswersWith(absl::UnavailableError("connection reset"));
  const int64_t steps = cluster.pipeline().stats().steps;
  cluster.pipeline().AllowSteps(10);
  ASSERT_TRUE(WaitUntil([&] { return cluster.pipeline().stats().steps >= steps + 5; }));
  // The tokens are in the log, and the router does not know.
  ASSERT_TRUE(WaitUntil([&] { return cluster.Log("s").size() > 10 + call.stream->received().size(); }));
  cluster.store().LoseAnswersWith(absl::OkStatus());
  cluster.pipeline().ResumeSteps();
  const FakeCluster::Answer answer = cluster.Finish(call);
  ASSERT_THAT(answer.status, IsOk());
  EXPECT_THAT(answer.tokens, ElementsAreArray(FakeModel::Greedy(Prompt(1), 40, kVocabulary)));
  EXPECT_EQ(cluster.Log("s"), Concat(Prompt(1), answer.tokens));
}

TEST(TurnManagerTest, AStoreThatStaysAwayEndsTheTurnAndItCanBeResumed) {
  TurnManager::Options options;
  options.store_timeout = absl::Milliseconds(200);
  FakeCluster cluster({}, options);
  cluster.CreateSession("s");
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call call = cluster.Start(SessionRequest("s", "a", Prompt(1), 40));
  cluster.pipeline().AllowSteps(5);
  ASSERT_TRUE(call.stream->WaitReceived(2));
  cluster.store().FailWith(absl::UnavailableError("the store is away"));
  cluster.pipeline().ResumeSteps();
  EXPECT_THAT(call.stream->Wait(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("state store")));
  const size_t received = call.stream->received().size();
  cluster.store().FailWith(absl::OkStatus());
  v1::GenerateRequest resume = SessionRequest("s", "a", Prompt(1), 40);
  resume.set_resume_from(received);
  FakeCluster::Answer rest;
  ASSERT_TRUE(WaitUntil([&] {  // The lease may still be on its way out.
    rest = cluster.Generate(resume);
    return rest.status.ok();
  }));
  const std::vector<uint32_t> all = FakeModel::Greedy(Prompt(1), 40, kVocabulary);
  EXPECT_THAT(rest.tokens, ElementsAreArray(std::vector<uint32_t>(all.begin() + received, all.end())));
  EXPECT_EQ(cluster.Log("s"), Concat(Prompt(1), all));
}

TEST(TurnManagerTest, AnotherRouterResumesTheTurnWithTheExactIndices) {
  FakeCluster cluster;
  cluster.CreateSession("s");
  cluster.pipeline().PauseSteps();
  v1::GenerateRequest request = SessionRequest("s", "a", Prompt(1), 30);
  request.mutable_sampling()->set_temperature(1);  // The seed is drawn, and kept in the log.
  const FakeCluster::Call call = cluster.Start(request);
  cluster.pipeline().AllowSteps(9);
  ASSERT_TRUE(call.stream->WaitReceived(4));
  cluster.RestartRouter();
  EXPECT_THAT(call.stream->Wait(), StatusIs(absl::StatusCode::kUnavailable));
  std::vector<uint32_t> tokens;
  for (const v1::GenerateResponse& message : call.stream->received()) tokens.push_back(message.token_id());
  cluster.pipeline().ResumeSteps();
  request.set_resume_from(tokens.size());
  const FakeCluster::Answer rest = cluster.Generate(request);
  ASSERT_THAT(rest.status, IsOk());
  EXPECT_EQ(rest.first_index, tokens.size());
  v1::Sampling sampling = request.sampling();
  sampling.set_seed(rest.finish.seed());
  EXPECT_THAT(Concat(tokens, rest.tokens), ElementsAreArray(FakeModel::Generate(Prompt(1), 30, sampling, kVocabulary)));
}

TEST(TurnManagerTest, AFinishedTurnIsToldAgain) {
  FakeCluster cluster;
  cluster.CreateSession("s");
  const FakeCluster::Answer first = cluster.Generate(SessionRequest("s", "a", Prompt(1), 12));
  ASSERT_THAT(first.status, IsOk());
  const int64_t rows = cluster.pipeline().stats().rows;
  for (const bool restarted : {false, true}) {
    if (restarted) cluster.RestartRouter();
    const FakeCluster::Answer again = cluster.Generate(SessionRequest("s", "a", Prompt(1), 12));
    ASSERT_THAT(again.status, IsOk());
    EXPECT_EQ(again.tokens, first.tokens);
    EXPECT_EQ(again.finish.reason(), v1::FINISH_REASON_LENGTH);
    EXPECT_EQ(again.finish.session_tokens(), 22);
    v1::GenerateRequest tail = SessionRequest("s", "a", Prompt(1), 12);
    tail.set_resume_from(12);
    const FakeCluster::Answer end = cluster.Generate(tail);
    ASSERT_THAT(end.status, IsOk());
    EXPECT_THAT(end.tokens, IsEmpty());
    EXPECT_EQ(end.finish.generated_tokens(), 12);
    tail.set_resume_from(13);
    EXPECT_THAT(cluster.Generate(tail).status, StatusIs(absl::StatusCode::kOutOfRange));
  }
  EXPECT_THAT(cluster.pipeline().stats().rows, Le(rows + 1));  // Its last token at most.
  EXPECT_THAT(cluster.Log("s"), SizeIs(22));
}

TEST(TurnManagerTest, ARequestSentTwiceRunsOnceAndTheLaterCallTakesOver) {
  FakeCluster cluster;
  cluster.CreateSession("s");
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call first = cluster.Start(SessionRequest("s", "a", Prompt(1), 30));
  cluster.pipeline().AllowSteps(6);
  ASSERT_TRUE(first.stream->WaitReceived(2));
  const FakeCluster::Call second = cluster.Start(SessionRequest("s", "a", Prompt(1), 30));
  EXPECT_THAT(first.stream->Wait(), StatusIs(absl::StatusCode::kAborted, HasSubstr("took over")));
  cluster.router().Cancel(first.id);  // The client of the first leaves: not the turn's business any more.
  cluster.pipeline().ResumeSteps();
  const FakeCluster::Answer answer = cluster.Finish(second);
  ASSERT_THAT(answer.status, IsOk());
  EXPECT_EQ(answer.first_index, 0);
  EXPECT_THAT(answer.tokens, ElementsAreArray(FakeModel::Greedy(Prompt(1), 30, kVocabulary)));
  EXPECT_EQ(cluster.pipeline().stats().attaches_fresh, 1);
}

TEST(TurnManagerTest, TheSameRequestIdWithAnotherInputIsRefused) {
  FakeCluster cluster;
  cluster.CreateSession("s");
  cluster.pipeline().PauseSteps();
  const v1::GenerateRequest request = SessionRequest("s", "a", Prompt(1), 30);
  const FakeCluster::Call running = cluster.Start(request);
  std::vector<v1::GenerateRequest> others(4, request);
  others[0] = SessionRequest("s", "a", Prompt(2), 30);
  others[1] = SessionRequest("s", "a", Prompt(1, 9), 30);
  others[2].set_max_tokens(31);
  others[3].mutable_sampling()->set_temperature(0.5);
  for (const bool finished : {false, true}) {
    if (finished) {
      cluster.pipeline().ResumeSteps();
      ASSERT_THAT(cluster.Finish(running).status, IsOk());
    }
    for (const v1::GenerateRequest& other : others) {
      const absl::Status status = cluster.Generate(other).status;
      EXPECT_THAT(status, StatusIs(absl::StatusCode::kInvalidArgument));
      EXPECT_EQ(common::GetInvalidField(status), "request_id");
    }
  }
  EXPECT_THAT(cluster.Generate(request).status, IsOk());
}

TEST(TurnManagerTest, ASecondTurnOfASessionIsAborted) {
  FakeCluster cluster;
  cluster.CreateSession("s");
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call running = cluster.Start(SessionRequest("s", "a", Prompt(1), 10));
  for (const std::string& other : {"b", ""}) {
    const absl::Status status = cluster.Generate(SessionRequest("s", other, Prompt(2), 10)).status;
    EXPECT_THAT(status, StatusIs(absl::StatusCode::kAborted));
    EXPECT_TRUE(common::GetRetryDelay(status).has_value());
  }
  cluster.pipeline().ResumeSteps();
  ASSERT_THAT(cluster.Finish(running).status, IsOk());
  // What follows a finished turn never meets its closing.
  for (int i = 0; i < 20; ++i) {
    ASSERT_THAT(cluster.Generate(SessionRequest("s", absl::StrCat("c", i), Prompt(2), 3)).status, IsOk());
  }
}

TEST(TurnManagerTest, AnotherTurnClosesOneWhoseClientLeft) {
  FakeCluster cluster;
  cluster.CreateSession("s");
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call first = cluster.Start(SessionRequest("s", "a", Prompt(1), 100));
  cluster.pipeline().AllowSteps(6);
  ASSERT_TRUE(first.stream->WaitReceived(3));
  cluster.router().Cancel(first.id);
  cluster.pipeline().ResumeSteps();
  const FakeCluster::Answer second = cluster.Generate(SessionRequest("s", "b", Prompt(2), 5));
  ASSERT_THAT(second.status, IsOk());
  const std::vector<uint32_t> log = cluster.Log("s");
  ASSERT_THAT(log.size(), Ge(10 + 3 + 10 + 5));
  const std::vector<uint32_t> before(log.begin(), log.end() - 5);
  EXPECT_THAT(second.tokens, ElementsAreArray(FakeModel::Greedy(before, 5, kVocabulary)));
  // The first was closed with what it had.
  const FakeCluster::Answer closed = cluster.Generate(SessionRequest("s", "a", Prompt(1), 100));
  ASSERT_THAT(closed.status, IsOk());
  EXPECT_EQ(closed.finish.reason(), v1::FINISH_REASON_CANCELLED);
  EXPECT_EQ(closed.tokens.size(), log.size() - 25);
}

TEST(TurnManagerTest, WhoLosesTheLeaseStopsAndNothingIsWrittenTwice) {
  for (const bool by_renewal : {false, true}) {
    SCOPED_TRACE(by_renewal);
    TurnManager::Options options;
    options.lease_ttl = by_renewal ? absl::Milliseconds(300) : absl::Hours(1);
    FakeCluster cluster({}, options);
    cluster.CreateSession("s");
    cluster.pipeline().PauseSteps();
    const FakeCluster::Call call = cluster.Start(SessionRequest("s", "a", Prompt(1), 40));
    cluster.pipeline().AllowSteps(8);
    ASSERT_TRUE(call.stream->WaitReceived(3));
    // The same router started again elsewhere: its predecessor is dead, it thinks.
    v1::AcquireLeaseRequest acquire;
    acquire.set_session_id("s");
    acquire.set_holder("router-0");
    acquire.set_incarnation("its successor");
    acquire.mutable_ttl()->set_seconds(60);
    const auto taken = cluster.store().AcquireLease(acquire, absl::Now() + kTestLimit);
    ASSERT_THAT(taken, IsOk());
    const std::vector<uint32_t> log = cluster.Log("s");
    if (!by_renewal) cluster.pipeline().ResumeSteps();
    const absl::Status status = call.stream->Wait();
    EXPECT_THAT(status, StatusIs(absl::StatusCode::kAborted));
    EXPECT_TRUE(common::GetRetryDelay(status).has_value());
    EXPECT_EQ(cluster.Log("s"), log);
    cluster.pipeline().ResumeSteps();
    EXPECT_TRUE(WaitUntil([&] { return cluster.router().counts().running == 0; }));
    // And when it has it again, it goes on.
    v1::ReleaseLeaseRequest release;
    *release.mutable_lease() = taken->lease();
    ASSERT_THAT(cluster.store().ReleaseLease(release, absl::Now() + kTestLimit), IsOk());
    const FakeCluster::Answer again = cluster.Generate(SessionRequest("s", "a", Prompt(1), 40));
    ASSERT_THAT(again.status, IsOk());
    EXPECT_THAT(again.tokens, ElementsAreArray(FakeModel::Greedy(Prompt(1), 40, kVocabulary)));
  }
}

TEST(TurnManagerTest, UnknownSessionIsNotFound) {
  FakeCluster cluster;
  EXPECT_THAT(cluster.Generate(SessionRequest("nobody", "a", Prompt(1), 10)).status,
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("nobody")));
}

TEST(TurnManagerTest, ZeroTokensOnlyFeedTheInput) {
  FakeCluster cluster;
  cluster.CreateSession("s");
  const FakeCluster::Answer fed = cluster.Generate(SessionRequest("s", "a", Prompt(1, 200), 0));
  ASSERT_THAT(fed.status, IsOk());
  EXPECT_THAT(fed.tokens, IsEmpty());
  EXPECT_EQ(fed.finish.reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(fed.finish.session_tokens(), 200);
  const FakeCluster::Answer next = cluster.Generate(SessionRequest("s", "b", Prompt(2), 5));
  ASSERT_THAT(next.status, IsOk());
  EXPECT_EQ(next.finish.reused_tokens(), 200);
  EXPECT_THAT(next.tokens, ElementsAreArray(FakeModel::Greedy(Concat(Prompt(1, 200), Prompt(2)), 5, kVocabulary)));
  ASSERT_THAT(cluster.Generate(Request(Prompt(1), 0)).status, IsOk());
}

TEST(TurnManagerTest, AStopTokenIsNeitherReturnedNorKept) {
  FakeCluster cluster;
  cluster.CreateSession("s");
  const std::vector<uint32_t> greedy = FakeModel::Greedy(Prompt(1), 20, kVocabulary);
  const size_t stop = std::find(greedy.begin(), greedy.end(), greedy[8]) - greedy.begin();  // Its first occurrence.
  v1::GenerateRequest request = SessionRequest("s", "a", Prompt(1), 20);
  request.add_stop_token_ids(greedy[8]);
  for (int again = 0; again < 2; ++again) {
    const FakeCluster::Answer answer = cluster.Generate(request);
    ASSERT_THAT(answer.status, IsOk());
    EXPECT_THAT(answer.tokens, ElementsAreArray(std::vector<uint32_t>(greedy.begin(), greedy.begin() + stop)));
    EXPECT_EQ(answer.finish.reason(), v1::FINISH_REASON_STOP_TOKEN);
    EXPECT_EQ(answer.finish.stop_token_id(), greedy[8]);
  }
  EXPECT_THAT(cluster.Log("s"), SizeIs(10 + stop));
  const FakeCluster::Answer next = cluster.Generate(SessionRequest("s", "b", Prompt(2), 3));
  EXPECT_EQ(next.finish.reused_tokens(), 10 + stop);
}

FakePipeline::Options WorldPipeline() {
  FakePipeline::Options options;
  options.vocab_size = 65536;
  return options;
}

TEST(TurnManagerTest, AStopStringOverTokenBordersEndsTheText) {
  FakeCluster cluster(WorldPipeline());
  cluster.CreateSession("s");
  v1::GenerateRequest request;
  request.set_text("hello");
  request.set_max_tokens(20);
  const FakeCluster::Answer whole = cluster.Generate(request);
  ASSERT_THAT(whole.status, IsOk());
  ASSERT_EQ(whole.tokens.size(), 20);
  std::string text;
  for (uint32_t id : whole.tokens) text += std::string(cluster.tokenizer().TokenBytes(id));
  EXPECT_EQ(whole.text, text);

  // From inside the 5th token into the 6th.
  const std::string before = cluster.tokenizer().Decode(absl::MakeSpan(whole.tokens).subspan(0, 4));
  const std::string stop = text.substr(before.size() + 1, 4);
  const size_t cut = text.find(stop);
  request.add_stop(stop);
  request.set_session_id("s");
  request.set_request_id("a");
  for (int again = 0; again < 2; ++again) {
    const FakeCluster::Answer stopped = cluster.Generate(request);
    ASSERT_THAT(stopped.status, IsOk());
    EXPECT_EQ(stopped.text, text.substr(0, cut));
    EXPECT_EQ(stopped.finish.reason(), v1::FINISH_REASON_STOP_STRING);
    EXPECT_EQ(stopped.finish.stop_string(), stop);
    EXPECT_EQ(cluster.Log("s").size(), 5 + stopped.tokens.size());
  }
}

TEST(TurnManagerTest, FullQueuesAnswerAtOnce) {
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

TEST(TurnManagerTest, ASlowClientPausesItsTurnAndOthersGoOn) {
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

TEST(TurnManagerTest, AClientThatTakesNothingIsDropped) {
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

TEST(TurnManagerTest, TheSeedIsDrawnOnceAndReported) {
  FakeCluster cluster;
  v1::GenerateRequest request = Request(Prompt(1), 10);
  request.mutable_sampling()->set_temperature(1);
  const FakeCluster::Answer drawn = cluster.Generate(request);
  request.mutable_sampling()->set_seed(drawn.finish.seed());
  EXPECT_EQ(cluster.Generate(request).tokens, drawn.tokens);
}

TEST(TurnManagerTest, TopLogprobsComeWithTheTokens) {
  FakeCluster cluster;
  v1::GenerateRequest request = Request(Prompt(1), 10);
  request.mutable_sampling()->set_top_logprobs(3);
  const FakeCluster::Call call = cluster.Start(request);
  ASSERT_THAT(cluster.Finish(call).status, IsOk());
  const auto messages = call.stream->received();
  ASSERT_EQ(messages.size(), 11);
  for (int i = 0; i < 10; ++i) EXPECT_EQ(messages[i].top_logprobs_size(), 3);
}

// Runs `call` with a callback and waits for it.
template <typename Result, typename Starter>
absl::StatusOr<Result> Await(Starter start) {
  absl::Notification done;
  absl::StatusOr<Result> result = absl::UnknownError("no answer");
  start([&](absl::StatusOr<Result> answer) {
    result = std::move(answer);
    done.Notify();
  });
  if (!done.WaitForNotificationWithTimeout(kTestLimit)) return absl::DeadlineExceededError("no answer");
  return result;
}

TEST(TurnManagerTest, ScoreReturnsOneLogprobATokenAfterTheFirst) {
  FakeCluster cluster;
  for (const int count : {1, 2, 500}) {
    v1::ScoreRequest request;
    const std::vector<uint32_t> tokens = Prompt(3, count);
    request.mutable_tokens()->mutable_ids()->Add(tokens.begin(), tokens.end());
    const auto response =
        Await<v1::ScoreResponse>([&](auto done) { cluster.router().Score(cluster.router().NewCall(), request, done); });
    ASSERT_THAT(response, IsOk());
    EXPECT_THAT(response->token_ids(), ElementsAreArray(tokens));
    ASSERT_EQ(response->logprobs_size(), count - 1);
    for (int i = 0; i + 1 < count; ++i) EXPECT_EQ(response->logprobs(i), -static_cast<float>(tokens[i + 1] % 97) / 8);
  }
}

// What ScoreDocument sent, checked to be the tokens of the document in order. One logprob a token after the first.
std::vector<float> DocumentLogprobs(const FakeStream<v1::ScoreDocumentResponse>& stream,
                                    const std::vector<uint32_t>& tokens) {
  std::vector<float> logprobs;
  for (const v1::ScoreDocumentResponse& response : stream.received()) {
    EXPECT_EQ(response.token_count(), tokens.size());
    EXPECT_EQ(response.first(), logprobs.size() + 1);
    EXPECT_EQ(response.token_ids_size(), response.logprobs_size());
    for (int i = 0; i < response.token_ids_size(); ++i) {
      EXPECT_EQ(response.token_ids(i), tokens.at(logprobs.size() + 1));
      logprobs.push_back(response.logprobs(i));
    }
  }
  return logprobs;
}

std::vector<float> FakeLogprobs(const std::vector<uint32_t>& tokens) {
  std::vector<float> logprobs;
  for (size_t i = 1; i < tokens.size(); ++i) logprobs.push_back(-static_cast<float>(tokens[i] % 97) / 8);
  return logprobs;
}

TEST(TurnManagerTest, ADocumentOfAnyLengthIsScored) {
  FakePipeline::Options pipeline;
  pipeline.max_batch_tokens = 1024;
  FakeCluster cluster(pipeline);
  for (const int count : {1, 2, 500, 100000}) {
    SCOPED_TRACE(count);
    Document document;
    document.token_ids = Prompt(3, count);
    auto stream = std::make_shared<FakeStream<v1::ScoreDocumentResponse>>();
    cluster.router().ScoreDocument(cluster.router().NewCall(), document, stream);
    ASSERT_THAT(stream->Wait(), IsOk());
    EXPECT_EQ(DocumentLogprobs(*stream, document.token_ids), FakeLogprobs(document.token_ids));
  }
}

TEST(TurnManagerTest, ADocumentIsScoredOnceOverALostEpoch) {
  FakePipeline::Options pipeline;
  pipeline.max_batch_tokens = 16;
  FakeCluster cluster(pipeline);
  cluster.pipeline().PauseSteps();
  Document document;
  document.token_ids = Prompt(3, 300);
  auto stream = std::make_shared<FakeStream<v1::ScoreDocumentResponse>>();
  cluster.router().ScoreDocument(cluster.router().NewCall(), document, stream);
  cluster.pipeline().AllowSteps(5);
  ASSERT_TRUE(stream->WaitReceived(1));
  cluster.pipeline().BreakEpoch();
  cluster.pipeline().ResumeSteps();
  ASSERT_THAT(stream->Wait(), IsOk());
  EXPECT_EQ(DocumentLogprobs(*stream, document.token_ids), FakeLogprobs(document.token_ids));
  EXPECT_EQ(cluster.pipeline().stats().attaches_fresh, 2);
}

TEST(TurnManagerTest, AClientThatTakesNoScoresIsWaitedForAndThenDropped) {
  TurnManager::Options options;
  options.slow_client_timeout = absl::Milliseconds(200);
  FakePipeline::Options pipeline;
  pipeline.max_batch_tokens = 16;
  FakeCluster cluster(pipeline, options);
  Document document;
  document.token_ids = Prompt(3, 60000);
  auto stream = std::make_shared<FakeStream<v1::ScoreDocumentResponse>>();
  stream->Hold();
  cluster.router().ScoreDocument(cluster.router().NewCall(), document, stream);
  EXPECT_THAT(stream->Wait(), StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("does not read")));
  EXPECT_THAT(stream->received(), SizeIs(Le(4)));
  EXPECT_TRUE(WaitUntil([&] { return cluster.pipeline().stats().slots_used == 0; }));
}

TEST(TurnManagerTest, WrongDocumentsAreRefused) {
  TurnManager::Options options;
  options.limits.max_document_bytes = 100;
  FakeCluster cluster({}, options);
  const auto score = [&](const Document& document) {
    auto stream = std::make_shared<FakeStream<v1::ScoreDocumentResponse>>();
    cluster.router().ScoreDocument(cluster.router().NewCall(), document, stream);
    return stream->Wait();
  };
  EXPECT_THAT(score({}), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("empty")));
  EXPECT_THAT(score({"", {1, kVocabulary}, ""}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("token_ids[1]")));
  EXPECT_THAT(score({"", {0}, "text"}), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("tokenizer")));
  EXPECT_THAT(score({"other", {0}, ""}), StatusIs(absl::StatusCode::kNotFound, HasSubstr("other")));
  EXPECT_THAT(score({"", Prompt(1, 26), ""}), StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("100 bytes")));
}

TEST(TurnManagerTest, LogitsComeRowByRowAlsoOverALostEpoch) {
  TurnManager::Options options;
  options.allow_logits = true;
  FakePipeline::Options pipeline;
  pipeline.max_batch_tokens = 16;
  FakeCluster cluster(pipeline, options);
  cluster.pipeline().PauseSteps();
  const std::vector<uint32_t> tokens = Prompt(3, 300);
  v1::LogitsRequest request;
  request.mutable_tokens()->mutable_ids()->Add(tokens.begin(), tokens.end());
  auto stream = std::make_shared<FakeStream<v1::LogitsResponse>>();
  cluster.router().Logits(cluster.router().NewCall(), request, stream);
  cluster.pipeline().AllowSteps(5);
  ASSERT_TRUE(stream->WaitReceived(3));
  cluster.pipeline().BreakEpoch();
  cluster.pipeline().ResumeSteps();
  ASSERT_THAT(stream->Wait(), IsOk());
  uint64_t row = 0;
  for (const v1::LogitsResponse& response : stream->received()) {
    EXPECT_EQ(response.first_row(), row);
    EXPECT_EQ(response.vocab_size(), kVocabulary);
    ASSERT_EQ(response.logits().size(), response.rows() * kVocabulary * sizeof(float));
    row += response.rows();
  }
  EXPECT_EQ(row, 300);
}

TEST(TurnManagerTest, LogitsNeedPermission) {
  FakeCluster cluster;
  auto stream = std::make_shared<FakeStream<v1::LogitsResponse>>();
  v1::LogitsRequest request;
  request.mutable_tokens()->add_ids(1);
  cluster.router().Logits(cluster.router().NewCall(), request, stream);
  EXPECT_THAT(stream->Wait(), StatusIs(absl::StatusCode::kPermissionDenied));
}

TEST(TurnManagerTest, ExportMakesASnapshotAtTheEndOfTheLog) {
  FakeCluster cluster;
  cluster.CreateSession("empty");
  cluster.CreateSession("s");
  const auto export_state = [&](const std::string& id) {
    return Await<TurnManager::ExportedState>(
        [&](auto done) { cluster.router().Export(cluster.router().NewCall(), id, done); });
  };
  auto state = export_state("empty");
  ASSERT_THAT(state, IsOk());
  EXPECT_EQ(state->manifest.position(), 0);
  EXPECT_EQ(state->manifest.records_size(), 4);

  const FakeCluster::Answer answer = cluster.Generate(SessionRequest("s", "a", Prompt(1), 7));
  state = export_state("s");
  ASSERT_THAT(state, IsOk());
  EXPECT_EQ(state->manifest.position(), 17);
  const uint64_t expected = FakeModel::Feed(FakeModel::Fresh(), Concat(Prompt(1), answer.tokens));
  const auto record = cluster.store().GetRecord(state->manifest.records(3), absl::Now() + kTestLimit);
  ASSERT_THAT(record, IsOk());
  EXPECT_EQ(*record, std::string(reinterpret_cast<const char*>(&expected), sizeof(expected)));

  // Without a snapshot the log is fed again.
  cluster.CreateSession("t");
  cluster.pipeline().FailSaves(2, absl::ResourceExhaustedError("disk full"));
  ASSERT_THAT(cluster.Generate(SessionRequest("t", "a", Prompt(1), 7)).status, IsOk());
  ASSERT_TRUE(WaitUntil([&] { return cluster.metrics().snapshots_failed.Value() == 1; }));
  cluster.RestartRouter();
  state = export_state("t");
  ASSERT_THAT(state, IsOk());
  EXPECT_EQ(state->manifest.position(), 17);

  EXPECT_THAT(export_state("nobody"), StatusIs(absl::StatusCode::kNotFound));
  cluster.pipeline().FailSaves(2, absl::ResourceExhaustedError("disk full"));
  cluster.CreateSession("u");
  EXPECT_THAT(export_state("u"), StatusIs(absl::StatusCode::kResourceExhausted));
}

// --- Tuned states ----------------------------------------------------------------------------------------------------

constexpr char kPoet[] = "poet@12345678";
constexpr char kJudge[] = "judge@9abcdef0";

FakePipeline::Options Tuned() {
  FakePipeline::Options options;
  options.initial_states = {kJudge, kPoet};
  return options;
}

// The workers come back with other states.
void Offer(FakeCluster& cluster, std::vector<std::string> initial_states) {
  const int64_t epochs = cluster.pipeline().stats().epochs;
  cluster.pipeline().SetInitialStates(std::move(initial_states));
  cluster.pipeline().BreakEpoch();
  ASSERT_TRUE(WaitUntil(
      [&] { return cluster.pipeline().stats().epochs > epochs && cluster.router().pipeline().state().serving; }));
}

TEST(TurnManagerTest, ATunedSessionRebuiltFromTheLogBeginsWithItsState) {
  FakeCluster cluster(Tuned());
  cluster.CreateSession("s", kPoet);
  std::vector<uint32_t> log;
  for (uint32_t turn = 0; turn < 6; ++turn) {
    SCOPED_TRACE(turn);
    if (turn == 2) cluster.RestartRouter();          // Another router.
    if (turn == 3) cluster.pipeline().BreakEpoch();  // No warm slot.
    // From the second turn on no snapshot can be read: the whole log is fed again wherever no slot is warm.
    const auto newest = NewestSnapshot(cluster, "s");
    ASSERT_THAT(newest, IsOk());
    cluster.pipeline().LoseSnapshot(newest->manifest().snapshot_id());
    ASSERT_TRUE(WaitUntil([&] { return cluster.router().pipeline().state().serving; }));
    const FakeCluster::Answer answer = cluster.Generate(SessionRequest("s", absl::StrCat("r", turn), Prompt(turn), 7));
    ASSERT_THAT(answer.status, IsOk());
    log = Concat(log, Prompt(turn));
    EXPECT_THAT(answer.tokens, ElementsAreArray(FakeModel::Greedy(log, 7, kVocabulary, kPoet)));
    log = Concat(log, answer.tokens);
    ASSERT_TRUE(WaitUntil([&] { return cluster.metrics().snapshots_committed.Value() == turn + 1; }));
  }
  EXPECT_EQ(cluster.pipeline().stats().attaches_tuned, cluster.pipeline().stats().attaches_fresh);
  EXPECT_THAT(cluster.pipeline().stats().attaches_fresh, Ge(3));
}

TEST(TurnManagerTest, ALostWorkerChangesNoTokenOfATunedTurn) {
  FakeCluster cluster(Tuned());
  cluster.CreateSession("s", kPoet);
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call with_session = cluster.Start(SessionRequest("s", "a", Prompt(1), 200));
  v1::GenerateRequest request = Request(Prompt(2), 200);
  request.set_initial_state("judge");
  const FakeCluster::Call without = cluster.Start(request);
  ASSERT_TRUE(WaitUntil([&] {
    cluster.pipeline().AllowSteps(1);
    return with_session.stream->received().size() >= 3 && without.stream->received().size() >= 3;
  }));
  cluster.pipeline().Kill(1);
  ASSERT_TRUE(WaitUntil([&] { return !cluster.router().pipeline().state().serving; }));
  cluster.pipeline().ResumeSteps();
  cluster.pipeline().Restart(1);
  EXPECT_THAT(cluster.Finish(with_session).tokens,
              ElementsAreArray(FakeModel::Greedy(Prompt(1), 200, kVocabulary, kPoet)));
  EXPECT_THAT(cluster.Finish(without).tokens, ElementsAreArray(FakeModel::Greedy(Prompt(2), 200, kVocabulary, kJudge)));
}

TEST(TurnManagerTest, ASessionWhoseTunedStateIsGoneWaitsForItsReturn) {
  FakeCluster cluster(Tuned());
  cluster.CreateSession("s", kPoet);
  cluster.CreateSession("plain");
  const FakeCluster::Answer first = cluster.Generate(SessionRequest("s", "a", Prompt(1), 7));
  ASSERT_THAT(first.status, IsOk());
  Offer(cluster, {"poet@00000000"});  // Another file under the same name.
  const auto gone = StatusIs(absl::StatusCode::kFailedPrecondition,
                             AllOf(HasSubstr("session \"s\""), HasSubstr(kPoet), HasSubstr("poet@00000000")));
  EXPECT_THAT(cluster.Generate(SessionRequest("s", "b", Prompt(2), 7)).status, gone);
  EXPECT_THAT(Await<TurnManager::ExportedState>(
                  [&](auto done) { cluster.router().Export(cluster.router().NewCall(), "s", done); }),
              gone);
  EXPECT_EQ(cluster.Log("s"), Concat(Prompt(1), first.tokens)) << "nothing is in the log";
  EXPECT_THAT(cluster.Generate(SessionRequest("plain", "a", Prompt(2), 7)).status, IsOk());
  cluster.RestartRouter();  // Which has no lease yet.
  EXPECT_THAT(cluster.Generate(SessionRequest("s", "b", Prompt(2), 7)).status, gone);
  Offer(cluster, {kPoet});
  EXPECT_THAT(
      cluster.Generate(SessionRequest("s", "b", Prompt(2), 7)).tokens,
      ElementsAreArray(FakeModel::Greedy(Concat(Concat(Prompt(1), first.tokens), Prompt(2)), 7, kVocabulary, kPoet)));

  // In the middle of a turn, too.
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call running = cluster.Start(SessionRequest("s", "c", Prompt(3), 100));
  ASSERT_TRUE(WaitUntil([&] { return cluster.router().counts().running == 1; }));
  Offer(cluster, {});
  cluster.pipeline().ResumeSteps();
  EXPECT_THAT(cluster.Finish(running).status,
              StatusIs(absl::StatusCode::kFailedPrecondition, AllOf(HasSubstr(kPoet), HasSubstr("none"))));
}

TEST(TurnManagerTest, ARequestNamesItsTunedStateOrTheSessions) {
  FakeCluster cluster(Tuned());
  cluster.CreateSession("tuned", kPoet);
  cluster.CreateSession("plain");
  const struct {
    const char* name;
    const char* session;
    const char* initial_state;
    absl::StatusCode code;
    const char* begins_with;  // Or the message.
  } kCases[] = {
      {"no session, by name", "", "poet", absl::StatusCode::kOk, kPoet},
      {"no session, in full", "", kJudge, absl::StatusCode::kOk, kJudge},
      {"no session, the model's own", "", "", absl::StatusCode::kOk, ""},
      {"an unknown name", "", "bard", absl::StatusCode::kNotFound, "\"bard\"; those it has: judge@9abcdef0, poet@1234"},
      {"another file's", "", "poet@00000000", absl::StatusCode::kNotFound, "\"poet@00000000\""},
      {"a part of a name", "", "poe", absl::StatusCode::kNotFound, "\"poe\""},
      {"another than the session's", "tuned", "judge", absl::StatusCode::kInvalidArgument,
       "initial_state: judge@9abcdef0; the session began with poet@12345678"},
      {"one where the session has none", "plain", "judge", absl::StatusCode::kInvalidArgument,
       "the session began with the model's own"},
      {"the session's, by name", "tuned", "poet", absl::StatusCode::kOk, kPoet},
  };
  for (const auto& test : kCases) {
    SCOPED_TRACE(test.name);
    v1::GenerateRequest request = Request(Prompt(1), 5);
    request.set_session_id(test.session);
    request.set_initial_state(test.initial_state);
    const FakeCluster::Answer answer = cluster.Generate(request);
    if (test.code != absl::StatusCode::kOk) {
      EXPECT_THAT(answer.status, StatusIs(test.code, HasSubstr(test.begins_with)));
      continue;
    }
    ASSERT_THAT(answer.status, IsOk());
    EXPECT_THAT(answer.tokens, ElementsAreArray(FakeModel::Greedy(Prompt(1), 5, kVocabulary, test.begins_with)));
  }
  EXPECT_THAT(cluster.Log("tuned"), SizeIs(15)) << "nothing of what was refused is in the log";
  EXPECT_THAT(cluster.Log("plain"), IsEmpty());
}

TEST(TurnManagerTest, ALaterCallThatNamesAnotherTunedStateTakesNothingOver) {
  FakeCluster cluster(Tuned());
  cluster.CreateSession("s", kPoet);
  cluster.pipeline().PauseSteps();
  v1::GenerateRequest request = SessionRequest("s", "a", Prompt(1), 8);
  const FakeCluster::Call first = cluster.Start(request);
  ASSERT_TRUE(WaitUntil([&] { return cluster.Log("s").size() == 10; }));
  request.set_initial_state("judge");
  EXPECT_THAT(cluster.Generate(request).status,
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("initial_state")));
  cluster.pipeline().ResumeSteps();
  EXPECT_THAT(cluster.Finish(first).tokens, ElementsAreArray(FakeModel::Greedy(Prompt(1), 8, kVocabulary, kPoet)));
}

TEST(TurnManagerTest, WhatHasNoSessionBeginsWithTheTunedStateItNames) {
  TurnManager::Options options;
  options.allow_logits = true;
  FakeCluster cluster(Tuned(), options);
  TurnManager& router = cluster.router();
  const auto call = [&](const std::string& initial_state) {
    std::vector<absl::Status> statuses;
    v1::ScoreRequest score;
    *score.mutable_tokens() = Request(Prompt(1), 0).tokens();
    score.set_initial_state(initial_state);
    statuses.push_back(
        Await<v1::ScoreResponse>([&](auto done) { router.Score(router.NewCall(), score, done); }).status());
    auto document = std::make_shared<FakeStream<v1::ScoreDocumentResponse>>();
    router.ScoreDocument(router.NewCall(), {"", Prompt(1), "", initial_state}, document);
    statuses.push_back(document->Wait());
    v1::LogitsRequest rows;
    *rows.mutable_tokens() = score.tokens();
    rows.set_initial_state(initial_state);
    auto logits = std::make_shared<FakeStream<v1::LogitsResponse>>();
    router.Logits(router.NewCall(), rows, logits);
    statuses.push_back(logits->Wait());
    v1::EmbedRequest embed;
    *embed.mutable_tokens() = score.tokens();
    embed.set_initial_state(initial_state);
    statuses.push_back(
        Await<v1::EmbedResponse>([&](auto done) { router.Embed(router.NewCall(), embed, done); }).status());
    return statuses;
  };
  call("poet");  // The fake pipeline embeds nothing.
  EXPECT_EQ(cluster.pipeline().stats().attaches_fresh, 4);
  EXPECT_EQ(cluster.pipeline().stats().attaches_tuned, 4);
  EXPECT_THAT(call("bard"), Each(StatusIs(absl::StatusCode::kNotFound, HasSubstr("\"bard\""))));
  call("");
  EXPECT_EQ(cluster.pipeline().stats().attaches_tuned, 4);
}

TEST(TurnManagerTest, ExclusiveJobsWaitForNobodysTurn) {
  FakeCluster cluster;
  cluster.CreateSession("s");
  const auto run = [&](bool deletes, std::function<absl::Status(const v1::Lease&)> job) {
    return Await<int>([&](auto done) {
             cluster.router().Exclusive(cluster.router().NewCall(), "s", deletes, job,
                                        [done](const absl::Status& status) {
                                          done(status.ok() ? absl::StatusOr<int>(0) : absl::StatusOr<int>(status));
                                        });
           })
        .status();
  };
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call running = cluster.Start(SessionRequest("s", "a", Prompt(1), 6));
  const auto rewind = [&](const v1::Lease& lease) {
    v1::RewindSessionRequest request;
    *request.mutable_lease() = lease;
    request.set_position(5);
    return cluster.store().RewindSession(request, absl::Now() + kTestLimit).status();
  };
  EXPECT_THAT(run(false, rewind), StatusIs(absl::StatusCode::kAborted));
  cluster.pipeline().ResumeSteps();
  ASSERT_THAT(cluster.Finish(running).status, IsOk());
  ASSERT_THAT(run(false, rewind), IsOk());
  EXPECT_THAT(cluster.Log("s"), SizeIs(5));
  const FakeCluster::Answer next = cluster.Generate(SessionRequest("s", "b", Prompt(2), 6));
  ASSERT_THAT(next.status, IsOk());
  std::vector<uint32_t> log = Prompt(1);
  log.resize(5);
  EXPECT_THAT(next.tokens, ElementsAreArray(FakeModel::Greedy(Concat(log, Prompt(2)), 6, kVocabulary)));
  const auto erase = [&](const v1::Lease& lease) {
    v1::DeleteSessionRequest request;
    *request.mutable_lease() = lease;
    return cluster.store().DeleteSession(request, absl::Now() + kTestLimit).status();
  };
  ASSERT_THAT(run(true, erase), IsOk());
  EXPECT_THAT(run(true, erase), StatusIs(absl::StatusCode::kNotFound));
  EXPECT_TRUE(WaitUntil([&] { return cluster.pipeline().stats().slots_used == 0; }));
  cluster.CreateSession("s");
  EXPECT_THAT(cluster.Generate(SessionRequest("s", "a", Prompt(3), 6)).tokens,
              ElementsAreArray(FakeModel::Greedy(Prompt(3), 6, kVocabulary)));
}

// Callers' threads refuse, the loop's thread runs turns: found by tsan.
TEST(TurnManagerTest, RefusalsDoNotTouchTheTurnsThatRun) {
  FakeCluster cluster;
  std::atomic<bool> is_over{false};
  std::thread refused([&] {
    int count = 0;
    for (; !is_over || count == 0; ++count) {
      EXPECT_THAT(cluster.Generate(v1::GenerateRequest()).status, StatusIs(absl::StatusCode::kInvalidArgument));
    }
  });
  for (int i = 0; i < 50; ++i) {
    EXPECT_THAT(cluster.Generate(Request(Prompt(i), 3)).tokens,
                ElementsAreArray(FakeModel::Greedy(Prompt(i), 3, kVocabulary)));
  }
  is_over = true;
  refused.join();
}

TEST(TurnManagerTest, DrainLetsShortTurnsEndAndPausesLongOnes) {
  FakeCluster cluster;
  cluster.CreateSession("s");
  cluster.CreateSession("t");
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call short_turn = cluster.Start(SessionRequest("s", "a", Prompt(1), 3));
  const FakeCluster::Call long_turn = cluster.Start(SessionRequest("t", "a", Prompt(2), 500));
  ASSERT_TRUE(WaitUntil([&] { return cluster.router().counts().running == 2; }));
  cluster.pipeline().AllowSteps(12);
  std::thread drain([&] { cluster.router().Drain(absl::Now() + absl::Seconds(5)); });
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

TEST(TurnManagerTest, RandomTroubleChangesNoToken) {
  // Clients that leave and come back, losses of workers, stores that forget to answer, routers that die: every turn's
  // tokens are those of an undisturbed run, each seen once.
  const uint32_t seed = static_cast<uint32_t>(absl::ToUnixMicros(absl::Now()));
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  std::cout << "seed " << seed << "\n";
  std::mt19937 random(seed);
  FakePipeline::Options pipeline = Tuned();
  pipeline.slots = 4;
  pipeline.max_batch_tokens = 16;
  TurnManager::Options options;
  options.snapshot_interval_tokens = 20;
  options.retry_delay = absl::Milliseconds(1);
  options.max_uncommitted_tokens = 16;
  FakeCluster cluster(pipeline, options);
  constexpr int kClients = 6;
  constexpr uint32_t kTokens = 150;
  const auto initial_state = [](int i) { return i % 2 == 0 ? "" : kPoet; };
  for (int i = 0; i < kClients; ++i) cluster.CreateSession(absl::StrCat("session-", i), initial_state(i));
  std::vector<std::vector<uint32_t>> got(kClients);
  std::vector<absl::optional<FakeCluster::Call>> calls(kClients);
  std::vector<bool> finished(kClients, false);
  const auto collect = [&](int i) {
    if (!calls[i]->stream->closed()) return;
    for (const v1::GenerateResponse& message : calls[i]->stream->received()) {
      if (message.has_finish()) {
        finished[i] = true;
      } else {
        EXPECT_EQ(message.index(), got[i].size());
        got[i].push_back(message.token_id());
      }
    }
    calls[i].reset();
  };
  const absl::Time limit = absl::Now() + kTestLimit;
  cluster.pipeline().PauseSteps();
  while (std::count(finished.begin(), finished.end(), false) > 0) {
    ASSERT_LT(absl::Now(), limit);
    cluster.pipeline().AllowSteps(20);
    for (int i = 0; i < kClients; ++i) {
      if (finished[i] || calls[i].has_value()) continue;
      v1::GenerateRequest request = SessionRequest(absl::StrCat("session-", i), "r", Prompt(i, 30), kTokens);
      request.set_resume_from(got[i].size());
      calls[i] = cluster.Start(request);
    }
    absl::SleepFor(absl::Milliseconds(random() % 8));  // Lets things happen; nothing is expected of it.
    switch (random() % 8) {
      case 0:
        cluster.pipeline().BreakEpoch();
        break;
      case 1:
        cluster.store().FailWith(absl::UnavailableError("away"));
        absl::SleepFor(absl::Milliseconds(random() % 5));
        cluster.store().FailWith(absl::OkStatus());
        break;
      case 2:
        cluster.store().LoseAnswersWith(absl::UnavailableError("reset"));
        absl::SleepFor(absl::Milliseconds(random() % 5));
        cluster.store().LoseAnswersWith(absl::OkStatus());
        break;
      case 3:
        if (random() % 4 == 0) cluster.RestartRouter();
        break;
      case 4:
      case 5: {
        const int i = random() % kClients;
        if (calls[i].has_value()) cluster.router().Cancel(calls[i]->id);
        break;
      }
      default:
        break;
    }
    for (int i = 0; i < kClients; ++i) {
      if (calls[i].has_value() && calls[i]->stream->closed()) collect(i);
    }
  }
  for (int i = 0; i < kClients; ++i) {
    EXPECT_THAT(got[i], ElementsAreArray(FakeModel::Greedy(Prompt(i, 30), kTokens, kVocabulary, initial_state(i))))
        << "client " << i;
    EXPECT_EQ(cluster.Log(absl::StrCat("session-", i)), Concat(Prompt(i, 30), got[i]));
  }
}

}  // namespace
}  // namespace rwkv::router
