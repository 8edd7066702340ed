// Turns over lost slots, workers, epochs and routers.
#include <algorithm>
#include <cstdint>
#include <iostream>
#include <random>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/generation.pb.h"
#include "services/common/grpc_status.h"
#include "services/router/core/patience.h"
#include "services/router/driver/turn_manager.h"
#include "services/router/testing/fake_cluster.h"
#include "services/router/testing/turn_testing.h"
#include "services/worker/client/fake_worker.h"
#include "tests/testing/fake_clock.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::ElementsAreArray;
using ::testing::HasSubstr;
using worker::FakeModel;
using worker::FakePipeline;

TEST(RecoveryTest, AttachesThatFailAreTriedAgain) {
  TurnManager::Options options;
  options.retry_delay = absl::Milliseconds(1);
  FakeCluster cluster({}, options);
  cluster.pipeline().FailAttaches(3, absl::UnavailableError("the state store cannot be reached"));
  const FakeCluster::Answer answer = cluster.Generate(Request(Prompt(1), 5));
  ASSERT_THAT(answer.status, IsOk());
  EXPECT_THAT(answer.tokens, ElementsAreArray(FakeModel::Greedy(Prompt(1), 5, kVocabulary)));
}

// Records that hang: each attempt to read them takes long. Reading the log is soon quicker than waiting.
TEST(RecoveryTest, ASnapshotThatHangsIsNotWaitedForForLong) {
  rwkv::testing::FakeClock clock;
  TurnManager::Options options;
  options.retry_delay = absl::Milliseconds(1);
  FakeCluster cluster({}, options, &clock);
  cluster.CreateSession("s");
  const FakeCluster::Answer first = cluster.Generate(SessionRequest("s", "a", Prompt(1), 5));
  ASSERT_THAT(first.status, IsOk());
  ASSERT_TRUE(WaitUntil([&] { return cluster.metrics().snapshots_committed.Value() == 1; }));
  cluster.RestartRouter();
  cluster.pipeline().HoldAttaches(true);
  cluster.store().FailGetRecords(1000, absl::DeadlineExceededError("S3 says nothing"));
  const FakeCluster::Call call = cluster.Start(SessionRequest("s", "b", Prompt(2), 5));
  ASSERT_TRUE(WaitUntil([&] { return cluster.router().counts().running == 1; }));
  ASSERT_TRUE(WaitUntil([&] { return cluster.Exported("rwkv_router_slots", "state", "used") == 1; }));
  clock.Advance(Patience::kTimeWithSnapshot);
  cluster.pipeline().HoldAttaches(false);
  ASSERT_TRUE(WaitUntil([&] { return cluster.Exported("rwkv_router_slots", "state", "used") == 0; }));
  clock.Advance(options.retry_delay);  // For one more attempt, and no other.
  const FakeCluster::Answer second = cluster.Finish(call);
  ASSERT_THAT(second.status, IsOk());
  EXPECT_EQ(second.finish.reused_tokens(), 0);
  EXPECT_THAT(second.tokens,
              ElementsAreArray(FakeModel::Greedy(Concat(Concat(Prompt(1), first.tokens), Prompt(2)), 5, kVocabulary)));
}

TEST(RecoveryTest, ARefusedEntryIsFedAgain) {
  TurnManager::Options options;
  options.retry_delay = absl::Milliseconds(1);
  FakeCluster cluster({}, options);
  cluster.CreateSession("s");
  cluster.pipeline().FailEntries(1, absl::AbortedError("slot 0 is at another position"));
  const FakeCluster::Answer answer = cluster.Generate(SessionRequest("s", "a", Prompt(1), 5));
  ASSERT_THAT(answer.status, IsOk());
  EXPECT_THAT(answer.tokens, ElementsAreArray(FakeModel::Greedy(Prompt(1), 5, kVocabulary)));
}

TEST(RecoveryTest, ALostWorkerChangesNoToken) {
  for (const int killed : {0, 1}) {
    SCOPED_TRACE(killed);
    FakeCluster cluster;
    cluster.CreateSession("s");
    cluster.pipeline().PauseSteps();
    v1::GenerateRequest sampled = SessionRequest("s", "a", Prompt(1), 300);
    sampled.mutable_sampling()->set_temperature(1);
    sampled.mutable_sampling()->set_seed(7);
    sampled.mutable_sampling()->set_frequency_penalty(0.5);
    const FakeCluster::Call with_session = cluster.Start(sampled);
    const FakeCluster::Call without = cluster.Start(Request(Prompt(2), 300));
    // As many steps as it takes: the turn that begins first must not use up those of the other.
    ASSERT_TRUE(WaitUntil([&] {
      cluster.pipeline().AllowSteps(1);
      return with_session.stream->received().size() >= 3 && without.stream->received().size() >= 3;
    }));
    cluster.pipeline().Kill(killed);
    ASSERT_TRUE(WaitUntil([&] { return !cluster.router().fleet().state().serving; }));
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

TEST(RecoveryTest, ManyEpochLossesUnderLoadChangeNoToken) {
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

TEST(RecoveryTest, APipelineThatHangsIsOpenedAnew) {
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

TEST(RecoveryTest, AStartedTurnDoesNotWaitForAPipelineForEver) {
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

TEST(RecoveryTest, RandomTroubleChangesNoToken) {
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

TEST(RecoveryTest, AttachesThatAreNeverAnsweredEndTheCall) {
  TurnManager::Options options;
  options.attach_timeout = absl::Milliseconds(30);
  FakeCluster cluster({}, options);
  cluster.pipeline().HoldAttaches(true);
  const absl::Status status = cluster.Generate(Request(Prompt(1), 5)).status;
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kUnavailable, HasSubstr("not attached within 30ms")));
  EXPECT_TRUE(common::GetRetryDelay(status).has_value());
  cluster.pipeline().HoldAttaches(false);
  ASSERT_TRUE(cluster.WaitServing());
  EXPECT_THAT(cluster.Generate(Request(Prompt(1), 5)).status, IsOk());
}

TEST(RecoveryTest, IdlenessIsNotAHang) {
  ::rwkv::testing::FakeClock clock;
  TurnManager::Options options;
  options.progress_timeout = absl::Seconds(30);
  options.outage_timeout = absl::InfiniteDuration();  // The clock goes on while the pipeline is opened anew.
  FakeCluster cluster({}, options, &clock);
  for (uint32_t i = 0; i < 3; ++i) {
    clock.Advance(absl::Hours(1));
    EXPECT_THAT(cluster.Generate(Request(Prompt(i), 5)).tokens,
                ElementsAreArray(FakeModel::Greedy(Prompt(i), 5, kVocabulary)));
  }
  EXPECT_EQ(cluster.pipeline().stats().epochs, 1);
  // A hang is one whatever the clock.
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call call = cluster.Start(Request(Prompt(9), 5));
  ASSERT_TRUE(WaitUntil([&] {
    clock.Advance(absl::Seconds(31));
    return cluster.pipeline().stats().epochs >= 2;
  }));
  cluster.pipeline().ResumeSteps();
  EXPECT_THAT(cluster.Finish(call).status, IsOk());
}

TEST(RecoveryTest, APipelineThatIsLostAgainAndAgainEndsTheCall) {
  TurnManager::Options options;
  options.retry_delay = absl::Milliseconds(1);
  FakeCluster cluster({}, options);
  cluster.CreateSession("s");
  cluster.pipeline().PauseSteps();
  const v1::GenerateRequest request = SessionRequest("s", "a", Prompt(1), 5);
  const FakeCluster::Call call = cluster.Start(request);
  for (int loss = 0; loss < 100 && !call.stream->closed(); ++loss) {
    ASSERT_TRUE(WaitUntil([&] {
      return call.stream->closed() ||
             (cluster.pipeline().stats().attaches_fresh > loss && cluster.metrics().microbatches_in_flight.Value() > 0);
    }));
    cluster.pipeline().BreakEpoch();
  }
  EXPECT_THAT(call.stream->Wait(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("lost 20 times")));
  cluster.pipeline().ResumeSteps();
  ASSERT_TRUE(cluster.WaitServing());
  const FakeCluster::Answer answer = cluster.Generate(request);
  ASSERT_THAT(answer.status, IsOk());
  EXPECT_THAT(answer.tokens, ElementsAreArray(FakeModel::Greedy(Prompt(1), 5, kVocabulary)));
}

TEST(RecoveryTest, AnotherModelDoesNotGoOnWithATurn) {
  for (const bool has_session : {false, true}) {
    SCOPED_TRACE(has_session);
    FakeCluster cluster;
    cluster.CreateSession("s");
    cluster.pipeline().PauseSteps();
    const FakeCluster::Call call =
        cluster.Start(has_session ? SessionRequest("s", "a", Prompt(1), 50) : Request(Prompt(1), 50));
    ASSERT_TRUE(WaitUntil([&] {
      cluster.pipeline().AllowSteps(1);
      return call.stream->received().size() >= 3;
    }));
    cluster.pipeline().SetFingerprint("11111111111111111111111111111111");
    cluster.pipeline().BreakEpoch();
    cluster.pipeline().ResumeSteps();
    EXPECT_THAT(call.stream->Wait(),
                StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("the model has changed")));
  }
}

}  // namespace
}  // namespace rwkv::router
