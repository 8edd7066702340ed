// The three services over gRPC's in-process transport, in front of a fake cluster.
#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/cluster.grpc.pb.h"
#include "rwkv/v1/generation.grpc.pb.h"
#include "rwkv/v1/sessions.grpc.pb.h"
#include "services/common/grpc_status.h"
#include "services/router/rpc/cluster_service.h"
#include "services/router/rpc/generation_service.h"
#include "services/router/rpc/sessions_service.h"
#include "services/router/testing/fake_cluster.h"
#include "services/router/turns/executor.h"
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
using worker::FakePipeline;

const std::vector<uint32_t> kPrompt = {5, 6, 7, 8};

class ServicesTest : public ::testing::Test {
 protected:
  void StartServer(FakePipeline::Options pipeline = {}, TurnManager::Options options = {}) {
    options.allow_logits = true;
    options.limits.max_prompt_tokens = 100;
    options.limits.max_generated_tokens = 5000;
    vocabulary_ = pipeline.vocab_size;
    cluster_ = std::make_unique<FakeCluster>(pipeline, options);
    executor_ = std::make_unique<Executor>(4, 64);
    const auto random = [this] { return ++random_; };
    generation_service_ = std::make_unique<GenerationService>(&cluster_->router(), executor_.get());
    sessions_service_ = std::make_unique<SessionsService>(&cluster_->router(), &cluster_->store(), &cluster_->store(),
                                                          executor_.get(), random);
    cluster_service_ = std::make_unique<ClusterService>("router-0", "store:1", &cluster_->router(), &cluster_->store(),
                                                        executor_.get());
    cluster_service_->SetAddresses("router:1", "router:2");
    grpc::ServerBuilder builder;
    builder.RegisterService(generation_service_.get());
    builder.RegisterService(sessions_service_.get());
    builder.RegisterService(cluster_service_.get());
    server_ = builder.BuildAndStart();
    const std::shared_ptr<grpc::Channel> channel = server_->InProcessChannel(grpc::ChannelArguments());
    generation_ = v1::Generation::NewStub(channel);
    sessions_ = v1::Sessions::NewStub(channel);
    cluster_stub_ = v1::Cluster::NewStub(channel);
  }

  void TearDown() override {
    if (server_ != nullptr) server_->Shutdown(absl::ToChronoTime(absl::Now() + kTestLimit));
    executor_ = nullptr;
  }

  struct Result {
    absl::Status status;
    std::vector<uint32_t> tokens;
    std::string text;
    v1::Finish finish;
  };
  Result Generate(const v1::GenerateRequest& request, absl::Duration timeout = kTestLimit) {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
    Result result;
    const auto reader = generation_->Generate(&context, request);
    v1::GenerateResponse message;
    while (reader->Read(&message)) {
      result.text += message.text();
      if (message.has_finish()) {
        result.finish = message.finish();
      } else {
        result.tokens.push_back(message.token_id());
      }
    }
    result.status = common::FromGrpcStatus(reader->Finish());
    return result;
  }

  template <typename Stub, typename Request, typename Response>
  absl::Status Call(Stub& stub, grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Response*),
                    const Request& request, Response* response) {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + kTestLimit));
    return common::FromGrpcStatus((stub.*method)(&context, request, response));
  }

  std::string CreateSession(const std::string& id = "") {
    v1::SessionsCreateRequest request;
    request.set_session_id(id);
    v1::SessionsCreateResponse response;
    EXPECT_THAT(Call(*sessions_, &v1::Sessions::Stub::Create, request, &response), IsOk());
    return response.session().id();
  }

  struct Tensor {
    std::vector<int64_t> shape;
    std::string bytes;
    uint64_t position = 0;
  };
  absl::Status Export(const std::string& id, std::map<std::string, Tensor>* tensors) {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + kTestLimit));
    v1::SessionsExportStateRequest request;
    request.set_session_id(id);
    const auto reader = sessions_->ExportState(&context, request);
    v1::SessionsExportStateResponse message;
    while (reader->Read(&message)) {
      Tensor& tensor = (*tensors)[message.tensor()];
      EXPECT_EQ(message.offset_bytes(), tensor.bytes.size());
      tensor.shape.assign(message.shape().begin(), message.shape().end());
      tensor.bytes += message.data();
      tensor.position = message.position();
    }
    return common::FromGrpcStatus(reader->Finish());
  }

  std::atomic<uint64_t> random_{0};
  int vocabulary_ = 0;
  std::unique_ptr<FakeCluster> cluster_;
  std::unique_ptr<Executor> executor_;
  std::unique_ptr<GenerationService> generation_service_;
  std::unique_ptr<SessionsService> sessions_service_;
  std::unique_ptr<ClusterService> cluster_service_;
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<v1::Generation::Stub> generation_;
  std::unique_ptr<v1::Sessions::Stub> sessions_;
  std::unique_ptr<v1::Cluster::Stub> cluster_stub_;
};

FakePipeline::Options World() {
  FakePipeline::Options options;
  options.vocab_size = 65536;
  return options;
}

TEST_F(ServicesTest, GenerateStreamsTheModelsTokens) {
  StartServer();
  const Result result = Generate(Request(kPrompt, 300));
  ASSERT_THAT(result.status, IsOk());
  EXPECT_THAT(result.tokens, ElementsAreArray(FakeModel::Greedy(kPrompt, 300, vocabulary_)));
  EXPECT_EQ(result.finish.reason(), v1::FINISH_REASON_LENGTH);
}

TEST_F(ServicesTest, ThirtyTwoClientsAtOnceEachGetTheirSoloAnswer) {
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

TEST_F(ServicesTest, BadRequestsNameTheField) {
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

TEST_F(ServicesTest, AModelWithoutTokenizerTakesTokenIdsOnly) {
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

TEST_F(ServicesTest, TextGoesInAndComesOut) {
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
  detokenize.add_token_ids(65536);
  EXPECT_THAT(Call(*generation_, &v1::Generation::Stub::Detokenize, detokenize, &detokenized),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("token_ids[2]")));
}

TEST_F(ServicesTest, ADeadlineFreesTheSlot) {
  StartServer();
  cluster_->pipeline().PauseSteps();
  EXPECT_THAT(Generate(Request(kPrompt, 5), absl::Milliseconds(100)).status,
              StatusIs(absl::StatusCode::kDeadlineExceeded));
  cluster_->pipeline().ResumeSteps();
  EXPECT_TRUE(WaitUntil([this] { return cluster_->router().counts().running == 0; }));
  EXPECT_TRUE(WaitUntil([this] { return cluster_->pipeline().stats().slots_used == 0; }));
}

TEST_F(ServicesTest, AClientThatLeavesFreesTheSlotAndMayComeBack) {
  StartServer();
  CreateSession("s");
  cluster_->pipeline().PauseSteps();
  std::vector<uint32_t> got;
  {
    grpc::ClientContext context;
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

TEST_F(ServicesTest, ScoreAndLogits) {
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

TEST_F(ServicesTest, ADocumentComesInPieces) {
  TurnManager::Options options;
  options.limits.max_document_bytes = 5000;
  StartServer(World(), options);
  const auto score = [&](const std::vector<v1::ScoreDocumentRequest>& pieces, std::vector<uint32_t>* tokens) {
    grpc::ClientContext context;
    const auto stream = generation_->ScoreDocument(&context);
    for (const v1::ScoreDocumentRequest& piece : pieces) stream->Write(piece);
    stream->WritesDone();
    v1::ScoreDocumentResponse response;
    while (stream->Read(&response)) {
      EXPECT_EQ(response.first(), tokens->size() + 1);
      tokens->insert(tokens->end(), response.token_ids().begin(), response.token_ids().end());
    }
    return common::FromGrpcStatus(stream->Finish());
  };
  std::vector<v1::ScoreDocumentRequest> pieces(3);
  pieces[0].add_token_ids(0);
  pieces[1].set_text("ab\xe2");  // A character cut in two.
  pieces[2].set_text("\x82\xac");
  std::vector<uint32_t> tokens;
  ASSERT_THAT(score(pieces, &tokens), IsOk());
  EXPECT_THAT(tokens, ElementsAreArray(cluster_->tokenizer().Encode("ab\xe2\x82\xac")));

  pieces[0].set_model("other");
  EXPECT_THAT(score(pieces, &tokens), StatusIs(absl::StatusCode::kNotFound, HasSubstr("other")));
  pieces[0].clear_model();
  pieces[1].set_text(std::string(4997, 'x'));
  EXPECT_THAT(score(pieces, &tokens), StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("5000 bytes")));
}

TEST_F(ServicesTest, ADocumentIsTokenizedAsOneText) {
  TurnManager::Options options;
  options.limits.max_document_bytes = 260'000;
  StartServer(World(), options);
  const auto tokenize = [&](const std::vector<std::string>& pieces, std::vector<uint32_t>* tokens,
                            const std::string& model = "") {
    grpc::ClientContext context;
    const auto stream = generation_->TokenizeDocument(&context);
    for (const std::string& text : pieces) {
      v1::TokenizeDocumentRequest piece;
      piece.set_model(model);
      piece.set_text(text);
      stream->Write(piece);
    }
    stream->WritesDone();
    v1::TokenizeDocumentResponse response;
    while (stream->Read(&response)) {
      tokens->insert(tokens->end(), response.token_ids().begin(), response.token_ids().end());
    }
    return common::FromGrpcStatus(stream->Finish());
  };
  std::string text;
  for (int i = 0; i < 20'000; ++i) text += "the house \xe2\x82\xac";  // More tokens than a message holds.
  const std::vector<uint32_t> expected = cluster_->tokenizer().Encode(text);
  ASSERT_GT(expected.size(), 1 << 16);
  std::vector<uint32_t> tokens;
  ASSERT_THAT(tokenize({text.substr(0, 12), text.substr(12, 100), text.substr(112)}, &tokens), IsOk());
  EXPECT_EQ(tokens, expected);

  tokens.clear();
  EXPECT_THAT(tokenize({}, &tokens), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("empty")));
  EXPECT_THAT(tokenize({"a"}, &tokens, "other"), StatusIs(absl::StatusCode::kNotFound, HasSubstr("other")));
  EXPECT_THAT(tokenize({text, "a"}, &tokens),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("--max_document_bytes")));
  EXPECT_EQ(tokens.size(), 0);

  // One place each until the client is gone.
  std::vector<std::unique_ptr<grpc::ClientContext>> contexts;
  std::vector<std::unique_ptr<grpc::ClientReaderWriter<v1::TokenizeDocumentRequest, v1::TokenizeDocumentResponse>>>
      streams;
  for (int i = 0; i < GenerationService::kMaxDocuments; ++i) {
    contexts.push_back(std::make_unique<grpc::ClientContext>());
    streams.push_back(generation_->TokenizeDocument(contexts.back().get()));
    streams.back()->Write(v1::TokenizeDocumentRequest());
  }
  ASSERT_TRUE(WaitUntil([&] { return absl::IsResourceExhausted(tokenize({"a"}, &tokens)); }));
  for (int i = 0; i < GenerationService::kMaxDocuments; ++i) {
    contexts[i]->TryCancel();
    EXPECT_THAT(common::FromGrpcStatus(streams[i]->Finish()), StatusIs(absl::StatusCode::kCancelled));
  }
  EXPECT_TRUE(WaitUntil([&] { return tokenize({"a"}, &tokens).ok(); }));
}

TEST_F(ServicesTest, DocumentsAreBoundedInNumberAndFreedWhenTheirClientsLeave) {
  StartServer(World());
  cluster_->pipeline().PauseSteps();
  std::vector<std::unique_ptr<grpc::ClientContext>> contexts;
  std::vector<std::unique_ptr<grpc::ClientReaderWriter<v1::ScoreDocumentRequest, v1::ScoreDocumentResponse>>> streams;
  v1::ScoreDocumentRequest document;
  document.set_text("text");
  const auto start = [&] {
    streams.push_back(generation_->ScoreDocument(contexts.emplace_back(std::make_unique<grpc::ClientContext>()).get()));
    streams.back()->Write(document);
  };
  for (int i = 0; i < GenerationService::kMaxDocuments; ++i) start();
  streams[0]->WritesDone();
  ASSERT_TRUE(WaitUntil([&] { return cluster_->pipeline().stats().slots_used == 1; }));
  start();
  const absl::Status refused = common::FromGrpcStatus(streams.back()->Finish());
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("documents")));
  EXPECT_TRUE(common::GetRetryDelay(refused).has_value());

  contexts[0]->TryCancel();  // Being scored.
  contexts[1]->TryCancel();  // Being read.
  for (int i = 0; i < 2; ++i) {
    EXPECT_THAT(common::FromGrpcStatus(streams[i]->Finish()), StatusIs(absl::StatusCode::kCancelled));
  }
  cluster_->pipeline().ResumeSteps();
  EXPECT_TRUE(WaitUntil([&] { return cluster_->pipeline().stats().slots_used == 0; }));
  EXPECT_TRUE(WaitUntil([&] {
    start();
    streams.back()->WritesDone();
    v1::ScoreDocumentResponse response;
    while (streams.back()->Read(&response)) {
    }
    return streams.back()->Finish().ok();
  }));
  for (int i = 2; i < GenerationService::kMaxDocuments; ++i) {
    streams[i]->WritesDone();
    v1::ScoreDocumentResponse response;
    while (streams[i]->Read(&response)) {
    }
    EXPECT_THAT(common::FromGrpcStatus(streams[i]->Finish()), IsOk());
  }
}

TEST_F(ServicesTest, SpecialTokensOfPlainTextAreText) {
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

TEST_F(ServicesTest, ListModelsNamesTheTokenizer) {
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

TEST_F(ServicesTest, SessionsBeginWithATunedStateThatIsServed) {
  constexpr char kPoet[] = "poet@12345678";
  FakePipeline::Options pipeline = World();
  pipeline.initial_states = {"judge@9abcdef0", kPoet};
  StartServer(pipeline);
  v1::ListModelsResponse models;
  ASSERT_THAT(Call(*generation_, &v1::Generation::Stub::ListModels, {}, &models), IsOk());
  EXPECT_THAT(models.models(0).initial_states(), ElementsAre("judge@9abcdef0", kPoet));

  v1::SessionsCreateRequest create;
  v1::SessionsCreateResponse created;
  create.set_session_id("s");
  create.set_initial_state("bard");
  EXPECT_THAT(
      Call(*sessions_, &v1::Sessions::Stub::Create, create, &created),
      StatusIs(absl::StatusCode::kNotFound, HasSubstr("\"bard\"; those it has: judge@9abcdef0, poet@12345678")));
  create.set_initial_state("poet");
  ASSERT_THAT(Call(*sessions_, &v1::Sessions::Stub::Create, create, &created), IsOk());
  EXPECT_EQ(created.session().initial_state(), kPoet);
  create.set_session_id("t");
  create.set_initial_state(kPoet);
  ASSERT_THAT(Call(*sessions_, &v1::Sessions::Stub::Create, create, &created), IsOk());

  // The state of an empty session is the tuned one; a turn, a rewind to nothing and forks go on from it.
  const uint64_t fresh = FakeModel::Fresh(kPoet);
  std::map<std::string, Tensor> tensors;
  ASSERT_THAT(Export("t", &tensors), IsOk());
  EXPECT_EQ(tensors.begin()->second.bytes, std::string(reinterpret_cast<const char*>(&fresh), sizeof(fresh)));
  EXPECT_THAT(Generate(SessionRequest("s", "r", kPrompt, 6)).tokens,
              ElementsAreArray(FakeModel::Greedy(kPrompt, 6, vocabulary_, kPoet)));
  for (uint64_t position : {0, 3}) {
    SCOPED_TRACE(position);
    v1::SessionsForkRequest fork;
    fork.set_session_id("s");
    fork.set_position(position);
    fork.set_new_session_id(absl::StrCat("fork-", position));
    v1::SessionsForkResponse forked;
    ASSERT_THAT(Call(*sessions_, &v1::Sessions::Stub::Fork, fork, &forked), IsOk());
    EXPECT_EQ(forked.session().initial_state(), kPoet);
    std::vector<uint32_t> log(kPrompt.begin(), kPrompt.begin() + position);
    log.push_back(9);
    EXPECT_THAT(Generate(SessionRequest(fork.new_session_id(), "r", {9}, 5)).tokens,
                ElementsAreArray(FakeModel::Greedy(log, 5, vocabulary_, kPoet)));
  }
  v1::SessionsRewindRequest rewind;
  rewind.set_session_id("s");
  v1::SessionsRewindResponse rewound;
  ASSERT_THAT(Call(*sessions_, &v1::Sessions::Stub::Rewind, rewind, &rewound), IsOk());
  EXPECT_EQ(rewound.session().initial_state(), kPoet);
  EXPECT_THAT(Generate(SessionRequest("s", "r2", {9}, 5)).tokens,
              ElementsAreArray(FakeModel::Greedy({9}, 5, vocabulary_, kPoet)));
}

TEST_F(ServicesTest, SessionsAreCreatedListedForkedRewoundAndDeleted) {
  StartServer(World());
  const std::string made = CreateSession();
  EXPECT_FALSE(made.empty());
  EXPECT_EQ(CreateSession("s"), "s");
  v1::SessionsCreateRequest create;
  create.set_session_id("s");
  v1::SessionsCreateResponse created;
  EXPECT_THAT(Call(*sessions_, &v1::Sessions::Stub::Create, create, &created),
              StatusIs(absl::StatusCode::kAlreadyExists));
  create.set_session_id("not allowed");
  EXPECT_THAT(Call(*sessions_, &v1::Sessions::Stub::Create, create, &created),
              StatusIs(absl::StatusCode::kInvalidArgument));
  const Result turn = Generate(SessionRequest("s", "r", kPrompt, 6));
  ASSERT_THAT(turn.status, IsOk());

  v1::SessionsGetRequest get;
  get.set_session_id("s");
  get.set_tokens_begin(2);
  get.set_tokens_count(100);
  v1::SessionsGetResponse got;
  ASSERT_THAT(Call(*sessions_, &v1::Sessions::Stub::Get, get, &got), IsOk());
  EXPECT_EQ(got.session().token_count(), 10);
  EXPECT_EQ(got.token_ids_size(), 8);
  EXPECT_FALSE(got.text().empty());
  get.set_tokens_begin(11);
  EXPECT_THAT(Call(*sessions_, &v1::Sessions::Stub::Get, get, &got), StatusIs(absl::StatusCode::kOutOfRange));
  get.set_session_id("nobody");
  EXPECT_THAT(Call(*sessions_, &v1::Sessions::Stub::Get, get, &got), StatusIs(absl::StatusCode::kNotFound));

  v1::SessionsForkRequest fork;
  fork.set_session_id("s");
  fork.set_position(7);
  fork.set_new_session_id("t");
  v1::SessionsForkResponse forked;
  ASSERT_THAT(Call(*sessions_, &v1::Sessions::Stub::Fork, fork, &forked), IsOk());
  EXPECT_EQ(forked.session().token_count(), 7);
  fork.set_position(11);
  fork.set_new_session_id("u");
  EXPECT_THAT(Call(*sessions_, &v1::Sessions::Stub::Fork, fork, &forked), StatusIs(absl::StatusCode::kOutOfRange));
  // The fork goes its own way from there.
  std::vector<uint32_t> log = kPrompt;
  log.insert(log.end(), turn.tokens.begin(), turn.tokens.begin() + 3);
  log.push_back(9);
  EXPECT_THAT(Generate(SessionRequest("t", "r", {9}, 5)).tokens,
              ElementsAreArray(FakeModel::Greedy(log, 5, vocabulary_)));

  v1::SessionsRewindRequest rewind;
  rewind.set_session_id("s");
  rewind.set_position(4);
  v1::SessionsRewindResponse rewound;
  ASSERT_THAT(Call(*sessions_, &v1::Sessions::Stub::Rewind, rewind, &rewound), IsOk());
  EXPECT_EQ(rewound.session().token_count(), 4);

  v1::SessionsListRequest list;
  list.set_page_size(2);
  std::vector<std::string> ids;
  do {
    v1::SessionsListResponse page;
    ASSERT_THAT(Call(*sessions_, &v1::Sessions::Stub::List, list, &page), IsOk());
    for (const v1::Session& session : page.sessions()) ids.push_back(session.id());
    list.set_page_token(page.next_page_token());
  } while (!list.page_token().empty());
  EXPECT_THAT(ids, ::testing::UnorderedElementsAre(made, "s", "t"));
  list.set_page_size(1001);
  v1::SessionsListResponse page;
  EXPECT_THAT(Call(*sessions_, &v1::Sessions::Stub::List, list, &page), StatusIs(absl::StatusCode::kInvalidArgument));

  v1::SessionsDeleteRequest erase;
  erase.set_session_id("s");
  v1::SessionsDeleteResponse erased;
  ASSERT_THAT(Call(*sessions_, &v1::Sessions::Stub::Delete, erase, &erased), IsOk());
  EXPECT_THAT(Call(*sessions_, &v1::Sessions::Stub::Delete, erase, &erased), StatusIs(absl::StatusCode::kNotFound));
}

TEST_F(ServicesTest, ExportStateNamesTensorsAsCheckpointsDo) {
  StartServer();
  CreateSession("s");
  const Result turn = Generate(SessionRequest("s", "r", kPrompt, 6));
  ASSERT_THAT(turn.status, IsOk());
  std::map<std::string, Tensor> tensors;
  ASSERT_THAT(Export("s", &tensors), IsOk());
  std::vector<uint32_t> log = kPrompt;
  log.insert(log.end(), turn.tokens.begin(), turn.tokens.end());
  const uint64_t state = FakeModel::Feed(FakeModel::Fresh(), log);
  ASSERT_EQ(tensors.size(), 4);
  for (int layer = 0; layer < 4; ++layer) {
    const Tensor& tensor = tensors[absl::StrCat("blocks.", layer, ".att.state")];
    EXPECT_EQ(tensor.position, 10);
    EXPECT_THAT(tensor.shape, ElementsAre(2));
    EXPECT_EQ(tensor.bytes, std::string(reinterpret_cast<const char*>(&state), sizeof(state)));
  }

  // Of an empty session: the initial state.
  CreateSession("empty");
  tensors.clear();
  ASSERT_THAT(Export("empty", &tensors), IsOk());
  EXPECT_EQ(tensors.size(), 4);
  EXPECT_EQ(tensors.begin()->second.position, 0);
  EXPECT_THAT(Export("nobody", &tensors), StatusIs(absl::StatusCode::kNotFound));
  EXPECT_THAT(Export("not allowed", &tensors), StatusIs(absl::StatusCode::kInvalidArgument));
}

TEST_F(ServicesTest, StatusNamesEveryProcess) {
  StartServer();
  v1::GetStatusResponse status;
  ASSERT_THAT(Call(*cluster_stub_, &v1::Cluster::Stub::GetStatus, v1::GetStatusRequest(), &status), IsOk());
  ASSERT_EQ(status.processes_size(), 4);
  EXPECT_EQ(status.processes(0).role(), "router");
  EXPECT_EQ(status.processes(0).address(), "router:1");
  EXPECT_EQ(status.processes(0).health(), "serving");
  EXPECT_EQ(status.processes(1).role(), "worker");
  EXPECT_EQ(status.processes(1).first_layer(), 0);
  EXPECT_EQ(status.processes(1).end_layer(), 2);
  EXPECT_EQ(status.processes(2).stage_index(), 1);
  EXPECT_EQ(status.processes(2).end_layer(), 4);
  EXPECT_EQ(status.processes(3).role(), "state_store");
  EXPECT_EQ(status.processes(3).health(), "serving");
  EXPECT_EQ(status.pipeline_state(), "serving");
  EXPECT_EQ(status.model().name(), "fake");

  cluster_->pipeline().Kill(1);
  ASSERT_TRUE(WaitUntil([this] { return !cluster_->router().pipeline().state().serving; }));
  cluster_->store().FailWith(absl::UnavailableError("away"));
  status.Clear();
  ASSERT_THAT(Call(*cluster_stub_, &v1::Cluster::Stub::GetStatus, v1::GetStatusRequest(), &status), IsOk());
  EXPECT_EQ(status.processes(0).health(), "not serving");
  EXPECT_EQ(status.processes(2).health(), "unreachable");
  EXPECT_EQ(status.processes(3).health(), "unreachable");
  EXPECT_THAT(status.pipeline_state(), HasSubstr("connecting: "));
  cluster_->store().FailWith(absl::OkStatus());
}

}  // namespace
}  // namespace rwkv::router
