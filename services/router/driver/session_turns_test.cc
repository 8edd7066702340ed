// Turns of sessions: slots, snapshots, request ids.
#include <algorithm>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
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
using ::testing::Ge;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Le;
using ::testing::SizeIs;
using worker::FakeModel;

TEST(SessionTurnsTest, ASessionGoesOnInItsWarmSlot) {
  FakeCluster cluster;
  cluster.CreateSession("s");
  std::vector<uint32_t> log;
  for (uint32_t turn = 0; turn < 5; ++turn) {
    const std::vector<uint32_t> prompt = Prompt(turn);
    const FakeCluster::Answer answer = cluster.Generate(SessionRequest("s", absl::StrCat("r", turn), prompt, 7));
    ASSERT_THAT(answer.status, IsOk());
    EXPECT_EQ(answer.finish.reused_tokens(),
              std::max<size_t>(log.size(), 1) - 1);  // Its last token is fed with the input.
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

TEST(SessionTurnsTest, AnotherRouterGoesOnFromTheSnapshot) {
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
  EXPECT_EQ(second.finish.reused_tokens(), 16);
  EXPECT_EQ(cluster.pipeline().stats().attaches_snapshot, 1);
}

TEST(SessionTurnsTest, ALostSnapshotCostsTimeOnly) {
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
  ASSERT_EQ(newest->manifest().position(), 27);
  cluster.pipeline().LoseSnapshot(newest->manifest().snapshot_id());
  cluster.store().FailDropsWith(absl::UnavailableError("away"));  // It stays, and is not tried again.
  cluster.RestartRouter();
  const FakeCluster::Answer answer = cluster.Generate(SessionRequest("s", "c", Prompt(9), 5));
  ASSERT_THAT(answer.status, IsOk());
  EXPECT_THAT(answer.tokens, ElementsAreArray(FakeModel::Greedy(Concat(log, Prompt(9)), 5, kVocabulary)));
  EXPECT_EQ(answer.finish.reused_tokens(), 13);  // The older one.
  EXPECT_EQ(cluster.metrics().snapshots_dropped.Value(), 1);
}

TEST(SessionTurnsTest, AFailedSnapshotHarmsNobody) {
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

TEST(SessionTurnsTest, LongTurnsAreSavedOnTheWay) {
  TurnManager::Options options;
  options.snapshot_interval_tokens = 10;
  FakeCluster cluster({}, options);
  cluster.CreateSession("s");
  // One is under way at a time, and tokens come faster than that: fewer of them than the 50 that there could be.
  ASSERT_THAT(cluster.Generate(SessionRequest("s", "a", Prompt(1), 500)).status, IsOk());
  EXPECT_TRUE(WaitUntil([&] { return cluster.metrics().snapshots_committed.Value() >= 2; }));
}

TEST(SessionTurnsTest, ACancelledTurnGoesOnWhereItWas) {
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

TEST(SessionTurnsTest, AnotherRouterResumesTheTurnWithTheExactIndices) {
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

TEST(SessionTurnsTest, AFinishedTurnIsToldAgain) {
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

TEST(SessionTurnsTest, ARequestSentTwiceRunsOnceAndTheLaterCallTakesOver) {
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

TEST(SessionTurnsTest, TheSameRequestIdWithAnotherInputIsRefused) {
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

TEST(SessionTurnsTest, ASecondTurnOfASessionIsAborted) {
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

TEST(SessionTurnsTest, AnotherTurnClosesOneWhoseClientLeft) {
  FakeCluster cluster;
  cluster.CreateSession("s");
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call first = cluster.Start(SessionRequest("s", "a", Prompt(1), 100));
  cluster.pipeline().AllowSteps(6);
  ASSERT_TRUE(first.stream->WaitReceived(3));
  cluster.router().Cancel(first.id);
  ASSERT_TRUE(WaitUntil([&] { return cluster.router().counts().running == 0; }));
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

TEST(SessionTurnsTest, UnknownSessionIsNotFound) {
  FakeCluster cluster;
  EXPECT_THAT(cluster.Generate(SessionRequest("nobody", "a", Prompt(1), 10)).status,
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("nobody")));
}

TEST(SessionTurnsTest, ExclusiveJobsWaitForNobodysTurn) {
  FakeCluster cluster;
  cluster.CreateSession("s");
  const auto run = [&](bool deletes, ExclusiveJob job) {
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
  EXPECT_THAT(Rewind(cluster, "s", 5), StatusIs(absl::StatusCode::kAborted));
  cluster.pipeline().ResumeSteps();
  ASSERT_THAT(cluster.Finish(running).status, IsOk());
  ASSERT_THAT(Rewind(cluster, "s", 5), IsOk());
  EXPECT_THAT(cluster.Log("s"), SizeIs(5));
  const FakeCluster::Answer next = cluster.Generate(SessionRequest("s", "b", Prompt(2), 6));
  ASSERT_THAT(next.status, IsOk());
  std::vector<uint32_t> log = Prompt(1);
  log.resize(5);
  EXPECT_THAT(next.tokens, ElementsAreArray(FakeModel::Greedy(Concat(log, Prompt(2)), 6, kVocabulary)));
  const auto erase = [&](const v1::AcquireLeaseResponse& held) {
    v1::DeleteSessionRequest request;
    *request.mutable_lease() = held.lease();
    return cluster.store().DeleteSession(request, absl::Now() + kTestLimit).status();
  };
  ASSERT_THAT(run(true, erase), IsOk());
  EXPECT_THAT(run(true, erase), StatusIs(absl::StatusCode::kNotFound));
  EXPECT_TRUE(WaitUntil([&] { return cluster.pipeline().stats().slots_used == 0; }));
  cluster.CreateSession("s");
  EXPECT_THAT(cluster.Generate(SessionRequest("s", "a", Prompt(3), 6)).tokens,
              ElementsAreArray(FakeModel::Greedy(Prompt(3), 6, kVocabulary)));
}

TEST(SessionTurnsTest, ALeaseThatWasTakenAndGivenBackMeanwhileIsTakenAgain) {
  FakeCluster cluster;
  cluster.CreateSession("s");
  cluster.pipeline().HoldSaves(true);  // The session stays with this router.
  const FakeCluster::Answer first = cluster.Generate(SessionRequest("s", "a", Prompt(1), 5));
  ASSERT_THAT(first.status, IsOk());
  v1::AcquireLeaseRequest acquire;
  acquire.set_session_id("s");
  acquire.set_holder("router-0");
  acquire.set_incarnation("another");
  acquire.mutable_ttl()->set_seconds(60);
  const auto taken = cluster.store().AcquireLease(acquire, absl::Now() + kTestLimit);
  ASSERT_THAT(taken, IsOk());
  v1::ReleaseLeaseRequest release;
  *release.mutable_lease() = taken->lease();
  ASSERT_THAT(cluster.store().ReleaseLease(release, absl::Now() + kTestLimit), IsOk());
  const FakeCluster::Answer second = cluster.Generate(SessionRequest("s", "b", Prompt(2), 5));
  ASSERT_THAT(second.status, IsOk());
  EXPECT_THAT(second.tokens,
              ElementsAreArray(FakeModel::Greedy(Concat(Concat(Prompt(1), first.tokens), Prompt(2)), 5, kVocabulary)));
}

}  // namespace
}  // namespace rwkv::router
