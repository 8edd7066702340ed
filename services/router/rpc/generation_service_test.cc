#include "services/router/rpc/generation_service.h"

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/synchronization/notification.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/generation.pb.h"
#include "services/common/grpc_status.h"
#include "services/router/rpc/services_fixture.h"
#include "services/router/testing/fake_cluster.h"
#include "services/worker/client/fake_worker.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::ElementsAreArray;
using ::testing::HasSubstr;
using worker::FakeModel;

using GenerationServiceTest = ServicesTest;

TEST_F(GenerationServiceTest, GenerateStreamsTheModelsTokens) {
  StartServer();
  const Result result = Generate(Request(kPrompt, 300));
  ASSERT_THAT(result.status, IsOk());
  EXPECT_THAT(result.tokens, ElementsAreArray(FakeModel::Greedy(kPrompt, 300, vocabulary_)));
  EXPECT_EQ(result.finish.reason(), v1::FINISH_REASON_LENGTH);
}

TEST_F(GenerationServiceTest, ThirtyTwoClientsAtOnceEachGetTheirSoloAnswer) {
  StartServer();
  std::vector<Result> results(32);
  std::vector<std::thread> clients;
  for (uint32_t i = 0; i < 32; ++i) {
    clients.emplace_back([this, i, &results] { results[i] = Generate(Request({i + 1, i * 3 % 7, 9}, 40)); });
  }
  for (std::thread& client : clients) client.join();
  for (uint32_t i = 0; i < 32; ++i) {
    EXPECT_THAT(results[i].tokens, ElementsAreArray(FakeModel::Greedy({i + 1, i * 3 % 7, 9}, 40, vocabulary_)));
  }
}

TEST_F(GenerationServiceTest, BadRequestsNameTheField) {
  StartServer(World());
  struct Case {
    std::string name;
    std::function<void(v1::GenerateRequest&)> change;
    absl::StatusCode code;
    std::string field;    // Empty: none is named.
    std::string message;  // A part of it.
  };
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  const std::vector<Case> cases = {
      {"unknown model", [](auto& r) { r.set_model("gpt"); }, absl::StatusCode::kNotFound, "", "\"gpt\""},
      {"unknown session", [](auto& r) { r.set_session_id("nobody"); }, absl::StatusCode::kNotFound, "", "nobody"},
      {"no input", [](auto& r) { r.clear_input(); }, kInvalid, "input", "missing"},
      {"empty text", [](auto& r) { r.set_text(""); }, kInvalid, "text", "empty"},
      {"empty tokens", [](auto& r) { r.mutable_tokens()->clear_ids(); }, kInvalid, "tokens.ids", "empty"},
      {"prompt over the limit", [](auto& r) { r.set_text(std::string(101, 'x')); }, kInvalid, "text", "101 tokens"},
      {"many tokens", [](auto& r) { r.mutable_tokens()->mutable_ids()->Resize(101, 1); }, kInvalid, "tokens.ids",
       "101 tokens; at most 100"},
      {"token id", [](auto& r) { r.mutable_tokens()->set_ids(2, 65536); }, kInvalid, "tokens.ids[2]", "65536"},
      {"utf-8", [](auto& r) { r.set_text("gr\xc3\xbc\xc3(e"); }, kInvalid, "text", "byte 4"},
      {"cut utf-8", [](auto& r) { r.set_text("ab\xe2\x82"); }, kInvalid, "text", "byte 2"},
      {"utf-8 in a stop string", [](auto& r) { r.add_stop("\xff"); }, kInvalid, "", "UTF-8"},
      {"nan", [](auto& r) { r.mutable_sampling()->set_temperature(std::numeric_limits<float>::quiet_NaN()); }, kInvalid,
       "sampling.temperature", ""},
      {"negative", [](auto& r) { r.mutable_sampling()->set_top_p(-0.5); }, kInvalid, "sampling.top_p", ""},
      {"negative k", [](auto& r) { r.mutable_sampling()->set_top_k(-1); }, kInvalid, "sampling.top_k", ""},
      {"logprobs", [](auto& r) { r.mutable_sampling()->set_top_logprobs(65); }, kInvalid, "sampling.top_logprobs", ""},
      {"stop list",
       [](auto& r) {
         for (int i = 0; i < 17; ++i) r.add_stop("x");
       },
       kInvalid, "stop", "17 strings"},
      {"empty stop", [](auto& r) { r.add_stop(""); }, kInvalid, "stop[0]", "0 bytes"},
      {"long stop", [](auto& r) { r.add_stop(std::string(257, 'x')); }, kInvalid, "stop[0]", "257 bytes"},
      {"stop ids", [](auto& r) { r.mutable_stop_token_ids()->Resize(65, 1); }, kInvalid, "stop_token_ids", "65"},
      {"stop id", [](auto& r) { r.add_stop_token_ids(70000); }, kInvalid, "stop_token_ids[0]", "70000"},
      {"max tokens", [](auto& r) { r.set_max_tokens(5001); }, kInvalid, "max_tokens", "5001"},
      {"session id", [](auto& r) { r.set_session_id("a b"); }, kInvalid, "session_id", "byte 1"},
      {"long session id", [](auto& r) { r.set_session_id(std::string(129, 'x')); }, kInvalid, "session_id", "129"},
      {"request id alone", [](auto& r) { r.set_request_id("r"); }, kInvalid, "request_id", "session_id"},
      {"long request id",
       [](auto& r) {
         r.set_session_id("s");
         r.set_request_id(std::string(129, 'x'));
       },
       kInvalid, "request_id", "129"},
      {"resume alone", [](auto& r) { r.set_resume_from(1); }, kInvalid, "resume_from", "request_id"},
  };
  for (const Case& one : cases) {
    SCOPED_TRACE(one.name);
    v1::GenerateRequest request = Request(kPrompt, 5);
    one.change(request);
    const absl::Status status = Generate(request).status;
    EXPECT_THAT(status, StatusIs(one.code, HasSubstr(one.message)));
    if (!one.field.empty()) EXPECT_EQ(common::GetInvalidField(status), one.field);
  }
  // Nothing of it did harm.
  EXPECT_THAT(Generate(Request(kPrompt, 5)).status, IsOk());
}

TEST_F(GenerationServiceTest, AModelWithoutTokenizerTakesTokenIdsOnly) {
  StartServer();
  v1::GenerateRequest text;
  text.set_text("hello");
  EXPECT_THAT(Generate(text).status, StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("tokenizer")));
  v1::GenerateRequest stop = Request(kPrompt, 5);
  stop.add_stop("x");
  EXPECT_THAT(Generate(stop).status, StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("tokenizer")));
  v1::TokenizeResponse tokenized;
  EXPECT_THAT(Call(*generation_, &v1::Generation::Stub::Tokenize, v1::TokenizeRequest(), &tokenized),
              StatusIs(absl::StatusCode::kFailedPrecondition));
  v1::DetokenizeResponse detokenized;
  EXPECT_THAT(Call(*generation_, &v1::Generation::Stub::Detokenize, v1::DetokenizeRequest(), &detokenized),
              StatusIs(absl::StatusCode::kFailedPrecondition));
  const Result result = Generate(Request(kPrompt, 5));
  ASSERT_THAT(result.status, IsOk());
  EXPECT_EQ(result.text, "");
}

TEST_F(GenerationServiceTest, TextGoesInAndComesOut) {
  StartServer(World());
  v1::GenerateRequest request;
  request.set_text("hello");
  request.set_max_tokens(30);
  request.set_ignore_end_of_text(true);
  const Result result = Generate(request);
  ASSERT_THAT(result.status, IsOk());
  const std::vector<uint32_t> ids = cluster_->tokenizer().Encode("hello");
  EXPECT_THAT(result.tokens, ElementsAreArray(FakeModel::Greedy(ids, 30, vocabulary_)));
  EXPECT_FALSE(result.text.empty());

  v1::TokenizeRequest tokenize;
  tokenize.set_data("a\xff");
  v1::TokenizeResponse tokenized;
  ASSERT_THAT(Call(*generation_, &v1::Generation::Stub::Tokenize, tokenize, &tokenized), IsOk());
  EXPECT_THAT(tokenized.token_ids(), ElementsAre('a' + 1, 256));
  v1::DetokenizeRequest detokenize;
  *detokenize.mutable_token_ids() = tokenized.token_ids();
  v1::DetokenizeResponse detokenized;
  ASSERT_THAT(Call(*generation_, &v1::Generation::Stub::Detokenize, detokenize, &detokenized), IsOk());
  EXPECT_EQ(detokenized.data(), "a\xff");
  detokenize.mutable_token_ids()->Resize(GenerationService::kMaxTokenIds + 1, 0);
  EXPECT_THAT(Call(*generation_, &v1::Generation::Stub::Detokenize, detokenize, &detokenized),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("at most")));
  tokenize.set_data(std::string(GenerationService::kMaxTextBytes + 1, 'x'));
  EXPECT_THAT(Call(*generation_, &v1::Generation::Stub::Tokenize, tokenize, &tokenized),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("at most")));
  tokenize.set_data("a");
  tokenize.set_model("other");
  EXPECT_THAT(Call(*generation_, &v1::Generation::Stub::Tokenize, tokenize, &tokenized),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("other")));
  *detokenize.mutable_token_ids() = v1::TokenizeResponse().token_ids();
  detokenize.add_token_ids('a' + 1);
  detokenize.add_token_ids(256);
  detokenize.add_token_ids(65536);
  EXPECT_THAT(Call(*generation_, &v1::Generation::Stub::Detokenize, detokenize, &detokenized),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("token_ids[2]")));
}

TEST_F(GenerationServiceTest, ADeadlineFreesTheSlot) {
  StartServer();
  cluster_->pipeline().PauseSteps();
  EXPECT_THAT(Generate(Request(kPrompt, 5), absl::Milliseconds(100)).status,
              StatusIs(absl::StatusCode::kDeadlineExceeded));
  cluster_->pipeline().ResumeSteps();
  EXPECT_TRUE(WaitUntil([this] { return cluster_->router().counts().running == 0; }));
  EXPECT_TRUE(WaitUntil([this] { return cluster_->pipeline().stats().slots_used == 0; }));
}

TEST_F(GenerationServiceTest, AClientThatLeavesFreesTheSlotAndMayComeBack) {
  StartServer();
  CreateSession("s");
  cluster_->pipeline().PauseSteps();
  std::vector<uint32_t> got;
  {
    grpc::ClientContext context;
    SetLimit(context);
    const auto reader = generation_->Generate(&context, SessionRequest("s", "r", kPrompt, 50));
    cluster_->pipeline().AllowSteps(8);
    v1::GenerateResponse message;
    for (int i = 0; i < 3 && reader->Read(&message); ++i) got.push_back(message.token_id());
    context.TryCancel();
    while (reader->Read(&message)) {
    }
    EXPECT_THAT(common::FromGrpcStatus(reader->Finish()), StatusIs(absl::StatusCode::kCancelled));
  }
  cluster_->pipeline().ResumeSteps();
  EXPECT_TRUE(WaitUntil([this] { return cluster_->router().counts().running == 0; }));
  v1::GenerateRequest resume = SessionRequest("s", "r", kPrompt, 50);
  resume.set_resume_from(got.size());
  const Result rest = Generate(resume);
  ASSERT_THAT(rest.status, IsOk());
  got.insert(got.end(), rest.tokens.begin(), rest.tokens.end());
  EXPECT_THAT(got, ElementsAreArray(FakeModel::Greedy(kPrompt, 50, vocabulary_)));
}

TEST_F(GenerationServiceTest, ScoreAndLogits) {
  StartServer();
  v1::ScoreRequest score;
  for (uint32_t id : kPrompt) score.mutable_tokens()->add_ids(id);
  v1::ScoreResponse scored;
  ASSERT_THAT(Call(*generation_, &v1::Generation::Stub::Score, score, &scored), IsOk());
  EXPECT_EQ(scored.token_ids_size(), 4);
  EXPECT_EQ(scored.logprobs_size(), 3);
  score.mutable_tokens()->add_ids(1000);
  EXPECT_THAT(Call(*generation_, &v1::Generation::Stub::Score, score, &scored),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("tokens.ids[4]")));
  score.set_text("\xff");
  EXPECT_THAT(Call(*generation_, &v1::Generation::Stub::Score, score, &scored),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("byte 0")));

  grpc::ClientContext context;
  SetLimit(context);
  v1::LogitsRequest logits;
  for (uint32_t id : kPrompt) logits.mutable_tokens()->add_ids(id);
  const auto reader = generation_->Logits(&context, logits);
  v1::LogitsResponse message;
  uint64_t rows = 0;
  while (reader->Read(&message)) {
    EXPECT_EQ(message.first_row(), rows);
    rows += message.rows();
  }
  EXPECT_THAT(common::FromGrpcStatus(reader->Finish()), IsOk());
  EXPECT_EQ(rows, 4);
}

TEST_F(GenerationServiceTest, SpecialTokensOfPlainTextAreText) {
  StartServer(World());
  v1::TokenizeRequest tokenize;
  tokenize.set_data("a<end>");
  v1::TokenizeResponse tokenized;
  ASSERT_THAT(Call(*generation_, &v1::Generation::Stub::Tokenize, tokenize, &tokenized), IsOk());
  EXPECT_THAT(tokenized.token_ids(), ElementsAre('a' + 1, 0));
  tokenize.set_plain_text(true);
  ASSERT_THAT(Call(*generation_, &v1::Generation::Stub::Tokenize, tokenize, &tokenized), IsOk());
  EXPECT_EQ(tokenized.token_ids_size(), 6);

  v1::GenerateRequest request;
  request.set_text("a<end>");
  request.set_max_tokens(0);
  EXPECT_EQ(Generate(request).finish.prompt_tokens(), 2);
  request.set_plain_text(true);
  EXPECT_EQ(Generate(request).finish.prompt_tokens(), 6);
}

TEST_F(GenerationServiceTest, TextsAreTokenizedWhereTheyKeepNobodyWaiting) {
  StartServer(World());
  const auto go_on = std::make_shared<absl::Notification>();  // Its threads may see it later than this one.
  const auto held = std::make_shared<std::atomic<int>>(0);
  for (int i = 0; i < 4; ++i) {  // All its threads.
    ASSERT_TRUE(executor_->TryRun([go_on, held] {
      ++*held;
      go_on->WaitForNotificationWithTimeout(kTestLimit);
    }));
  }
  ASSERT_TRUE(WaitUntil([&] { return *held == 4; }));  // And none of them is in its queue.
  v1::GenerateRequest text;
  text.set_text("hello");
  text.set_max_tokens(5);
  text.set_ignore_end_of_text(true);
  grpc::ClientContext left, patient;
  SetLimit(left);
  SetLimit(patient);
  const auto leaving = generation_->Generate(&left, text);
  const auto waiting = generation_->Generate(&patient, text);
  EXPECT_THAT(Generate(Request(kPrompt, 5)).status, IsOk()) << "token ids need no tokenizing";
  left.TryCancel();
  v1::GenerateResponse message;
  while (leaving->Read(&message)) {
  }
  EXPECT_THAT(common::FromGrpcStatus(leaving->Finish()), StatusIs(absl::StatusCode::kCancelled));
  // Their queue has a bound.
  EXPECT_TRUE(WaitUntil([&] {
    while (executor_->TryRun([] {})) {
    }
    return absl::IsResourceExhausted(Generate(text).status);
  }));
  v1::TokenizeRequest tokenize;
  tokenize.set_data("a");
  v1::TokenizeResponse tokenized;
  EXPECT_THAT(Call(*generation_, &v1::Generation::Stub::Tokenize, tokenize, &tokenized),
              StatusIs(absl::StatusCode::kResourceExhausted));
  v1::ScoreRequest score;
  score.set_text("hello");
  v1::ScoreResponse scored;
  EXPECT_THAT(Call(*generation_, &v1::Generation::Stub::Score, score, &scored),
              StatusIs(absl::StatusCode::kResourceExhausted));
  v1::EmbedRequest embed;
  embed.set_text("hello");
  v1::EmbedResponse embedded;
  EXPECT_THAT(Call(*generation_, &v1::Generation::Stub::Embed, embed, &embedded),
              StatusIs(absl::StatusCode::kResourceExhausted));
  go_on->Notify();
  std::vector<uint32_t> tokens;
  while (waiting->Read(&message)) {
    if (message.has_token_id()) tokens.push_back(message.token_id());
  }
  EXPECT_THAT(common::FromGrpcStatus(waiting->Finish()), IsOk());
  EXPECT_THAT(tokens, ElementsAreArray(FakeModel::Greedy(cluster_->tokenizer().Encode("hello"), 5, vocabulary_)));
  EXPECT_TRUE(WaitUntil([this] { return cluster_->router().counts().running == 0; })) << "who left is computed for";
}

TEST_F(GenerationServiceTest, ListModelsNamesTheTokenizer) {
  StartServer(World());
  v1::ListModelsResponse models;
  ASSERT_THAT(Call(*generation_, &v1::Generation::Stub::ListModels, v1::ListModelsRequest(), &models), IsOk());
  ASSERT_EQ(models.models_size(), 1);
  EXPECT_EQ(models.models(0).name(), "fake");
  EXPECT_EQ(models.models(0).tokenizer(), "world");
  for (const std::string& name : {models.models(0).name(), models.models(0).fingerprint()}) {
    v1::GenerateRequest request = Request(kPrompt, 2);
    request.set_model(name);
    EXPECT_THAT(Generate(request).status, IsOk());
  }
}

}  // namespace
}  // namespace rwkv::router
