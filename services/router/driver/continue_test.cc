// Going on without new input: the tokens are those of one uninterrupted turn.
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
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
using ::testing::Le;
using worker::FakeModel;
using worker::FakePipeline;

v1::GenerateRequest GoOn(const std::string& session, const std::string& request_id, uint32_t count) {
  v1::GenerateRequest request;
  request.set_session_id(session);
  request.set_request_id(request_id);
  request.set_max_tokens(count);
  return request;
}

// With everything that a token may depend on.
v1::Sampling Sampled() {
  v1::Sampling sampling;
  sampling.set_temperature(1);
  sampling.set_seed(7);
  sampling.set_frequency_penalty(0.5);
  return sampling;
}

TEST(ContinueTest, AfterMaxTokensTheAnswerGoesOnAsIfItHadNotStopped) {
  for (const bool sampled : {false, true}) {
    SCOPED_TRACE(sampled);
    const v1::Sampling sampling = sampled ? Sampled() : v1::Sampling();
    FakeCluster cluster;
    cluster.CreateSession("s");
    std::vector<uint32_t> tokens;
    for (int turn = 0; turn < 4; ++turn) {
      SCOPED_TRACE(turn);
      if (turn == 2) cluster.RestartRouter();
      v1::GenerateRequest request =
          turn == 0 ? SessionRequest("s", "t0", Prompt(1), 10) : GoOn("s", absl::StrCat("t", turn), 10);
      *request.mutable_sampling() = sampling;
      const int64_t rows = cluster.pipeline().stats().rows;
      const FakeCluster::Answer answer = cluster.Generate(request);
      ASSERT_THAT(answer.status, IsOk());
      EXPECT_EQ(answer.finish.prompt_tokens(), turn == 0 ? 10 : 0);
      tokens = Concat(tokens, answer.tokens);
      EXPECT_EQ(answer.finish.session_tokens(), 10 + tokens.size());
      if (turn == 0) continue;
      EXPECT_EQ(answer.finish.reused_tokens(), 10 + tokens.size() - 11) << "the last token alone is fed again";
      EXPECT_EQ(cluster.pipeline().stats().rows, rows + 10);
      ASSERT_TRUE(WaitUntil([&] { return cluster.metrics().snapshots_committed.Value() >= turn + 1; }));
    }
    EXPECT_THAT(tokens, ElementsAreArray(FakeModel::Generate(Prompt(1), 40, sampling, kVocabulary)));
    EXPECT_EQ(cluster.Log("s"), Concat(Prompt(1), tokens));
  }
}

TEST(ContinueTest, ASeedThatWasDrawnIsKept) {
  FakeCluster cluster;
  cluster.CreateSession("s");
  v1::GenerateRequest request = SessionRequest("s", "a", Prompt(1), 10);
  request.mutable_sampling()->set_temperature(1);
  const FakeCluster::Answer first = cluster.Generate(request);
  request = GoOn("s", "b", 10);
  request.mutable_sampling()->set_temperature(1);
  const FakeCluster::Answer second = cluster.Generate(request);
  ASSERT_THAT(second.status, IsOk());
  EXPECT_EQ(second.finish.seed(), first.finish.seed());
  v1::Sampling sampling = request.sampling();
  sampling.set_seed(first.finish.seed());
  EXPECT_THAT(Concat(first.tokens, second.tokens),
              ElementsAreArray(FakeModel::Generate(Prompt(1), 20, sampling, kVocabulary)));
  // A turn with input draws one of its own.
  request = SessionRequest("s", "c", Prompt(2), 10);
  request.mutable_sampling()->set_temperature(1);
  EXPECT_NE(cluster.Generate(request).finish.seed(), first.finish.seed());
}

TEST(ContinueTest, WhatWasOnlyFedIsAnswered) {
  for (const int count : {1, 200}) {
    SCOPED_TRACE(count);
    FakeCluster cluster;
    cluster.CreateSession("s");
    ASSERT_THAT(cluster.Generate(SessionRequest("s", "a", Prompt(1, count), 0)).status, IsOk());
    EXPECT_THAT(cluster.Log("s"), ElementsAreArray(Prompt(1, count)));
    v1::GenerateRequest request = GoOn("s", "b", 10);
    *request.mutable_sampling() = Sampled();
    const FakeCluster::Answer answer = cluster.Generate(request);
    ASSERT_THAT(answer.status, IsOk());
    EXPECT_EQ(answer.finish.reused_tokens(), count - 1);
    EXPECT_THAT(answer.tokens, ElementsAreArray(FakeModel::Generate(Prompt(1, count), 10, Sampled(), kVocabulary)));
  }
}

TEST(ContinueTest, TheLastAnswerIsGivenAnew) {
  FakeCluster cluster;
  cluster.CreateSession("s");
  const FakeCluster::Answer before = cluster.Generate(SessionRequest("s", "before", Prompt(2), 10));
  ASSERT_THAT(before.status, IsOk());
  const std::vector<uint32_t> log = Concat(Concat(Prompt(2), before.tokens), Prompt(1));
  v1::GenerateRequest request = SessionRequest("s", "a", Prompt(1), 10);
  *request.mutable_sampling() = Sampled();
  const FakeCluster::Answer first = cluster.Generate(request);
  ASSERT_THAT(first.status, IsOk());
  for (const uint64_t seed : {7, 8}) {
    SCOPED_TRACE(seed);
    ASSERT_THAT(Rewind(cluster, "s", 30), IsOk());
    request = GoOn("s", absl::StrCat("again-", seed), 10);
    *request.mutable_sampling() = Sampled();
    request.mutable_sampling()->set_seed(seed);
    const FakeCluster::Answer again = cluster.Generate(request);
    ASSERT_THAT(again.status, IsOk());
    EXPECT_THAT(again.tokens, ElementsAreArray(FakeModel::Generate(log, 10, request.sampling(), kVocabulary)));
    EXPECT_EQ(again.tokens == first.tokens, seed == 7);
  }
}

TEST(ContinueTest, NeitherLossesNorForksChangeAToken) {
  FakePipeline::Options pipeline;
  pipeline.stage_count = 3;
  pipeline.layers = 7;
  FakeCluster cluster(pipeline);
  cluster.CreateSession("s");
  v1::GenerateRequest request = SessionRequest("s", "a", Prompt(1), 20);
  *request.mutable_sampling() = Sampled();
  const std::vector<uint32_t> first = cluster.Generate(request).tokens;
  v1::ForkSessionRequest fork;
  fork.set_session_id("s");
  fork.set_new_session_id("f");
  ASSERT_THAT(cluster.store().ForkSession(fork, absl::Now() + kTestLimit), IsOk());
  for (const std::string& session : {"s", "f"}) {
    SCOPED_TRACE(session);
    request = GoOn(session, "b", 60);
    *request.mutable_sampling() = Sampled();
    if (session == "f") request.mutable_sampling()->clear_frequency_penalty();  // Counts are of the turn, not the log.
    cluster.pipeline().PauseSteps();
    const FakeCluster::Call call = cluster.Start(request);
    ASSERT_TRUE(WaitUntil([&] {
      cluster.pipeline().AllowSteps(1);
      return call.stream->received().size() >= 5;
    }));
    cluster.pipeline().Kill(1);
    cluster.pipeline().Restart(1);
    cluster.pipeline().ResumeSteps();
    const FakeCluster::Answer answer = cluster.Finish(call);
    ASSERT_THAT(answer.status, IsOk());
    if (session == "s") {
      EXPECT_THAT(Concat(first, answer.tokens),
                  ElementsAreArray(FakeModel::Generate(Prompt(1), 80, Sampled(), kVocabulary)));
    } else {
      EXPECT_THAT(answer.tokens,
                  ElementsAreArray(FakeModel::Generate(Concat(Prompt(1), first), 60, request.sampling(), kVocabulary)));
    }
  }
}

// The session's past, the input and the answer, over a lost epoch and another router too.
TEST(ContinueTest, PenaltiesCountThePromptWhenAsked) {
  FakeCluster cluster;
  cluster.CreateSession("s");
  v1::Sampling sampling = Sampled();
  sampling.set_penalize_prompt(true);
  v1::GenerateRequest request = SessionRequest("", "", Prompt(3), 12);
  *request.mutable_sampling() = sampling;
  EXPECT_THAT(cluster.Generate(request).tokens,
              ElementsAreArray(FakeModel::Generate(Prompt(3), 12, sampling, kVocabulary)))
      << "without a session";

  std::vector<uint32_t> log;
  for (int turn = 0; turn < 4; ++turn) {
    SCOPED_TRACE(turn);
    // The third has no input.
    request = turn == 2 ? GoOn("s", "t2", 30) : SessionRequest("s", absl::StrCat("t", turn), Prompt(turn), 30);
    *request.mutable_sampling() = sampling;
    if (turn != 2) log = Concat(log, Prompt(turn));
    cluster.pipeline().PauseSteps();
    const FakeCluster::Call call = cluster.Start(request);
    ASSERT_TRUE(WaitUntil([&] {
      cluster.pipeline().AllowSteps(1);
      return call.stream->received().size() >= 5;
    }));
    if (turn == 1) {
      cluster.pipeline().Kill(0);
      cluster.pipeline().Restart(0);
    }
    cluster.pipeline().ResumeSteps();
    const FakeCluster::Answer answer = cluster.Finish(call);
    ASSERT_THAT(answer.status, IsOk());
    EXPECT_THAT(answer.tokens, ElementsAreArray(FakeModel::Generate(log, 30, sampling, kVocabulary)));
    log = Concat(log, answer.tokens);
    cluster.RestartRouter();
    EXPECT_THAT(cluster.Generate(request).tokens, ElementsAreArray(answer.tokens)) << "told again";
  }
}

TEST(ContinueTest, AfterAStopTokenItGoesOnWithOtherStops) {
  FakeCluster cluster;
  cluster.CreateSession("s");
  const std::vector<uint32_t> greedy = FakeModel::Greedy(Prompt(1), 30, kVocabulary);
  v1::GenerateRequest request = SessionRequest("s", "a", Prompt(1), 30);
  request.add_stop_token_ids(greedy[8]);
  const FakeCluster::Answer first = cluster.Generate(request);
  ASSERT_EQ(first.finish.reason(), v1::FINISH_REASON_STOP_TOKEN);
  const FakeCluster::Answer second = cluster.Generate(GoOn("s", "b", 10));
  ASSERT_THAT(second.status, IsOk());
  EXPECT_THAT(Concat(first.tokens, second.tokens),
              ElementsAreArray(FakeModel::Greedy(Prompt(1), static_cast<int>(first.tokens.size()) + 10, kVocabulary)));
}

TEST(ContinueTest, AStateThatHasSeenAllTokensIsNotGoneOnFrom) {
  // As an export makes it, and earlier releases made them at each turn's end.
  FakeCluster cluster;
  cluster.CreateSession("s");
  const FakeCluster::Answer first = cluster.Generate(SessionRequest("s", "a", Prompt(1), 10));
  const auto state = Await<TurnManager::ExportedState>(
      [&](auto done) { cluster.router().Export(cluster.router().NewCall(), "s", done); });
  ASSERT_THAT(state, IsOk());
  ASSERT_EQ(state->manifest.position(), 20);
  for (const bool restarted : {false, true}) {
    if (restarted) cluster.RestartRouter();
    const std::vector<uint32_t> log = cluster.Log("s");
    const FakeCluster::Answer next = cluster.Generate(GoOn("s", restarted ? "c" : "b", 10));
    ASSERT_THAT(next.status, IsOk());
    EXPECT_THAT(next.tokens, ElementsAreArray(FakeModel::Greedy(log, 10, kVocabulary)));
  }
}

TEST(ContinueTest, ItIsATurnLikeOthers) {
  FakeCluster cluster;
  cluster.CreateSession("s");
  v1::GenerateRequest request = SessionRequest("s", "a", Prompt(1), 10);
  *request.mutable_sampling() = Sampled();
  ASSERT_THAT(cluster.Generate(request).status, IsOk());
  request = GoOn("s", "b", 30);
  *request.mutable_sampling() = Sampled();
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call call = cluster.Start(request);
  ASSERT_TRUE(WaitUntil([&] {
    cluster.pipeline().AllowSteps(1);
    return call.stream->received().size() >= 3;
  }));
  cluster.RestartRouter();
  cluster.pipeline().ResumeSteps();
  const std::vector<uint32_t> all = FakeModel::Generate(Prompt(1), 40, Sampled(), kVocabulary);
  for (int again = 0; again < 2; ++again) {
    const FakeCluster::Answer answer = cluster.Generate(request);
    ASSERT_THAT(answer.status, IsOk());
    EXPECT_THAT(answer.tokens, ElementsAreArray(std::vector<uint32_t>(all.begin() + 10, all.end())));
  }
  const absl::Status other = cluster.Generate(SessionRequest("s", "b", Prompt(2), 30)).status;
  EXPECT_THAT(other, StatusIs(absl::StatusCode::kInvalidArgument));
  EXPECT_EQ(common::GetInvalidField(other), "request_id");
}

}  // namespace
}  // namespace rwkv::router
