// Score, ScoreDocument, Logits and exports.
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/generation.pb.h"
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
using ::testing::ElementsAreArray;
using ::testing::HasSubstr;
using ::testing::Le;
using ::testing::SizeIs;
using worker::FakeModel;
using worker::FakePipeline;

TEST(FeedingTest, ScoreReturnsOneLogprobATokenAfterTheFirst) {
  FakeCluster cluster;
  for (const int count : {1, 2, 500}) {
    v1::ScoreRequest request;
    const std::vector<uint32_t> tokens = Prompt(3, count);
    request.mutable_tokens()->mutable_ids()->Add(tokens.begin(), tokens.end());
    const auto response =
        Await<v1::ScoreResponse>([&](auto done) { cluster.router().Score(cluster.router().NewCall(), request, done); });
    ASSERT_THAT(response, IsOk());
    EXPECT_THAT(response->token_ids(), ElementsAreArray(tokens));
    ASSERT_EQ(response->logprobs_size(), count - 1);
    for (int i = 0; i + 1 < count; ++i) EXPECT_EQ(response->logprobs(i), -static_cast<float>(tokens[i + 1] % 97) / 8);
  }
}

// What ScoreDocument sent, checked to be the tokens of the document in order. One logprob a token after the first.
std::vector<float> DocumentLogprobs(const FakeStream<v1::ScoreDocumentResponse>& stream,
                                    const std::vector<uint32_t>& tokens) {
  std::vector<float> logprobs;
  for (const v1::ScoreDocumentResponse& response : stream.received()) {
    EXPECT_EQ(response.token_count(), tokens.size());
    EXPECT_EQ(response.first(), logprobs.size() + 1);
    EXPECT_EQ(response.token_ids_size(), response.logprobs_size());
    for (int i = 0; i < response.token_ids_size(); ++i) {
      EXPECT_EQ(response.token_ids(i), tokens.at(logprobs.size() + 1));
      logprobs.push_back(response.logprobs(i));
    }
  }
  return logprobs;
}

std::vector<float> FakeLogprobs(const std::vector<uint32_t>& tokens) {
  std::vector<float> logprobs;
  for (size_t i = 1; i < tokens.size(); ++i) logprobs.push_back(-static_cast<float>(tokens[i] % 97) / 8);
  return logprobs;
}

TEST(FeedingTest, ADocumentOfAnyLengthIsScored) {
  FakePipeline::Options pipeline;
  pipeline.max_batch_tokens = 1024;
  FakeCluster cluster(pipeline);
  for (const int count : {1, 2, 500, 100000}) {
    SCOPED_TRACE(count);
    Document document;
    document.token_ids = Prompt(3, count);
    auto stream = std::make_shared<FakeStream<v1::ScoreDocumentResponse>>();
    cluster.router().ScoreDocument(cluster.router().NewCall(), document, stream);
    ASSERT_THAT(stream->Wait(), IsOk());
    EXPECT_EQ(DocumentLogprobs(*stream, document.token_ids), FakeLogprobs(document.token_ids));
  }
}

TEST(FeedingTest, ADocumentIsScoredOnceOverALostEpoch) {
  FakePipeline::Options pipeline;
  pipeline.max_batch_tokens = 16;
  FakeCluster cluster(pipeline);
  cluster.pipeline().PauseSteps();
  Document document;
  document.token_ids = Prompt(3, 300);
  auto stream = std::make_shared<FakeStream<v1::ScoreDocumentResponse>>();
  cluster.router().ScoreDocument(cluster.router().NewCall(), document, stream);
  cluster.pipeline().AllowSteps(5);
  ASSERT_TRUE(stream->WaitReceived(1));
  cluster.pipeline().BreakEpoch();
  cluster.pipeline().ResumeSteps();
  ASSERT_THAT(stream->Wait(), IsOk());
  EXPECT_EQ(DocumentLogprobs(*stream, document.token_ids), FakeLogprobs(document.token_ids));
  EXPECT_EQ(cluster.pipeline().stats().attaches_fresh, 2);
}

TEST(FeedingTest, AClientThatTakesNoScoresIsWaitedForAndThenDropped) {
  TurnManager::Options options;
  options.slow_client_timeout = absl::Milliseconds(200);
  FakePipeline::Options pipeline;
  pipeline.max_batch_tokens = 16;
  FakeCluster cluster(pipeline, options);
  Document document;
  document.token_ids = Prompt(3, 60000);
  auto stream = std::make_shared<FakeStream<v1::ScoreDocumentResponse>>();
  stream->Hold();
  cluster.router().ScoreDocument(cluster.router().NewCall(), document, stream);
  EXPECT_THAT(stream->Wait(), StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("does not read")));
  EXPECT_THAT(stream->received(), SizeIs(Le(4)));
  EXPECT_TRUE(WaitUntil([&] { return cluster.pipeline().stats().slots_used == 0; }));
}

TEST(FeedingTest, WrongDocumentsAreRefused) {
  TurnManager::Options options;
  options.limits.max_document_bytes = 100;
  FakeCluster cluster({}, options);
  const auto score = [&](const Document& document) {
    auto stream = std::make_shared<FakeStream<v1::ScoreDocumentResponse>>();
    cluster.router().ScoreDocument(cluster.router().NewCall(), document, stream);
    return stream->Wait();
  };
  EXPECT_THAT(score({}), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("empty")));
  EXPECT_THAT(score({"", {1, kVocabulary}, ""}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("token_ids[1]")));
  EXPECT_THAT(score({"", {0}, "text"}), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("tokenizer")));
  EXPECT_THAT(score({"other", {0}, ""}), StatusIs(absl::StatusCode::kNotFound, HasSubstr("other")));
  EXPECT_THAT(score({"", Prompt(1, 26), ""}), StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("100 bytes")));
}

TEST(FeedingTest, LogitsComeRowByRowAlsoOverALostEpoch) {
  TurnManager::Options options;
  options.allow_logits = true;
  FakePipeline::Options pipeline;
  pipeline.max_batch_tokens = 16;
  FakeCluster cluster(pipeline, options);
  cluster.pipeline().PauseSteps();
  const std::vector<uint32_t> tokens = Prompt(3, 300);
  v1::LogitsRequest request;
  request.mutable_tokens()->mutable_ids()->Add(tokens.begin(), tokens.end());
  auto stream = std::make_shared<FakeStream<v1::LogitsResponse>>();
  cluster.router().Logits(cluster.router().NewCall(), request, stream);
  cluster.pipeline().AllowSteps(5);
  ASSERT_TRUE(stream->WaitReceived(3));
  cluster.pipeline().BreakEpoch();
  cluster.pipeline().ResumeSteps();
  ASSERT_THAT(stream->Wait(), IsOk());
  uint64_t row = 0;
  for (const v1::LogitsResponse& response : stream->received()) {
    EXPECT_EQ(response.first_row(), row);
    EXPECT_EQ(response.vocab_size(), kVocabulary);
    ASSERT_EQ(response.logits().size(), response.rows() * kVocabulary * sizeof(float));
    row += response.rows();
  }
  EXPECT_EQ(row, 300);
}

TEST(FeedingTest, LogitsNeedPermission) {
  FakeCluster cluster;
  auto stream = std::make_shared<FakeStream<v1::LogitsResponse>>();
  v1::LogitsRequest request;
  request.mutable_tokens()->add_ids(1);
  cluster.router().Logits(cluster.router().NewCall(), request, stream);
  EXPECT_THAT(stream->Wait(), StatusIs(absl::StatusCode::kPermissionDenied));
}

TEST(FeedingTest, ExportMakesASnapshotAtTheEndOfTheLog) {
  FakeCluster cluster;
  cluster.CreateSession("empty");
  cluster.CreateSession("s");
  const auto export_state = [&](const std::string& id) {
    return Await<TurnManager::ExportedState>(
        [&](auto done) { cluster.router().Export(cluster.router().NewCall(), id, done); });
  };
  auto state = export_state("empty");
  ASSERT_THAT(state, IsOk());
  EXPECT_EQ(state->manifest.position(), 0);
  EXPECT_EQ(state->manifest.records_size(), 4);

  const FakeCluster::Answer answer = cluster.Generate(SessionRequest("s", "a", Prompt(1), 7));
  state = export_state("s");
  ASSERT_THAT(state, IsOk());
  EXPECT_EQ(state->manifest.position(), 17);
  const uint64_t expected = FakeModel::Feed(FakeModel::Fresh(), Concat(Prompt(1), answer.tokens));
  const auto record = cluster.store().GetRecord(state->manifest.records(3), absl::Now() + kTestLimit);
  ASSERT_THAT(record, IsOk());
  EXPECT_EQ(*record, std::string(reinterpret_cast<const char*>(&expected), sizeof(expected)));

  // Without a snapshot the log is fed again.
  cluster.CreateSession("t");
  cluster.pipeline().FailSaves(2, absl::ResourceExhaustedError("disk full"));
  ASSERT_THAT(cluster.Generate(SessionRequest("t", "a", Prompt(1), 7)).status, IsOk());
  ASSERT_TRUE(WaitUntil([&] { return cluster.metrics().snapshots_failed.Value() == 1; }));
  cluster.RestartRouter();
  state = export_state("t");
  ASSERT_THAT(state, IsOk());
  EXPECT_EQ(state->manifest.position(), 17);

  EXPECT_THAT(export_state("nobody"), StatusIs(absl::StatusCode::kNotFound));
  cluster.pipeline().FailSaves(2, absl::ResourceExhaustedError("disk full"));
  cluster.CreateSession("u");
  EXPECT_THAT(export_state("u"), StatusIs(absl::StatusCode::kResourceExhausted));
}

}  // namespace
}  // namespace rwkv::router
