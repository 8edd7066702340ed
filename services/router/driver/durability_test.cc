// What is in the log, and what a client may see of it.
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/state_store.pb.h"
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
using ::testing::HasSubstr;
using ::testing::Le;
using worker::FakeModel;

// Of the 40 that answer Prompt(1): at the client and in the log of session s.
void ExpectEachTokenOnce(FakeCluster& cluster, const FakeCluster::Call& call) {
  const FakeCluster::Answer answer = cluster.Finish(call);
  ASSERT_THAT(answer.status, IsOk());
  EXPECT_THAT(answer.tokens, ElementsAreArray(FakeModel::Greedy(Prompt(1), 40, kVocabulary)));
  EXPECT_EQ(cluster.Log("s"), Concat(Prompt(1), answer.tokens));
}

TEST(DurabilityTest, NothingIsShownThatIsNotDurable) {
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

TEST(DurabilityTest, DecodingWaitsForCommitsThatFallBehind) {
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
  // Another turn's hundred tokens are time enough for this one's; it does not get further than the bound allows.
  ASSERT_THAT(cluster.Generate(Request(Prompt(2), 100)).status, IsOk());
  EXPECT_THAT(cluster.metrics().generated_tokens.Value(), Le(100 + 3 + 8 + 8));
  cluster.store().FailWith(absl::OkStatus());
  const FakeCluster::Answer answer = cluster.Finish(call);
  ASSERT_THAT(answer.status, IsOk());
  EXPECT_THAT(answer.tokens, ElementsAreArray(FakeModel::Greedy(Prompt(1), 60, kVocabulary)));
}

TEST(DurabilityTest, ALostAnswerOfTheStoreDoublesNoToken) {
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
  ExpectEachTokenOnce(cluster, call);
}

// Whether the lost answer was a yes is asked again, too, when the store does not answer that.
TEST(DurabilityTest, ALostAnswerAndALostLookupDoubleNoTokenAndEndNoTurn) {
  FakeCluster cluster;
  cluster.CreateSession("s");
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call call = cluster.Start(SessionRequest("s", "a", Prompt(1), 40));
  cluster.pipeline().AllowSteps(5);
  ASSERT_TRUE(call.stream->WaitReceived(2));
  cluster.store().LoseAnswersWith(absl::UnavailableError("connection reset"));
  cluster.pipeline().AllowSteps(10);
  ASSERT_TRUE(WaitUntil([&] { return cluster.Log("s").size() > 10 + call.stream->received().size(); }));
  cluster.store().FailFindTurns(3, absl::UnavailableError("connection reset"));
  cluster.store().LoseAnswersWith(absl::OkStatus());
  cluster.pipeline().ResumeSteps();
  ExpectEachTokenOnce(cluster, call);
}

TEST(DurabilityTest, AStoreThatStaysAwayEndsTheTurnAndItCanBeResumed) {
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

TEST(DurabilityTest, WhoLosesTheLeaseStopsAndNothingIsWrittenTwice) {
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

TEST(DurabilityTest, ASlotOfALostLeaseIsNotUsedWhenTheLogHasGoneAnotherWay) {
  TurnManager::Options options;
  options.lease_ttl = absl::Milliseconds(300);
  FakeCluster cluster({}, options);
  cluster.CreateSession("s");
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call call = cluster.Start(SessionRequest("s", "a", Prompt(1), 40));
  cluster.pipeline().AllowSteps(5);
  ASSERT_TRUE(call.stream->WaitReceived(2));
  cluster.store().FailAppendsWith(absl::UnavailableError("the log is away"));
  const int64_t steps = cluster.pipeline().stats().steps;
  cluster.pipeline().AllowSteps(10);
  ASSERT_TRUE(WaitUntil([&] { return cluster.pipeline().stats().steps >= steps + 8; }));  // Ahead of the log.
  v1::AcquireLeaseRequest acquire;
  acquire.set_session_id("s");
  acquire.set_holder("router-0");
  acquire.set_incarnation("its successor");
  acquire.mutable_ttl()->set_seconds(60);
  const auto taken = cluster.store().AcquireLease(acquire, absl::Now() + kTestLimit);
  ASSERT_THAT(taken, IsOk());
  EXPECT_THAT(call.stream->Wait(), StatusIs(absl::StatusCode::kAborted, HasSubstr("taken over")));
  v1::BeginTurnRequest begin;
  *begin.mutable_lease() = taken->lease();
  begin.set_request_id("b");
  const std::vector<uint32_t> other = Prompt(7, 30);
  begin.mutable_token_ids()->Add(other.begin(), other.end());
  begin.set_model_fingerprint(cluster.router().model()->info.fingerprint());
  ASSERT_THAT(cluster.store().BeginTurn(begin, absl::Now() + kTestLimit), IsOk());
  v1::ReleaseLeaseRequest release;
  *release.mutable_lease() = taken->lease();
  ASSERT_THAT(cluster.store().ReleaseLease(release, absl::Now() + kTestLimit), IsOk());
  cluster.store().FailAppendsWith(absl::OkStatus());
  cluster.pipeline().ResumeSteps();
  ASSERT_TRUE(WaitUntil([&] { return cluster.router().counts().running == 0; }));
  const std::vector<uint32_t> log = Concat(cluster.Log("s"), Prompt(2));
  const FakeCluster::Answer next = cluster.Generate(SessionRequest("s", "c", Prompt(2), 5));
  ASSERT_THAT(next.status, IsOk());
  EXPECT_THAT(next.tokens, ElementsAreArray(FakeModel::Greedy(log, 5, kVocabulary)));
}

TEST(DurabilityTest, WhatAnotherRouterRefusedIsNotTakenForWritten) {
  TurnManager::Options options;
  options.lease_ttl = absl::Hours(1);  // Only its appends tell this router that the lease is gone.
  FakeCluster cluster({}, options);
  cluster.CreateSession("s");
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call call = cluster.Start(SessionRequest("s", "a", Prompt(1), 40));
  cluster.pipeline().AllowSteps(5);
  ASSERT_TRUE(call.stream->WaitReceived(2));
  cluster.store().FailAppendsWith(absl::UnavailableError("the log is away"));
  const int64_t steps = cluster.pipeline().stats().steps;
  cluster.pipeline().AllowSteps(10);
  ASSERT_TRUE(WaitUntil([&] { return cluster.pipeline().stats().steps >= steps + 8; }));
  v1::AcquireLeaseRequest acquire;
  acquire.set_session_id("s");
  acquire.set_holder("router-0");
  acquire.set_incarnation("its successor");
  acquire.mutable_ttl()->set_seconds(60);
  ASSERT_THAT(cluster.store().AcquireLease(acquire, absl::Now() + kTestLimit), IsOk());
  cluster.store().FailAppendsWith(absl::OkStatus());
  EXPECT_THAT(call.stream->Wait(), StatusIs(absl::StatusCode::kAborted));
  const std::vector<uint32_t> log = cluster.Log("s");
  EXPECT_EQ(log.size(), 10 + call.stream->received().size()) << "what is not in the log was shown";
  cluster.pipeline().ResumeSteps();
}

TEST(DurabilityTest, ASlotWithTokensThatAreNotInTheLogIsNotUsed) {
  TurnManager::Options options;
  options.store_timeout = absl::Milliseconds(200);
  FakeCluster cluster({}, options);
  cluster.CreateSession("s");
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call call = cluster.Start(SessionRequest("s", "a", Prompt(1), 5));
  ASSERT_TRUE(WaitUntil([&] { return cluster.pipeline().stats().attaches_fresh == 1; }));  // After all it reads.
  cluster.store().FailWith(absl::UnavailableError("the store is away"));
  cluster.pipeline().ResumeSteps();
  EXPECT_THAT(call.stream->Wait(), StatusIs(absl::StatusCode::kUnavailable));
  EXPECT_TRUE(WaitUntil([&] { return cluster.pipeline().stats().releases == 1; })) << "it stayed warm";
  cluster.store().FailWith(absl::OkStatus());
  ASSERT_EQ(cluster.Log("s"), Prompt(1));
  FakeCluster::Answer next;
  ASSERT_TRUE(WaitUntil([&] {  // The lease may still be on its way out.
    next = cluster.Generate(SessionRequest("s", "b", Prompt(2), 5));
    return next.status.ok();
  }));
  EXPECT_THAT(next.tokens, ElementsAreArray(FakeModel::Greedy(Concat(Prompt(1), Prompt(2)), 5, kVocabulary)));
  EXPECT_EQ(cluster.pipeline().stats().attaches_warm, 0);
}

TEST(DurabilityTest, NoManifestComesBeforeItsLog) {
  FakeCluster cluster;
  cluster.CreateSession("s");
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call call = cluster.Start(SessionRequest("s", "a", Prompt(1), 5));
  ASSERT_TRUE(WaitUntil([&] { return cluster.Log("s").size() == 10; }));
  cluster.store().FailAppendsWith(absl::UnavailableError("the log is away"));
  cluster.pipeline().ResumeSteps();
  ASSERT_TRUE(WaitUntil([&] { return cluster.pipeline().stats().saves == 1; }));
  // Time enough to try.
  ASSERT_THAT(cluster.Generate(Request(Prompt(2), 100)).status, IsOk());
  EXPECT_EQ(cluster.metrics().snapshots_failed.Value(), 0) << "it was refused";
  EXPECT_EQ(cluster.metrics().snapshots_committed.Value(), 0);
  cluster.store().FailAppendsWith(absl::OkStatus());
  EXPECT_THAT(cluster.Finish(call).status, IsOk());
  EXPECT_TRUE(WaitUntil([&] { return cluster.metrics().snapshots_committed.Value() == 1; }));
  EXPECT_EQ(cluster.metrics().snapshots_failed.Value(), 0);
}

TEST(DurabilityTest, ASaveThatIsNeverAnsweredIsGivenUp) {
  TurnManager::Options options;
  options.save_timeout = absl::Milliseconds(50);
  FakeCluster cluster({}, options);
  cluster.CreateSession("s");
  cluster.pipeline().HoldSaves(true);
  ASSERT_THAT(cluster.Generate(SessionRequest("s", "a", Prompt(1), 5)).status, IsOk());
  EXPECT_TRUE(WaitUntil([&] { return cluster.metrics().snapshots_failed.Value() == 1; }));
  const auto state = Await<TurnManager::ExportedState>(
      [&](auto done) { cluster.router().Export(cluster.router().NewCall(), "s", done); });
  EXPECT_THAT(state, StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("snapshot")));
}

// Where records are may not answer for a while: whoever waits for that is nobody that turns wait behind.
TEST(DurabilityTest, SnapshotsThatWaitForTheStoreKeepNoTurnWaiting) {
  TurnManager::Options options;
  options.executor_threads = 1;
  FakeCluster cluster({}, options);
  cluster.store().HoldCommits(true);
  for (const char* const session : {"s", "t", "u"}) {
    cluster.CreateSession(session);
    const FakeCluster::Answer answer = cluster.Generate(SessionRequest(session, "a", Prompt(1), 5));
    ASSERT_THAT(answer.status, IsOk()) << session;
    ASSERT_TRUE(WaitUntil([&] { return cluster.store().held_commits() == 1; }));
  }
  cluster.store().HoldCommits(false);
  EXPECT_TRUE(WaitUntil([&] { return cluster.metrics().snapshots_committed.Value() == 3; }));
}

}  // namespace
}  // namespace rwkv::router
