// What ends a call for good: a model that does not go on, a context that is full; and that a refused call has touched
// nothing.
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/generation.pb.h"
#include "services/common/grpc_status.h"
#include "services/router/core/turn_input.h"
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
using ::testing::ElementsAreArray;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Le;
using ::testing::SizeIs;
using worker::FakeModel;
using worker::FakePipeline;

TurnManager::Options Quick() {
  TurnManager::Options options;
  options.retry_delay = absl::Milliseconds(1);
  return options;
}

const absl::Status kOverflow = absl::InternalError("the model's logits are not finite");

TEST(RefusalTest, WhatFailsAgainAtThePlaceEndsTheTurnForGood) {
  FakeCluster cluster({}, Quick());
  cluster.CreateSession("s");
  cluster.pipeline().FailBeyond(25, kOverflow);
  const v1::GenerateRequest request = SessionRequest("s", "a", Prompt(1), 100);
  const std::vector<uint32_t> tokens =
      FakeModel::Greedy(Prompt(1), 16, kVocabulary);  // The last drawn after 25 tokens.
  const auto is_overflow =
      StatusIs(absl::StatusCode::kInternal, AllOf(HasSubstr("after 25 tokens"), HasSubstr("not finite")));
  const FakeCluster::Answer first = cluster.Generate(request);
  EXPECT_THAT(first.status, is_overflow);
  EXPECT_THAT(first.tokens, ElementsAreArray(tokens));
  EXPECT_THAT(cluster.pipeline().stats().steps, Le(60)) << "tried again without end";
  EXPECT_EQ(GetSession(cluster, "s").open_request_id(), "");

  // It is the turn's end: asked for again, it is told and not tried, by any router, over any pipeline.
  cluster.pipeline().FailBeyond(0, absl::OkStatus());
  for (const bool restarted : {false, true}) {
    SCOPED_TRACE(restarted);
    if (restarted) cluster.RestartRouter();
    const int64_t steps = cluster.pipeline().stats().steps;
    for (const uint64_t from : {0, 3, 16}) {
      v1::GenerateRequest resume = request;
      resume.set_resume_from(from);
      const FakeCluster::Answer again = cluster.Generate(resume);
      EXPECT_THAT(again.status, is_overflow);
      EXPECT_THAT(again.tokens, ElementsAreArray(std::vector<uint32_t>(tokens.begin() + from, tokens.end())));
    }
    EXPECT_EQ(cluster.pipeline().stats().steps, steps);
  }

  // And the session goes on.
  const FakeCluster::Answer next = cluster.Generate(SessionRequest("s", "b", Prompt(2), 5));
  ASSERT_THAT(next.status, IsOk());
  const std::vector<uint32_t> log = Concat(Concat(Prompt(1), tokens), Prompt(2));
  EXPECT_THAT(next.tokens, ElementsAreArray(FakeModel::Greedy(log, 5, kVocabulary)));
}

TEST(RefusalTest, AModelThatGoesOnFailingFailsEachTurnAtOnceAndRewindingHelps) {
  FakeCluster cluster({}, Quick());
  cluster.CreateSession("s");
  cluster.pipeline().FailBeyond(25, kOverflow);
  EXPECT_THAT(cluster.Generate(SessionRequest("s", "a", Prompt(1), 100)).status, StatusIs(absl::StatusCode::kInternal));
  EXPECT_THAT(cluster.Generate(SessionRequest("s", "b", Prompt(2), 100)).status, StatusIs(absl::StatusCode::kInternal));
  ASSERT_THAT(Rewind(cluster, "s", 10), IsOk());
  const FakeCluster::Answer short_turn = cluster.Generate(SessionRequest("s", "c", Prompt(2, 5), 5));
  ASSERT_THAT(short_turn.status, IsOk());
  EXPECT_THAT(short_turn.tokens, ElementsAreArray(FakeModel::Greedy(Concat(Prompt(1), Prompt(2, 5)), 5, kVocabulary)));
}

TEST(RefusalTest, CallsWithoutASessionEndTheSameWay) {
  TurnManager::Options options = Quick();
  options.allow_logits = true;
  FakeCluster cluster({}, options);
  TurnManager& router = cluster.router();
  cluster.pipeline().FailBeyond(25, kOverflow);
  const auto is_overflow =
      StatusIs(absl::StatusCode::kInternal, AllOf(HasSubstr("does not go on"), HasSubstr("not finite")));
  const FakeCluster::Answer generated = cluster.Generate(Request(Prompt(1), 100));
  EXPECT_THAT(generated.status, is_overflow);
  EXPECT_THAT(generated.tokens, SizeIs(16));
  v1::ScoreRequest score;
  *score.mutable_tokens() = Request(Prompt(1, 200), 0).tokens();
  EXPECT_THAT(Await<v1::ScoreResponse>([&](auto done) { router.Score(router.NewCall(), score, done); }), is_overflow);
  auto document = std::make_shared<FakeStream<v1::ScoreDocumentResponse>>();
  router.ScoreDocument(router.NewCall(), {"", Prompt(1, 200), ""}, document);
  EXPECT_THAT(document->Wait(), is_overflow);
  v1::LogitsRequest rows;
  *rows.mutable_tokens() = score.tokens();
  auto logits = std::make_shared<FakeStream<v1::LogitsResponse>>();
  router.Logits(router.NewCall(), rows, logits);
  EXPECT_THAT(logits->Wait(), is_overflow);
  EXPECT_TRUE(WaitUntil([&] { return cluster.router().counts().running == 0; }));
  EXPECT_THAT(cluster.pipeline().stats().steps, Le(100));
}

TEST(RefusalTest, TheTokensComeBeforeTheError) {
  FakeCluster cluster({}, Quick());
  cluster.CreateSession("s");
  cluster.pipeline().FailBeyond(25, kOverflow);
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call call = cluster.Start(SessionRequest("s", "a", Prompt(1), 100));
  cluster.pipeline().AllowSteps(12);  // One for the prompt.
  ASSERT_TRUE(call.stream->WaitReceived(10));
  call.stream->Hold();  // The client has not taken what comes from here on.
  cluster.pipeline().ResumeSteps();
  ASSERT_TRUE(call.stream->WaitReceived(16));
  ASSERT_TRUE(WaitUntil([&] { return GetSession(cluster, "s").open_request_id().empty(); }));
  EXPECT_THAT(cluster.Generate(Request(Prompt(2), 10)).status, IsOk());  // Time enough for an end.
  EXPECT_FALSE(call.stream->closed()) << "an error drops what is in the stream";
  call.stream->LetGo();
  const FakeCluster::Answer answer = cluster.Finish(call);
  EXPECT_THAT(answer.status, StatusIs(absl::StatusCode::kInternal));
  EXPECT_THAT(answer.tokens, SizeIs(16));
}

// --- A bounded context -----------------------------------------------------------------------------------------------

FakePipeline::Options Bounded() {
  FakePipeline::Options options;
  options.max_context_tokens = 100;
  return options;
}

void ExpectField(const absl::Status& status, const std::string& field, const std::string& message) {
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message)));
  EXPECT_EQ(common::GetInvalidField(status), field);
}

TEST(RefusalTest, MoreThanTheContextIsRefusedAtTheDoor) {
  FakePipeline::Options pipeline = Bounded();
  pipeline.vocab_size = 65536;
  TurnManager::Options options = Quick();
  options.allow_logits = true;
  FakeCluster cluster(pipeline, options);
  TurnManager& router = cluster.router();
  EXPECT_THAT(cluster.Generate(Request(Prompt(1, 80), 20)).status, IsOk());
  ExpectField(cluster.Generate(Request(Prompt(1, 81), 20)).status, "max_tokens", "leave 19");
  ExpectField(cluster.Generate(Request(Prompt(1, 101), 0)).status, "tokens.ids", "101 tokens");
  v1::GenerateRequest text;
  text.set_text(std::string(101, 'x'));
  ExpectField(cluster.Generate(text).status, "text", "context of 100");

  const auto score = [&](int count) {
    v1::ScoreRequest request;
    *request.mutable_tokens() = Request(Prompt(1, count), 0).tokens();
    return Await<v1::ScoreResponse>([&](auto done) { router.Score(router.NewCall(), request, done); }).status();
  };
  EXPECT_THAT(score(101), IsOk());  // The last is not fed.
  ExpectField(score(102), "tokens.ids", "101 tokens");
  const auto document = [&](int count) {
    auto stream = std::make_shared<FakeStream<v1::ScoreDocumentResponse>>();
    router.ScoreDocument(router.NewCall(), {"", Prompt(1, count), ""}, stream);
    return stream->Wait();
  };
  EXPECT_THAT(document(101), IsOk());
  ExpectField(document(102), "token_ids", "101 tokens");
  const auto logits = [&](int count) {
    v1::LogitsRequest request;
    *request.mutable_tokens() = Request(Prompt(1, count), 0).tokens();
    auto stream = std::make_shared<FakeStream<v1::LogitsResponse>>();
    router.Logits(router.NewCall(), request, stream);
    return stream->Wait();
  };
  EXPECT_THAT(logits(10), IsOk());
  ExpectField(logits(101), "tokens.ids", "101 tokens");
  v1::EmbedRequest embed;
  *embed.mutable_tokens() = Request(Prompt(1, 101), 0).tokens();
  ExpectField(Await<v1::EmbedResponse>([&](auto done) { router.Embed(router.NewCall(), embed, done); }).status(),
              "tokens.ids", "101 tokens");
  EXPECT_EQ(cluster.pipeline().stats().refused_entries, 0);
}

TEST(RefusalTest, ASessionThatIsFullRefusesAndStaysAsItIs) {
  FakeCluster cluster(Bounded(), Quick());
  cluster.CreateSession("s");
  const v1::GenerateRequest first = SessionRequest("s", "a", Prompt(1, 50), 20);
  ASSERT_THAT(cluster.Generate(first).status, IsOk());
  for (const bool restarted : {false, true}) {  // With the lease at hand, and without.
    SCOPED_TRACE(restarted);
    if (restarted) cluster.RestartRouter();
    ExpectField(cluster.Generate(SessionRequest("s", "b", Prompt(2, 20), 11)).status, "max_tokens",
                "20 tokens of input after the session's 70 leave 10");
    ExpectField(cluster.Generate(SessionRequest("s", "b", Prompt(2, 31), 0)).status, "tokens.ids",
                "31 tokens after the session's 70");
    v1::GenerateRequest go_on = SessionRequest("s", "b", {}, 31);
    go_on.clear_tokens();
    ExpectField(cluster.Generate(go_on).status, "max_tokens", "leave 30");
    EXPECT_THAT(cluster.Log("s"), SizeIs(70));
    EXPECT_EQ(GetSession(cluster, "s").open_request_id(), "");
    EXPECT_THAT(cluster.Generate(first).status, IsOk()) << "what is there is told again";
  }
  EXPECT_THAT(cluster.Generate(SessionRequest("s", "b", Prompt(2, 20), 10)).status, IsOk());
  EXPECT_THAT(cluster.Log("s"), SizeIs(100));
  EXPECT_EQ(cluster.pipeline().stats().refused_entries, 0);
}

// --- A refused call has touched nothing ------------------------------------------------------------------------------

TEST(RefusalTest, ResumingWhatIsNotKnownLeavesNoTrace) {
  FakeCluster cluster({}, Quick());
  cluster.CreateSession("s");
  v1::GenerateRequest request = SessionRequest("s", "a", Prompt(1), 20);
  request.set_resume_from(5);
  for (const bool restarted : {false, true}) {
    if (restarted) cluster.RestartRouter();
    EXPECT_THAT(cluster.Generate(request).status,
                StatusIs(absl::StatusCode::kOutOfRange, AllOf(HasSubstr("resume_from 5"), HasSubstr("\"a\""))));
    EXPECT_THAT(cluster.Log("s"), IsEmpty());
    EXPECT_EQ(GetSession(cluster, "s").open_request_id(), "");
  }
  // Nor does it end the turn of another, whose client is away.
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call left = cluster.Start(SessionRequest("s", "left", Prompt(2), 20));
  cluster.pipeline().AllowSteps(5);
  ASSERT_TRUE(left.stream->WaitReceived(2));
  cluster.router().Cancel(left.id);
  ASSERT_TRUE(WaitUntil([&] { return cluster.router().counts().running == 0; }));
  cluster.pipeline().ResumeSteps();
  EXPECT_THAT(cluster.Generate(request).status, StatusIs(absl::StatusCode::kOutOfRange));
  EXPECT_EQ(GetSession(cluster, "s").open_request_id(), "left");
  EXPECT_THAT(cluster.Generate(SessionRequest("s", "left", Prompt(2), 20)).tokens,
              ElementsAreArray(FakeModel::Greedy(Prompt(2), 20, kVocabulary)));
}

TEST(RefusalTest, AWrongGuessOfALaterCallDoesNotEndAnEarlierOne) {
  TurnManager::Options options = Quick();
  options.max_running = 1;
  FakeCluster cluster({}, options);
  cluster.CreateSession("s");
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call running = cluster.Start(Request(Prompt(1), 5));
  const v1::GenerateRequest request = SessionRequest("s", "a", Prompt(2), 5);
  const FakeCluster::Call waiting = cluster.Start(request);
  ASSERT_TRUE(WaitUntil([&] { return cluster.router().counts().waiting == 1; }));
  v1::GenerateRequest later = request;
  later.set_resume_from(3);
  const absl::Status refused = cluster.Generate(later).status;
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kAborted, HasSubstr("opened")));
  EXPECT_TRUE(common::GetRetryDelay(refused).has_value());
  cluster.pipeline().ResumeSteps();
  EXPECT_THAT(cluster.Finish(running).status, IsOk());
  EXPECT_THAT(cluster.Finish(waiting).tokens, ElementsAreArray(FakeModel::Greedy(Prompt(2), 5, kVocabulary)));
}

TEST(RefusalTest, ACallThatWaitedWhileTheModelChangedIsNotBegun) {
  TurnManager::Options options = Quick();
  options.max_running = 1;
  FakeCluster cluster({}, options);
  cluster.CreateSession("s");
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call running = cluster.Start(Request(Prompt(1), 5));
  const FakeCluster::Call waiting = cluster.Start(SessionRequest("s", "a", Prompt(2), 5));
  ASSERT_TRUE(WaitUntil([&] { return cluster.router().counts().waiting == 1; }));
  cluster.pipeline().SetFingerprint("11111111111111111111111111111111");
  Reconnect(cluster);
  cluster.pipeline().ResumeSteps();
  const auto changed = StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("the model has changed"));
  EXPECT_THAT(cluster.Finish(running).status, changed);
  EXPECT_THAT(cluster.Finish(waiting).status, changed);
  EXPECT_THAT(cluster.Log("s"), IsEmpty());
}

TEST(RefusalTest, ARefusedRewindLeavesTheSlotWarm) {
  FakeCluster cluster({}, Quick());
  cluster.CreateSession("s");
  ASSERT_THAT(cluster.Generate(SessionRequest("s", "a", Prompt(1), 5)).status, IsOk());
  EXPECT_THAT(Rewind(cluster, "s", 16), StatusIs(absl::StatusCode::kOutOfRange));
  ASSERT_THAT(cluster.Generate(SessionRequest("s", "b", Prompt(2), 5)).status, IsOk());
  EXPECT_EQ(cluster.pipeline().stats().attaches_warm, 1);
  ASSERT_THAT(Rewind(cluster, "s", 15), IsOk());
  ASSERT_THAT(cluster.Generate(SessionRequest("s", "c", Prompt(3), 5)).status, IsOk());
  EXPECT_EQ(cluster.pipeline().stats().attaches_warm, 1);
}

TEST(RefusalTest, ThereIsNothingToGoOnFrom) {
  FakeCluster cluster({}, Quick());
  cluster.CreateSession("s");
  v1::GenerateRequest request;
  request.set_max_tokens(5);
  ExpectField(cluster.Generate(request).status, "input", "is missing");
  request.set_session_id("s");
  ExpectField(cluster.Generate(request).status, "input", "no tokens to go on from");
  EXPECT_EQ(GetSession(cluster, "s").open_request_id(), "");
  request.set_max_tokens(0);
  ExpectField(cluster.Generate(request).status, "max_tokens", "nothing to do");
}

}  // namespace
}  // namespace rwkv::router
