// What turns that give their slot away leave behind, and what comes of it.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/state_store.pb.h"
#include "services/router/driver/turn_manager.h"
#include "services/router/driver/yield_testing.h"
#include "services/router/testing/fake_cluster.h"
#include "services/router/testing/turn_testing.h"
#include "services/worker/client/fake_worker.h"
#include "tests/testing/fake_clock.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using ::rwkv::testing::IsOk;
using ::testing::ElementsAreArray;
using ::testing::Ge;
using worker::FakeModel;
using worker::FakePipeline;

// The turn that runs yields to another, once, and is let in again when that one is over.
void LetAnotherTurnPass(FakeCluster& cluster, testing::FakeClock& clock) {
  const FakeCluster::Call short_call = cluster.Start(Request(Prompt(2), 3));
  ASSERT_TRUE(WaitUntil([&] { return cluster.router().counts().waiting == 1; }));
  clock.Advance(absl::Seconds(2));
  ASSERT_TRUE(WaitUntil([&] {
    cluster.pipeline().AllowSteps(1);
    return short_call.stream->closed();
  }));
  EXPECT_THAT(cluster.Finish(short_call).status, IsOk());
  ASSERT_EQ(cluster.metrics().yielded_turns.Value(), 1);
  ASSERT_TRUE(WaitUntil([&] { return cluster.router().counts().waiting == 0; }));
}

// Also the first time: what it left behind is on its way, and to begin again from the start would be to lose it.
TEST(YieldStatesTest, ATurnWaitsForTheStateThatItLeftBehind) {
  testing::FakeClock clock;
  FakeCluster cluster(Slots(1), Quantum(absl::Seconds(1)), &clock);
  cluster.CreateSession("s");
  const FakeCluster::Call long_call = StartAndStep(cluster, SessionRequest("s", "a", Prompt(1), 300), 3);
  cluster.store().HoldCommits(true);
  LetAnotherTurnPass(cluster, clock);
  // Whoever asks for the lanes is answered between two rounds of the loop.
  for (int round = 0; round < 5; ++round) {
    const std::vector<LaneState> lanes = cluster.router().Lanes(absl::Now() + kTestLimit);
    ASSERT_EQ(lanes.size(), 1);
    EXPECT_EQ(lanes[0].load.turns, 0) << "it has begun without its state";
  }
  cluster.store().HoldCommits(false);
  cluster.pipeline().ResumeSteps();
  EXPECT_THAT(cluster.Finish(long_call).tokens, ElementsAreArray(FakeModel::Greedy(Prompt(1), 300, kVocabulary)));
  EXPECT_EQ(cluster.pipeline().stats().attaches_fresh, 2);
  EXPECT_EQ(cluster.pipeline().stats().attaches_snapshot, 1);
}

// But not for long: where states are kept may not answer, and what it had read it can read again.
TEST(YieldStatesTest, ATurnDoesNotWaitForLongForTheStateThatItLeftBehind) {
  testing::FakeClock clock;
  FakeCluster cluster(Slots(1), Quantum(absl::Seconds(1)), &clock);
  cluster.CreateSession("s");
  const FakeCluster::Call long_call = StartAndStep(cluster, SessionRequest("s", "a", Prompt(1), 300), 3);
  cluster.store().HoldCommits(true);
  LetAnotherTurnPass(cluster, clock);
  cluster.router().Lanes(absl::Now() + kTestLimit);
  clock.Advance(absl::Milliseconds(4999));
  ASSERT_EQ(cluster.router().Lanes(absl::Now() + kTestLimit).size(), 1);
  EXPECT_EQ(cluster.router().Lanes(absl::Now() + kTestLimit)[0].load.turns, 0) << "the state may still come";
  clock.Advance(absl::Milliseconds(1));
  cluster.pipeline().ResumeSteps();
  EXPECT_THAT(cluster.Finish(long_call).tokens, ElementsAreArray(FakeModel::Greedy(Prompt(1), 300, kVocabulary)));
  EXPECT_EQ(cluster.pipeline().stats().attaches_fresh, 3);
  EXPECT_EQ(cluster.pipeline().stats().attaches_snapshot, 0);
  cluster.store().HoldCommits(false);
}

TEST(YieldStatesTest, WhatATurnWithoutASessionLeftBehindIsDropped) {
  FakeCluster cluster(Slots(1), Quantum(absl::Milliseconds(5)));
  cluster.pipeline().PauseSteps();
  std::vector<FakeCluster::Call> calls;
  for (uint32_t i = 0; i < 2; ++i) calls.push_back(cluster.Start(Request(Prompt(i), 300)));
  ASSERT_TRUE(WaitUntil([&] {
    cluster.pipeline().AllowSteps(1);
    return cluster.metrics().yielded_turns.Value() >= 6;
  }));
  cluster.pipeline().ResumeSteps();
  for (const FakeCluster::Call& call : calls) EXPECT_THAT(cluster.Finish(call).status, IsOk());
  const std::vector<v1::RecordInfo> records = cluster.PutRecords();
  EXPECT_THAT(records.size(), Ge(6 * 4u));
  EXPECT_TRUE(WaitUntil([&] {
    return std::all_of(records.begin(), records.end(), [&](const v1::RecordInfo& info) {
      return absl::IsNotFound(cluster.store().GetRecord(info, absl::Now() + kTestLimit).status());
    });
  })) << "states of turns that are over are still in the store";
  EXPECT_EQ(cluster.metrics().snapshots_committed.Value(), 0);
  EXPECT_EQ(cluster.metrics().snapshots_failed.Value(), 0);
}

// With saves that fail each tenure of a slot begins from the start, and still gets a token further than the last one.
TEST(YieldStatesTest, WithoutSnapshotsItTakesLongerAndEndsTheSame) {
  ::rwkv::testing::FakeClock clock;
  FakePipeline::Options pipeline = Slots(1);
  pipeline.max_batch_tokens = 8;
  FakeCluster cluster(pipeline, Quantum(absl::Seconds(1)), &clock);
  cluster.pipeline().FailSaves(1 << 20, absl::ResourceExhaustedError("disk full"));
  cluster.pipeline().PauseSteps();
  std::vector<FakeCluster::Call> calls;
  for (uint32_t i = 0; i < 2; ++i) calls.push_back(cluster.Start(Request(Prompt(i, 100), 5)));
  ASSERT_TRUE(WaitUntil([&] {
    clock.Advance(absl::Seconds(2));  // No tenure is longer than a step, if that were enough.
    cluster.pipeline().PauseSteps();  // Takes back what is left of the last one.
    cluster.pipeline().AllowSteps(1);
    return calls[0].stream->closed() && calls[1].stream->closed();
  }));
  for (uint32_t i = 0; i < 2; ++i) {
    EXPECT_THAT(cluster.Finish(calls[i]).tokens, ElementsAreArray(FakeModel::Greedy(Prompt(i, 100), 5, kVocabulary)));
  }
  EXPECT_THAT(cluster.metrics().yielded_turns.Value(), Ge(4));
  EXPECT_EQ(cluster.pipeline().stats().attaches_snapshot, 0);
}

TEST(YieldStatesTest, AStateThatCannotBeReadIsMadeAnew) {
  FakePipeline::Options pipeline = Slots(1);
  pipeline.max_batch_tokens = 8;
  FakeCluster cluster(pipeline, Quantum(absl::Milliseconds(5)));
  const FakeCluster::Call long_call = StartAndStep(cluster, Request(Prompt(1, 50), 300), 3);
  const FakeCluster::Call short_call = cluster.Start(Request(Prompt(2), 100));
  ASSERT_TRUE(WaitUntil([&] {
    cluster.pipeline().AllowSteps(1);
    return short_call.stream->received().size() >= 1;
  }));
  // Data loss at the next attach.
  cluster.pipeline().FailAttaches(2, absl::DataLossError("a record is gone"));
  cluster.pipeline().ResumeSteps();
  EXPECT_THAT(cluster.Finish(short_call).status, IsOk());
  EXPECT_THAT(cluster.Finish(long_call).tokens, ElementsAreArray(FakeModel::Greedy(Prompt(1, 50), 300, kVocabulary)));
}

}  // namespace
}  // namespace rwkv::router
