// Turns that begin with a tuned state.
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/generation.pb.h"
#include "services/router/driver/turn_manager.h"
#include "services/router/testing/fake_cluster.h"
#include "services/router/testing/turn_testing.h"
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
using ::testing::SizeIs;
using worker::FakeModel;

// The workers come back with other states.
void Offer(FakeCluster& cluster, std::vector<std::string> initial_states) {
  cluster.pipeline().SetInitialStates(std::move(initial_states));
  Reconnect(cluster);
}

TEST(TunedStatesTest, ATunedSessionRebuiltFromTheLogBeginsWithItsState) {
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
    ASSERT_TRUE(cluster.WaitServing());
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

TEST(TunedStatesTest, ALostWorkerChangesNoTokenOfATunedTurn) {
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
  ASSERT_TRUE(WaitUntil([&] { return !cluster.router().fleet().state().serving; }));
  cluster.pipeline().ResumeSteps();
  cluster.pipeline().Restart(1);
  EXPECT_THAT(cluster.Finish(with_session).tokens,
              ElementsAreArray(FakeModel::Greedy(Prompt(1), 200, kVocabulary, kPoet)));
  EXPECT_THAT(cluster.Finish(without).tokens, ElementsAreArray(FakeModel::Greedy(Prompt(2), 200, kVocabulary, kJudge)));
}

TEST(TunedStatesTest, ASessionWhoseTunedStateIsGoneWaitsForItsReturn) {
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

TEST(TunedStatesTest, ARequestNamesItsTunedStateOrTheSessions) {
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

TEST(TunedStatesTest, ALaterCallThatNamesAnotherTunedStateTakesNothingOver) {
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

TEST(TunedStatesTest, WhatHasNoSessionBeginsWithTheTunedStateItNames) {
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

}  // namespace
}  // namespace rwkv::router
