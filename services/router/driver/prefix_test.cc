// Turns that begin with what others have read.
#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/generation.pb.h"
#include "services/router/driver/prefix_testing.h"
#include "services/router/driver/turn_manager.h"
#include "services/router/testing/fake_cluster.h"
#include "services/router/testing/turn_testing.h"
#include "services/worker/client/fake_worker.h"
#include "tests/testing/fake_clock.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using ::rwkv::testing::IsOk;
using ::testing::ElementsAreArray;
using worker::FakeModel;
using worker::FakePipeline;

v1::Sampling Sampled() {
  v1::Sampling sampling;
  sampling.set_temperature(1);
  sampling.set_seed(77);
  sampling.set_frequency_penalty(0.5);
  sampling.set_penalize_prompt(true);
  return sampling;
}

FakeCluster::Answer GenerateAs(FakeCluster& cluster, const std::string& tenant, const v1::GenerateRequest& request) {
  FakeCluster::Call call;
  call.id = cluster.router().NewCall();
  cluster.router().Generate(call.id, request, call.stream, tenant);
  return cluster.Finish(call);
}

TEST(PrefixTest, ASharedBeginningIsReadOnceAndChangesNoToken) {
  for (const bool sampled : {false, true}) {
    SCOPED_TRACE(sampled);
    FakeCluster cluster({}, Caching());
    for (uint32_t own = 2; own < 5; ++own) {
      v1::GenerateRequest request = Marked(own, 20);
      if (sampled) *request.mutable_sampling() = Sampled();
      const int64_t rows = cluster.pipeline().stats().rows;
      const FakeCluster::Answer answer = cluster.Generate(request);
      ASSERT_THAT(answer.status, IsOk());
      EXPECT_THAT(answer.tokens,
                  ElementsAreArray(FakeModel::Generate(Input(own), 20, request.sampling(), kVocabulary)));
      EXPECT_EQ(answer.finish.reused_tokens(), own == 2 ? 0 : kSystem);
      if (own > 2) {
        EXPECT_LT(cluster.pipeline().stats().rows - rows, 50);
      }
      ASSERT_TRUE(Kept(cluster, own == 2 ? 3 : own));  // Two chunks, one of them the mark, and each one's end.
    }
    EXPECT_EQ(cluster.metrics().prefix_hits.Value(), 2);
    EXPECT_EQ(cluster.metrics().prefix_misses.Value(), 1);
    EXPECT_EQ(cluster.metrics().reused_tokens.Value(), 2 * kSystem);
  }
}

TEST(PrefixTest, WithoutAMarkItIsReadUpToTheLastChunkAndThenToWhereTheyPart) {
  FakeCluster cluster({}, Caching());
  const std::vector<uint32_t> shared = Prompt(1, 170);
  for (uint32_t own = 2; own < 5; ++own) {
    const std::vector<uint32_t> input = Concat(shared, {own, 1, 2, 3});
    const FakeCluster::Answer answer = cluster.Generate(Request(input, 5));
    ASSERT_THAT(answer.status, IsOk());
    EXPECT_THAT(answer.tokens, ElementsAreArray(FakeModel::Greedy(input, 5, kVocabulary)));
    EXPECT_EQ(answer.finish.reused_tokens(), own == 2 ? 0 : own == 3 ? 100 : 170);
    ASSERT_TRUE(Kept(cluster, own == 2 ? 2 : own == 3 ? 4 : 5));
  }
}

TEST(PrefixTest, TheSameInputAgainFeedsItsLastTokenAlone) {
  FakeCluster cluster({}, Caching());
  for (int i = 0; i < 2; ++i) {
    const FakeCluster::Answer answer = cluster.Generate(Request(Input(2), 5));
    ASSERT_THAT(answer.status, IsOk());
    EXPECT_THAT(answer.tokens, ElementsAreArray(FakeModel::Greedy(Input(2), 5, kVocabulary)));
    EXPECT_EQ(answer.finish.reused_tokens(), i == 0 ? 0 : kSystem + 9);
    ASSERT_TRUE(Kept(cluster, 3));
  }
}

// The state at a chunk's end is that of a whole read: whoever begins there says what the model says after all of it.
TEST(PrefixTest, EveryEndIsAsGoodAsReading) {
  FakePipeline::Options pipeline;
  pipeline.slots = 32;  // As many states may be on their way.
  FakeCluster cluster(pipeline, Caching());
  std::vector<uint32_t> ends;
  for (uint32_t end = 20; end <= kSystem; end += 15) ends.push_back(end);
  v1::GenerateRequest request = Request(Input(2), 3);
  for (const uint32_t end : ends) request.add_prefix_ends(end);
  ASSERT_THAT(cluster.Generate(request).status, IsOk());
  ASSERT_TRUE(Kept(cluster, ends.size() + 2));  // A chunk, and the end.
  for (const uint32_t end : ends) {
    std::vector<uint32_t> input = Prompt(1, static_cast<int>(end));
    input.push_back(kVocabulary - 1);
    request = Request(input, 5);
    request.add_prefix_ends(end);  // A short one is not looked up without.
    const FakeCluster::Answer answer = cluster.Generate(request);
    ASSERT_THAT(answer.status, IsOk());
    EXPECT_THAT(answer.tokens, ElementsAreArray(FakeModel::Greedy(input, 5, kVocabulary)));
    EXPECT_EQ(answer.finish.reused_tokens(), end);
  }
}

TEST(PrefixTest, SessionsBeginWithItAndGoOnByThemselves) {
  FakeCluster cluster({}, Caching());
  std::vector<uint32_t> log;
  for (const std::string session : {"s", "t"}) {
    cluster.CreateSession(session);
    v1::GenerateRequest request = SessionRequest(session, "a", Input(2), 10);
    request.add_prefix_ends(kSystem);
    const FakeCluster::Answer first = cluster.Generate(request);
    ASSERT_THAT(first.status, IsOk());
    EXPECT_EQ(first.finish.reused_tokens(), session == "s" ? 0 : kSystem + 9);
    EXPECT_THAT(first.tokens, ElementsAreArray(FakeModel::Greedy(Input(2), 10, kVocabulary)));
    log = Concat(Input(2), first.tokens);
    const double kept = cluster.metrics().prefixes_kept.Value();
    // Not the first turn: it has a state of its own.
    const FakeCluster::Answer second = cluster.Generate(SessionRequest(session, "b", Prompt(3, 120), 10));
    ASSERT_THAT(second.status, IsOk());
    EXPECT_EQ(second.finish.reused_tokens(), log.size() - 1);
    EXPECT_THAT(second.tokens, ElementsAreArray(FakeModel::Greedy(Concat(log, Prompt(3, 120)), 10, kVocabulary)));
    ASSERT_TRUE(Kept(cluster, std::max(kept, 3.0)));
  }
}

TEST(PrefixTest, AnotherTenantOrTunedStateReadsItAgain) {
  FakeCluster cluster(Tuned(), Caching());
  const auto reused = [&](const std::string& tenant, const std::string& state) {
    v1::GenerateRequest request = Marked(2);
    request.set_initial_state(state);
    const FakeCluster::Answer answer = GenerateAs(cluster, tenant, request);
    EXPECT_THAT(answer.status, IsOk());
    EXPECT_THAT(answer.tokens, ElementsAreArray(FakeModel::Greedy(Input(2), 5, kVocabulary,
                                                                  state.empty()     ? ""
                                                                  : state == "poet" ? kPoet
                                                                                    : kJudge)));
    return answer.finish.reused_tokens();
  };
  double kept = 0;
  for (const char* const tenant : {"", "a", "b"}) {
    for (const char* const state : {"", "poet", "judge"}) {
      EXPECT_EQ(reused(tenant, state), 0) << tenant << " " << state;
      ASSERT_TRUE(Kept(cluster, kept += 3));
    }
  }
  EXPECT_EQ(reused("a", "poet"), kSystem + 9);
}

TEST(PrefixTest, AnotherRouterAndAnotherPipelineFindIt) {
  FakePipeline::Options other;
  other.name = "other";
  FakeCluster cluster({}, Caching(), nullptr, {other});
  ASSERT_THAT(cluster.Generate(Marked(2)).status, IsOk());
  ASSERT_TRUE(Kept(cluster, 3));
  cluster.RestartRouter();
  for (const size_t dead : {0, 1}) {
    for (int stage = 0; stage < 2; ++stage) cluster.pipeline(dead).Kill(stage);
    ASSERT_TRUE(WaitUntil([&] { return cluster.router().Lanes(absl::Now() + kTestLimit).size() == 1; }));
    const FakeCluster::Answer answer = cluster.Generate(Marked(3));
    ASSERT_THAT(answer.status, IsOk());
    EXPECT_GE(answer.finish.reused_tokens(), kSystem);
    EXPECT_THAT(answer.tokens, ElementsAreArray(FakeModel::Greedy(Input(3), 5, kVocabulary)));
    for (int stage = 0; stage < 2; ++stage) cluster.pipeline(dead).Restart(stage);
    ASSERT_TRUE(WaitUntil([&] { return cluster.router().Lanes(absl::Now() + kTestLimit).size() == 2; }));
  }
}

TEST(PrefixTest, OneThatCannotBeReadIsReadAgainAndReplaced) {
  FakeCluster cluster({}, Caching());
  ASSERT_THAT(cluster.Generate(Marked(2)).status, IsOk());
  ASSERT_TRUE(Kept(cluster, 3));
  for (const v1::RecordInfo& info : cluster.PutRecords()) cluster.pipeline().LoseSnapshot(info.snapshot_id());
  const FakeCluster::Answer answer = cluster.Generate(Marked(3));
  ASSERT_THAT(answer.status, IsOk());
  EXPECT_EQ(answer.finish.reused_tokens(), 0);
  EXPECT_THAT(answer.tokens, ElementsAreArray(FakeModel::Greedy(Input(3), 5, kVocabulary)));
  ASSERT_TRUE(WaitUntil([&] { return cluster.metrics().prefixes_kept.Value() >= 5; }));
  // The one that was found broken has been dropped, and was kept again, if that did not come before. Who comes too early
  // leaves a longer one, of its own input, for the next.
  EXPECT_TRUE(WaitUntil([&] {
    const FakeCluster::Answer again = cluster.Generate(Marked(4));
    EXPECT_THAT(again.status, IsOk());
    return again.finish.reused_tokens() >= kSystem;
  }));
}

// The first drop does not come to the store: what is kept anew does not find the place taken.
TEST(PrefixTest, OneThatCannotBeReadIsReplacedAlsoIfItCouldNotBeDroppedAtOnce) {
  FakeCluster cluster({}, Caching());
  ASSERT_THAT(cluster.Generate(Marked(2)).status, IsOk());
  ASSERT_TRUE(Kept(cluster, 3));
  for (const v1::RecordInfo& info : cluster.PutRecords()) cluster.pipeline().LoseSnapshot(info.snapshot_id());
  cluster.store().FailPrefixDrops(1, absl::UnavailableError("the store is away"));
  ASSERT_THAT(cluster.Generate(Marked(3)).status, IsOk());
  ASSERT_TRUE(Kept(cluster, 6));
  EXPECT_EQ(cluster.Generate(Marked(4)).finish.reused_tokens(), kSystem);
}

// Where two inputs part, too, which the router does not find out a second time.
TEST(PrefixTest, OneThatCannotBeReadIsKeptAgainWhereTwoPart) {
  FakeCluster cluster({}, Caching());
  const std::vector<uint32_t> shared = Prompt(1, 170);
  const auto reused = [&](uint32_t own) {
    const FakeCluster::Answer answer = cluster.Generate(Request(Concat(shared, {own, 1, 2, 3}), 5));
    EXPECT_THAT(answer.status, IsOk());
    return answer.finish.reused_tokens();
  };
  reused(2);
  ASSERT_TRUE(Kept(cluster, 2));
  reused(3);
  ASSERT_TRUE(Kept(cluster, 4));
  for (const v1::RecordInfo& info : cluster.PutRecords()) cluster.pipeline().LoseSnapshot(info.snapshot_id());
  EXPECT_EQ(reused(4), 0);
  ASSERT_TRUE(Kept(cluster, 7));
  EXPECT_EQ(reused(5), 170);
}

// A state that hangs ends the lane that waits for it, once.
TEST(PrefixTest, AStateThatHangsIsNotWaitedForTwice) {
  rwkv::testing::FakeClock clock;
  FakeCluster cluster({}, Caching(), &clock);
  ASSERT_THAT(cluster.Generate(Marked(2)).status, IsOk());
  ASSERT_TRUE(Kept(cluster, 3));
  cluster.pipeline().HoldAttaches(true);
  const FakeCluster::Call call = cluster.Start(Marked(3));
  ASSERT_TRUE(WaitUntil([&] { return cluster.Exported("rwkv_router_slots", "state", "used") == 1; }));
  clock.Advance(TurnManager::Options().attach_timeout + absl::Seconds(1));
  ASSERT_TRUE(WaitUntil([&] { return cluster.metrics().epochs_lost.Value() == 1; }));
  cluster.pipeline().HoldAttaches(false);
  const FakeCluster::Answer answer = cluster.Finish(call);
  ASSERT_THAT(answer.status, IsOk());
  EXPECT_EQ(answer.finish.reused_tokens(), 0);
  EXPECT_THAT(answer.tokens, ElementsAreArray(FakeModel::Greedy(Input(3), 5, kVocabulary)));
}

// A turn that has read all of its input begins with what is kept of it when its lane is lost, and counts it once.
TEST(PrefixTest, ATurnThatLosesItsSlotBeginsThereAgainAndCountsItOnce) {
  for (const bool has_session : {false, true}) {
    SCOPED_TRACE(has_session);
    FakeCluster cluster({}, Caching());
    ASSERT_THAT(cluster.Generate(Marked(2)).status, IsOk());
    ASSERT_TRUE(Kept(cluster, 3));
    cluster.CreateSession("s");
    v1::GenerateRequest request = Marked(3, 200);
    if (has_session) {
      request.set_session_id("s");
      request.set_request_id("a");
    }
    cluster.pipeline().PauseSteps();
    const FakeCluster::Call call = cluster.Start(request);
    ASSERT_TRUE(WaitUntil([&] {
      cluster.pipeline().AllowSteps(1);
      return call.stream->received().size() >= 3;
    }));
    cluster.pipeline().BreakEpoch();
    ASSERT_TRUE(WaitUntil([&] { return cluster.metrics().epochs_lost.Value() == 1; }));
    cluster.pipeline().ResumeSteps();
    const FakeCluster::Answer answer = cluster.Finish(call);
    ASSERT_THAT(answer.status, IsOk());
    EXPECT_THAT(answer.tokens, ElementsAreArray(FakeModel::Greedy(Input(3), 200, kVocabulary)));
    EXPECT_EQ(answer.finish.reused_tokens(), kSystem);
    EXPECT_EQ(cluster.metrics().reused_tokens.Value(), kSystem);
    EXPECT_EQ(cluster.metrics().prefix_hits.Value(), 1);
    EXPECT_EQ(cluster.pipeline().stats().attaches_fresh, 1) << "it was read again";
    EXPECT_EQ(cluster.pipeline().stats().attaches_snapshot, 2);
    EXPECT_LT(cluster.metrics().replayed_tokens.Value(), 200);
  }
}

// What went wrong in a time that is still to come keeps nobody from asking now.
TEST(PrefixTest, AClockThatIsSetBackEndsThePauseAfterAnError) {
  rwkv::testing::FakeClock clock;
  FakeCluster cluster({}, Caching(), &clock);
  cluster.store().FailPrefixPutsWith(absl::UnavailableError("it is away"));
  ASSERT_THAT(cluster.Generate(Marked(2)).status, IsOk());
  ASSERT_TRUE(WaitUntil([&] { return !cluster.PutRecords().empty() && cluster.store().record_bytes() == 0; }));
  cluster.store().FailPrefixPutsWith(absl::OkStatus());
  clock.Advance(-absl::Hours(1));
  uint32_t own = 3;
  ASSERT_TRUE(WaitUntil([&] { return cluster.Generate(Marked(own++)).finish.reused_tokens() == kSystem; }));

  cluster.store().FailWith(absl::UnavailableError("it is away"));
  EXPECT_EQ(cluster.Generate(Marked(own++)).finish.reused_tokens(), 0);
  cluster.store().FailWith(absl::OkStatus());
  clock.Advance(-absl::Hours(1));
  EXPECT_EQ(cluster.Generate(Marked(own++)).finish.reused_tokens(), kSystem);
}

TEST(PrefixTest, AWorkerThatDiesWhileAStateIsCopiedIsAMissAndNoError) {
  FakeCluster cluster({}, Caching());
  cluster.pipeline().HoldSaves(true);
  const FakeCluster::Call call = cluster.Start(Marked(2));
  ASSERT_TRUE(WaitUntil([&] { return cluster.pipeline().stats().rows >= 100; }));  // Its first state is due.
  cluster.pipeline().Kill(1);
  ASSERT_TRUE(WaitUntil([&] { return !cluster.router().fleet().state().serving; }));
  cluster.pipeline().FailSaves(1000, absl::UnavailableError("it is gone"));
  cluster.pipeline().HoldSaves(false);
  cluster.pipeline().Restart(1);
  const FakeCluster::Answer first = cluster.Finish(call);
  ASSERT_THAT(first.status, IsOk());
  EXPECT_THAT(first.tokens, ElementsAreArray(FakeModel::Greedy(Input(2), 5, kVocabulary)));
  // The first may have had all its tokens before, and waited for no other lane.
  ASSERT_TRUE(WaitUntil([&] { return !cluster.router().Lanes(absl::Now() + kTestLimit).empty(); }));
  const FakeCluster::Answer answer = cluster.Generate(Marked(3));
  ASSERT_THAT(answer.status, IsOk());
  EXPECT_EQ(answer.finish.reused_tokens(), 0);
  EXPECT_THAT(answer.tokens, ElementsAreArray(FakeModel::Greedy(Input(3), 5, kVocabulary)));
}

TEST(PrefixTest, AStoreThatIsAwayIsAMiss) {
  FakeCluster cluster({}, Caching());
  ASSERT_THAT(cluster.Generate(Marked(2)).status, IsOk());
  ASSERT_TRUE(Kept(cluster, 3));
  cluster.store().FailWith(absl::UnavailableError("the store is away"));
  const FakeCluster::Answer answer = cluster.Generate(Marked(3));
  ASSERT_THAT(answer.status, IsOk());
  EXPECT_EQ(answer.finish.reused_tokens(), 0);
  EXPECT_THAT(answer.tokens, ElementsAreArray(FakeModel::Greedy(Input(3), 5, kVocabulary)));
  EXPECT_EQ(cluster.metrics().prefix_errors.Value(), 1);
}

TEST(PrefixTest, WhatTheStoreDoesNotTakeIsDroppedAndNothingIsSavedForAWhile) {
  FakeCluster cluster({}, Caching());
  cluster.store().FailPrefixPutsWith(absl::ResourceExhaustedError("there is no such cache"));
  uint32_t own = 2;
  EXPECT_TRUE(WaitUntil([&] {
    const int64_t saves = cluster.pipeline().stats().saves;
    EXPECT_THAT(cluster.Generate(Marked(own++)).status, IsOk());
    return saves > 0 && cluster.pipeline().stats().saves == saves;
  }));
  EXPECT_FALSE(cluster.PutRecords().empty());
  EXPECT_TRUE(WaitUntil([&] { return cluster.store().record_bytes() == 0; }));
  EXPECT_EQ(cluster.metrics().prefixes_kept.Value(), 0);
  EXPECT_EQ(cluster.metrics().prefix_errors.Value(), 0);  // What is there would be found all the same.
}

TEST(PrefixTest, AHitWhoseStateCannotBeFetchedIsRead) {
  FakeCluster cluster({}, Caching());
  ASSERT_THAT(cluster.Generate(Marked(2)).status, IsOk());
  ASSERT_TRUE(Kept(cluster, 3));
  cluster.pipeline().FailAttaches(1, absl::UnavailableError("no store"));
  const FakeCluster::Answer answer = cluster.Generate(Marked(3));
  ASSERT_THAT(answer.status, IsOk());
  EXPECT_THAT(answer.tokens, ElementsAreArray(FakeModel::Greedy(Input(3), 5, kVocabulary)));
  EXPECT_EQ(answer.finish.reused_tokens(), 0) << "it was looked for again";
  EXPECT_EQ(cluster.store().prefix_lookups(), 2);
  // It is still there.
  EXPECT_EQ(cluster.Generate(Marked(4)).finish.reused_tokens(), kSystem);
}

TEST(PrefixTest, ManyThatBeginAtOnceDoNotDisturbEachOther) {
  FakeCluster cluster({}, Caching());
  for (int round = 0; round < 2; ++round) {
    std::vector<FakeCluster::Call> calls;
    for (uint32_t own = 2; own < 14; ++own) calls.push_back(cluster.Start(Marked(own)));
    for (uint32_t own = 2; own < 14; ++own) {
      const FakeCluster::Answer answer = cluster.Finish(calls[own - 2]);
      ASSERT_THAT(answer.status, IsOk());
      EXPECT_THAT(answer.tokens, ElementsAreArray(FakeModel::Greedy(Input(own), 5, kVocabulary)));
    }
    ASSERT_TRUE(Kept(cluster, 3));
  }
}

// A slot that is given away half-way through the input.
TEST(PrefixTest, ATurnThatYieldsGoesOnAsBefore) {
  FakePipeline::Options pipeline;
  pipeline.slots = 1;
  TurnManager::Options options = Caching();
  options.slot_quantum = absl::Milliseconds(1);
  FakeCluster cluster(pipeline, options);
  std::vector<FakeCluster::Call> calls;
  for (uint32_t own = 2; own < 5; ++own) calls.push_back(cluster.Start(Marked(own, 200)));
  for (uint32_t own = 2; own < 5; ++own) {
    const FakeCluster::Answer answer = cluster.Finish(calls[own - 2]);
    ASSERT_THAT(answer.status, IsOk());
    EXPECT_THAT(answer.tokens, ElementsAreArray(FakeModel::Greedy(Input(own), 200, kVocabulary)));
  }
  EXPECT_GT(cluster.metrics().yielded_turns.Value(), 0);
}

TEST(PrefixTest, OnlyWhatIsFedIsKeptToo) {
  FakeCluster cluster({}, Caching());
  cluster.CreateSession("s");
  v1::GenerateRequest request = SessionRequest("s", "a", Input(2), 0);
  request.add_prefix_ends(kSystem + 9);  // Where the session's own state is, too.
  ASSERT_THAT(cluster.Generate(request).status, IsOk());
  ASSERT_TRUE(Kept(cluster, 3));
  ASSERT_TRUE(WaitUntil([&] { return cluster.metrics().snapshots_committed.Value() == 1; }));
  EXPECT_EQ(cluster.Generate(Marked(2)).finish.reused_tokens(), kSystem + 9);
}

TEST(PrefixTest, MarksInTextAreBytes) {
  FakeCluster cluster(WorldPipeline(), Caching());
  v1::GenerateRequest request;
  request.set_text(std::string(100, 'x') + "who are you?");
  request.set_max_tokens(3);
  request.set_ignore_end_of_text(true);
  request.add_prefix_ends(100);
  ASSERT_THAT(cluster.Generate(request).status, IsOk());
  ASSERT_TRUE(Kept(cluster, 2));
  request.set_text(std::string(100, 'x') + "how are you?");
  const FakeCluster::Answer answer = cluster.Generate(request);
  ASSERT_THAT(answer.status, IsOk());
  EXPECT_EQ(answer.finish.reused_tokens(), 100);
}

TEST(PrefixTest, SwitchedOffItNeitherKeepsNorLooks) {
  FakeCluster cluster;
  for (uint32_t own = 2; own < 4; ++own) {
    const FakeCluster::Answer answer = cluster.Generate(Marked(own));
    ASSERT_THAT(answer.status, IsOk());
    EXPECT_EQ(answer.finish.reused_tokens(), 0);
  }
  EXPECT_EQ(cluster.pipeline().stats().saves, 0);
  EXPECT_EQ(cluster.metrics().prefix_misses.Value(), 0);
}

}  // namespace
}  // namespace rwkv::router
