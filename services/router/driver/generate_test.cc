// Generate: tokens, text, stops, what is reported.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/generation.pb.h"
#include "services/router/testing/fake_cluster.h"
#include "services/router/testing/turn_testing.h"
#include "services/worker/client/fake_worker.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::ElementsAreArray;
using ::testing::IsEmpty;
using ::testing::Le;
using ::testing::SizeIs;
using worker::FakeModel;
using worker::FakePipeline;

TEST(GenerateTest, GeneratesTheModelsTokens) {
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

TEST(GenerateTest, ConcurrentTurnsEqualTheirSoloRuns) {
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

TEST(GenerateTest, ZeroTokensOnlyFeedTheInput) {
  FakeCluster cluster;
  cluster.CreateSession("s");
  const FakeCluster::Answer fed = cluster.Generate(SessionRequest("s", "a", Prompt(1, 200), 0));
  ASSERT_THAT(fed.status, IsOk());
  EXPECT_THAT(fed.tokens, IsEmpty());
  EXPECT_EQ(fed.finish.reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(fed.finish.session_tokens(), 200);
  const FakeCluster::Answer next = cluster.Generate(SessionRequest("s", "b", Prompt(2), 5));
  ASSERT_THAT(next.status, IsOk());
  EXPECT_EQ(next.finish.reused_tokens(), 199);
  EXPECT_THAT(next.tokens, ElementsAreArray(FakeModel::Greedy(Concat(Prompt(1, 200), Prompt(2)), 5, kVocabulary)));
  ASSERT_THAT(cluster.Generate(Request(Prompt(1), 0)).status, IsOk());
}

TEST(GenerateTest, AStopTokenIsNeitherReturnedNorKept) {
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

TEST(GenerateTest, AStopStringOverTokenBordersEndsTheText) {
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

TEST(GenerateTest, TheSeedIsDrawnOnceAndReported) {
  FakeCluster cluster;
  v1::GenerateRequest request = Request(Prompt(1), 10);
  request.mutable_sampling()->set_temperature(1);
  const FakeCluster::Answer drawn = cluster.Generate(request);
  request.mutable_sampling()->set_seed(drawn.finish.seed());
  EXPECT_EQ(cluster.Generate(request).tokens, drawn.tokens);
}

TEST(GenerateTest, TopLogprobsComeWithTheTokens) {
  FakeCluster cluster;
  v1::GenerateRequest request = Request(Prompt(1), 10);
  request.mutable_sampling()->set_top_logprobs(3);
  const FakeCluster::Call call = cluster.Start(request);
  ASSERT_THAT(cluster.Finish(call).status, IsOk());
  const auto messages = call.stream->received();
  ASSERT_EQ(messages.size(), 11);
  for (int i = 0; i < 10; ++i) EXPECT_EQ(messages[i].top_logprobs_size(), 3);
}

// Callers' threads refuse, the loop's thread runs turns: found by tsan.
TEST(GenerateTest, RefusalsDoNotTouchTheTurnsThatRun) {
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

}  // namespace
}  // namespace rwkv::router
