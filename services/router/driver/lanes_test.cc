// Several pipelines, several routers, several models.
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/router/driver/lanes_testing.h"
#include "services/router/pipeline/fleet.h"
#include "services/router/testing/fake_cluster.h"
#include "services/router/testing/turn_testing.h"
#include "services/worker/client/fake_worker.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::AllOf;
using ::testing::HasSubstr;
using worker::FakeModel;
using worker::FakePipeline;

// The pipeline of two in which something is held.
int Busy(FakeCluster& cluster) {
  int busy = -1;
  EXPECT_TRUE(WaitUntil([&] {
    for (int i = 0; i < 2; ++i) {
      if (cluster.pipeline(i).stats().slots_used > 0) busy = i;
    }
    return busy >= 0;
  }));
  return busy;
}

TEST(LanesTest, TurnsSpreadOverLanes) {
  FakeCluster cluster(Named("a", 1), Router("router-0"), nullptr, {Named("b", 1)});
  ASSERT_TRUE(WaitForLanes(cluster.router(), 2));
  for (int i = 0; i < 2; ++i) cluster.pipeline(i).PauseSteps();
  std::vector<FakeCluster::Call> calls;
  for (uint32_t i = 0; i < 3; ++i) calls.push_back(cluster.Start(Request(Prompt(i), 5)));
  EXPECT_TRUE(WaitUntil([&] {
    return cluster.pipeline(0).stats().slots_used == 1 && cluster.pipeline(1).stats().slots_used == 1 &&
           cluster.router().counts().waiting == 1;
  }));
  for (int i = 0; i < 2; ++i) cluster.pipeline(i).ResumeSteps();
  for (uint32_t i = 0; i < 3; ++i) {
    EXPECT_EQ(cluster.Finish(calls[i]).tokens, FakeModel::Greedy(Prompt(i), 5, kVocabulary));
  }
}

TEST(LanesTest, ATurnGoesOnOnAnotherLaneWhenItsOwnIsLostOrSilent) {
  for (const bool freezes : {false, true}) {
    FakeCluster cluster(Named("a"), Router("router-0"), nullptr, {Named("b")});
    ASSERT_TRUE(WaitForLanes(cluster.router(), 2));
    cluster.CreateSession("s");
    for (int i = 0; i < 2; ++i) cluster.pipeline(i).PauseSteps();
    const FakeCluster::Call call = cluster.Start(SessionRequest("s", "r", Prompt(1), 40));
    const int busy = Busy(cluster);
    for (size_t i = 1; i <= 12; ++i) {
      cluster.pipeline(busy).AllowSteps(1);
      ASSERT_TRUE(call.stream->WaitReceived(i));
    }
    if (freezes) {
      cluster.pipeline(busy).Freeze(0);
    } else {
      cluster.pipeline(busy).Kill(0);
    }
    cluster.pipeline(1 - busy).ResumeSteps();
    const FakeCluster::Answer answer = cluster.Finish(call);
    EXPECT_THAT(answer.status, IsOk());
    EXPECT_EQ(answer.tokens, FakeModel::Greedy(Prompt(1), 40, kVocabulary));
    EXPECT_GT(cluster.pipeline(1 - busy).stats().steps, 0);
    cluster.pipeline(busy).Thaw(0);
    cluster.pipeline(busy).Restart(0);
    cluster.pipeline(busy).ResumeSteps();
    EXPECT_TRUE(WaitForLanes(cluster.router(), 2)) << "it is not taken in again";
  }
}

// A worker that is asked to go waits for its turns to leave, which they do with their state: nothing is read again.
TEST(LanesTest, TurnsLeaveAWorkerThatDrains) {
  FakeCluster cluster(Named("a"), Router("router-0"), nullptr, {Named("b")});
  ASSERT_TRUE(WaitForLanes(cluster.router(), 2));
  cluster.CreateSession("s");
  for (int i = 0; i < 2; ++i) cluster.pipeline(i).PauseSteps();
  const FakeCluster::Call call = cluster.Start(SessionRequest("s", "r", Prompt(1), 40));
  const int busy = Busy(cluster);
  for (size_t i = 1; i <= 12; ++i) {
    cluster.pipeline(busy).AllowSteps(1);
    ASSERT_TRUE(call.stream->WaitReceived(i));
  }
  cluster.pipeline(busy).SetDraining(0, true);
  cluster.pipeline(busy).ResumeSteps();
  ASSERT_TRUE(WaitForLanes(cluster.router(), 1));
  cluster.pipeline(1 - busy).ResumeSteps();
  const FakeCluster::Answer answer = cluster.Finish(call);
  EXPECT_THAT(answer.status, IsOk());
  EXPECT_EQ(answer.tokens, FakeModel::Greedy(Prompt(1), 40, kVocabulary));
  EXPECT_EQ(cluster.metrics().recovered_turns.Value(), 0) << "it was lost instead of saved";
  cluster.pipeline(busy).SetDraining(0, false);
  EXPECT_TRUE(WaitForLanes(cluster.router(), 2)) << "it is not taken in again";
}

TEST(LanesTest, ASessionGoesOnWhereItIsWarm) {
  FakeCluster cluster(Named("a"), Router("router-0"), nullptr, {Named("b")});
  ASSERT_TRUE(WaitForLanes(cluster.router(), 2));
  for (int session = 0; session < 4; ++session) {
    const std::string id = absl::StrCat("s", session);
    cluster.CreateSession(id);
    ASSERT_THAT(cluster.Generate(SessionRequest(id, "r1", Prompt(session), 5)).status, IsOk());
  }
  for (int session = 0; session < 4; ++session) {
    const std::string id = absl::StrCat("s", session);
    ASSERT_THAT(cluster.Generate(SessionRequest(id, "r2", Prompt(9), 5)).status, IsOk());
  }
  EXPECT_EQ(cluster.pipeline(0).stats().attaches_warm + cluster.pipeline(1).stats().attaches_warm, 4);
}

TEST(LanesTest, ATurnNeverGoesOnInAnotherNumericFamily) {
  FakePipeline::Options fast = Named("a"), plain = Named("b");
  fast.numeric_family = "fast";
  plain.numeric_family = "plain";
  TurnManager::Options options = Router("router-0");
  options.outage_timeout = absl::Milliseconds(300);
  FakeCluster cluster(fast, options, nullptr, {plain});
  ASSERT_TRUE(WaitForLanes(cluster.router(), 2));
  cluster.CreateSession("s");
  for (int i = 0; i < 2; ++i) cluster.pipeline(i).PauseSteps();
  const FakeCluster::Call call = cluster.Start(SessionRequest("s", "r", Prompt(1), 40));
  const int busy = Busy(cluster);
  cluster.pipeline(busy).AllowSteps(5);
  ASSERT_TRUE(call.stream->WaitReceived(3));
  cluster.pipeline(busy).Kill(0);
  cluster.pipeline(1 - busy).ResumeSteps();
  EXPECT_THAT(cluster.Finish(call).status, StatusIs(absl::StatusCode::kUnavailable, HasSubstr("no pipeline")));
  EXPECT_EQ(cluster.pipeline(1 - busy).stats().steps, 0);
  // Another router knows from the log which family it was.
  cluster.RestartRouter();
  const FakeCluster::Answer refused = cluster.Generate(SessionRequest("s", "r", Prompt(1), 40));
  EXPECT_THAT(refused.status, StatusIs(absl::StatusCode::kUnavailable, HasSubstr("numeric family")));
  EXPECT_EQ(cluster.pipeline(1 - busy).stats().steps, 0);
  cluster.pipeline(busy).Restart(0);
  cluster.pipeline(busy).ResumeSteps();
  ASSERT_TRUE(WaitForLanes(cluster.router(), 2));
  EXPECT_EQ(cluster.Generate(SessionRequest("s", "r", Prompt(1), 40)).tokens,
            FakeModel::Greedy(Prompt(1), 40, kVocabulary));
}

TEST(LanesTest, RequestsNameOneOfSeveralModels) {
  FakePipeline::Options small = Named("a"), large = Named("b");
  large.model_name = "large";
  large.fingerprint = "000000000000000000000000000001a1";
  FakeCluster cluster(small, Router("router-0"), nullptr, {large});
  ASSERT_TRUE(WaitForLanes(cluster.router(), 2));
  ASSERT_TRUE(WaitUntil([&] { return cluster.router().models().served.size() == 2; }));
  v1::GenerateRequest request = Request(Prompt(1), 5);
  EXPECT_THAT(cluster.Generate(request).status,
              StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr("model"), HasSubstr("large"))));
  int pipeline = 0;
  for (const std::string model : {"fake", "large"}) {
    request.set_model(model);
    EXPECT_EQ(cluster.Generate(request).tokens, FakeModel::Greedy(Prompt(1), 5, kVocabulary));
    EXPECT_EQ(cluster.pipeline(pipeline).stats().attaches_fresh, 1) << model;
    ++pipeline;
  }
  request.set_model("none");
  EXPECT_THAT(cluster.Generate(request).status, StatusIs(absl::StatusCode::kNotFound, HasSubstr("none")));
  // What it lost it may get back, so it does not say that there is no such thing.
  cluster.pipeline(1).Kill(0);
  ASSERT_TRUE(WaitForLanes(cluster.router(), 1));
  request.set_model("large");
  EXPECT_THAT(cluster.Generate(request).status, StatusIs(absl::StatusCode::kUnavailable, HasSubstr("large")));
  request.set_model("fake");
  EXPECT_THAT(cluster.Generate(request).status, IsOk());
}

TEST(LanesTest, RoutersShareLanesAndEitherServesASession) {
  FakeCluster cluster(Named("a"), Router("router-0"), nullptr, {Named("b")});
  ASSERT_TRUE(WaitForLanes(cluster.router(), 2));
  cluster.CreateSession("s");
  std::vector<uint32_t> log;
  {
    const std::unique_ptr<TurnManager> other = cluster.MakeRouter(Router("router-1"));
    ASSERT_TRUE(WaitUntil([&] { return cluster.pipeline(0).driver(0) != cluster.pipeline(1).driver(0); }));
    ASSERT_TRUE(WaitForLanes(*other, 1));
    ASSERT_TRUE(WaitForLanes(cluster.router(), 1));
    for (int turn = 0; turn < 4; ++turn) {
      TurnManager& router = turn % 2 == 0 ? cluster.router() : *other;
      log = Concat(log, Prompt(turn));
      const std::vector<uint32_t> expected = FakeModel::Greedy(log, 20, kVocabulary);
      FakeCluster::Answer answer;
      // The other one may just be letting go of the session.
      ASSERT_TRUE(WaitUntil([&] {
        answer =
            cluster.Finish(FakeCluster::Start(router, SessionRequest("s", absl::StrCat("r", turn), Prompt(turn), 20)));
        return answer.status.ok();
      })) << answer.status;
      EXPECT_EQ(answer.tokens, expected) << turn;
      log = Concat(log, expected);
    }
  }
  EXPECT_TRUE(WaitForLanes(cluster.router(), 2)) << "what nobody drives is taken";
}

TEST(LanesTest, TurnsOfALaneThatIsGivenAwayGoOnElsewhere) {
  FakeCluster cluster(Named("a"), Router("router-0"), nullptr, {Named("b")});
  ASSERT_TRUE(WaitForLanes(cluster.router(), 2));
  for (int i = 0; i < 2; ++i) cluster.pipeline(i).PauseSteps();
  std::vector<FakeCluster::Call> calls;
  for (uint32_t i = 0; i < 4; ++i) {
    cluster.CreateSession(absl::StrCat("s", i));
    calls.push_back(cluster.Start(SessionRequest(absl::StrCat("s", i), "r", Prompt(i), 200)));
    // Its prompt is read before the next one comes: where rows wait nobody is sent, however few turns there are.
    const auto slots = [&](int pipeline) { return cluster.pipeline(pipeline).stats().slots_used; };
    ASSERT_TRUE(WaitUntil([&] { return slots(0) + slots(1) == static_cast<int>(i) + 1; }));
    ASSERT_TRUE(WaitUntil([&] {
      for (int pipeline = 0; pipeline < 2; ++pipeline) cluster.pipeline(pipeline).AllowSteps(1);
      return calls.back().stream->received().size() >= 3;
    }));
  }
  // Which of two lanes has less to do depends on when it is asked.
  for (int i = 0; i < 2; ++i) EXPECT_GE(cluster.pipeline(i).stats().slots_used, 1);
  const std::unique_ptr<TurnManager> other = cluster.MakeRouter(Router("router-1"));
  for (int i = 0; i < 2; ++i) cluster.pipeline(i).ResumeSteps();
  ASSERT_TRUE(WaitForLanes(*other, 1));
  for (uint32_t i = 0; i < 4; ++i) {
    const FakeCluster::Answer answer = cluster.Finish(calls[i]);
    EXPECT_THAT(answer.status, IsOk());
    EXPECT_EQ(answer.tokens, FakeModel::Greedy(Prompt(i), 200, kVocabulary));
  }
  EXPECT_EQ(other->counts().running, 0);
}

TEST(LanesTest, ARouterThatLostItsLaneHandsItsTurnsToOneThatHasOne) {
  TurnManager::Options options = Router("router-0");
  options.handover_after = absl::Milliseconds(100);
  FakeCluster cluster(Named("a"), options, nullptr, {Named("b")});
  const std::unique_ptr<TurnManager> other = cluster.MakeRouter(Router("router-1"));
  ASSERT_TRUE(WaitForLanes(*other, 1));
  ASSERT_TRUE(WaitForLanes(cluster.router(), 1));
  const int own = cluster.pipeline(0).driver(0) == "router-0" ? 0 : 1;
  cluster.pipeline(own).PauseSteps();
  cluster.CreateSession("s");
  const v1::GenerateRequest request = SessionRequest("s", "r", Prompt(1), 40);
  const FakeCluster::Call call = cluster.Start(request);
  const FakeCluster::Call unnamed = cluster.Start(Request(Prompt(2), 1000));  // Not over before the other one begins.
  ASSERT_TRUE(WaitUntil([&] {
    cluster.pipeline(own).AllowSteps(1);
    return call.stream->received().size() >= 3;
  }));
  cluster.pipeline(own).Kill(0);
  EXPECT_THAT(cluster.Finish(call).status, StatusIs(absl::StatusCode::kUnavailable, HasSubstr("another")));
  FakeCluster::Answer answer;
  ASSERT_TRUE(WaitUntil([&] {
    answer = cluster.Finish(FakeCluster::Start(*other, request));
    return answer.status.ok();
  })) << answer.status;
  EXPECT_EQ(answer.tokens, FakeModel::Greedy(Prompt(1), 40, kVocabulary));
  // Nobody else can go on with a call that has no name: it waits.
  EXPECT_FALSE(unnamed.stream->closed());
  cluster.pipeline(own).ResumeSteps();
  cluster.pipeline(own).Restart(0);
  EXPECT_EQ(cluster.Finish(unnamed).tokens, FakeModel::Greedy(Prompt(2), 1000, kVocabulary));
}

TEST(LanesTest, ARouterWithoutALaneStandsByAndTakesOverWithinTwoSeconds) {
  FakeCluster cluster(Named("a"), Router("router-0"));
  TurnManager::Options options = Router("router-1");
  std::atomic<bool> serving{false};
  options.on_serving = [&serving](bool now) { serving = now; };
  const std::unique_ptr<TurnManager> standby = cluster.MakeRouter(options);
  ASSERT_TRUE(WaitUntil([&] { return standby->fleet().state().text.find("router-0") != std::string::npos; }));
  EXPECT_THAT(standby->fleet().state().text, HasSubstr("standing by: "));
  EXPECT_FALSE(serving);
  EXPECT_THAT(cluster.Finish(FakeCluster::Start(*standby, Request(Prompt(1), 5))).status,
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("router-0")));
  cluster.StopRouter();
  const absl::Time begin = absl::Now();
  ASSERT_TRUE(WaitUntil([&] { return serving.load(); }));
  EXPECT_LT(absl::Now() - begin, absl::Seconds(2));
  EXPECT_THAT(cluster.Finish(FakeCluster::Start(*standby, Request(Prompt(1), 5))).status, IsOk());
  cluster.pipeline().Kill(0);
  EXPECT_TRUE(WaitUntil([&] { return !serving; })) << "it still says that it serves";
}

}  // namespace
}  // namespace rwkv::router
