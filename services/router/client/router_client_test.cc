#include "services/router/client/router_client.h"

#include <algorithm>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "grpcpp/server.h"
#include "grpcpp/server_builder.h"
#include "gtest/gtest.h"
#include "rwkv/v1/cluster.grpc.pb.h"
#include "rwkv/v1/generation.grpc.pb.h"
#include "rwkv/v1/sessions.grpc.pb.h"
#include "services/common/channel.h"
#include "services/common/grpc_status.h"
#include "services/router/client/cancellation.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using ::rwkv::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

// What one Generate call does.
struct Script {
  std::vector<uint64_t> indices;
  bool finish = false;  // Then the last message, whose index follows.
  absl::Status status;
  bool hang = false;  // Before the status: until the client leaves.
};

class ScriptedGeneration : public v1::Generation::Service {
 public:
  grpc::Status Generate(grpc::ServerContext* context, const v1::GenerateRequest* request,
                        grpc::ServerWriter<v1::GenerateResponse>* writer) override {
    Script script;
    {
      absl::MutexLock lock(&mutex_);
      requests_.push_back(*request);
      if (!scripts_.empty()) {
        script = scripts_.front();
        scripts_.erase(scripts_.begin());
      } else {
        script.status = absl::UnavailableError("no script is left");
      }
    }
    v1::GenerateResponse response;
    for (uint64_t index : script.indices) {
      response.set_index(index);
      response.set_token_id(static_cast<uint32_t>(100 + index));
      writer->Write(response);
    }
    if (script.finish) {
      v1::GenerateResponse last;
      last.set_index(script.indices.empty() ? request->resume_from() : script.indices.back() + 1);
      last.mutable_finish()->set_reason(v1::FINISH_REASON_LENGTH);
      writer->Write(last);
    }
    if (script.hang) {
      const absl::Time limit = absl::Now() + absl::Seconds(20);
      while (!context->IsCancelled() && absl::Now() < limit) absl::SleepFor(absl::Milliseconds(1));
      if (context->IsCancelled() && !left_.HasBeenNotified()) left_.Notify();
    }
    return common::ToGrpcStatus(script.status);
  }

  grpc::Status Tokenize(grpc::ServerContext* context, const v1::TokenizeRequest* request,
                        v1::TokenizeResponse* response) override {
    if (request->data() == "hang") {
      const absl::Time limit = absl::Now() + absl::Seconds(20);
      while (!context->IsCancelled() && absl::Now() < limit) absl::SleepFor(absl::Milliseconds(1));
    }
    for (char c : request->data()) response->add_token_ids(static_cast<unsigned char>(c));
    return grpc::Status::OK;
  }

  // Every token has logprob -1. Says nothing of the last one if a piece of text is "!".
  grpc::Status ScoreDocument(
      grpc::ServerContext*,
      grpc::ServerReaderWriter<v1::ScoreDocumentResponse, v1::ScoreDocumentRequest>* stream) override {
    constexpr size_t kTokensPerMessage = 10000;
    std::vector<uint32_t> tokens;
    bool first = true;
    bool short_answer = false;
    v1::ScoreDocumentRequest piece;
    while (stream->Read(&piece)) {
      if (first && piece.model() != "m") return common::ToGrpcStatus(absl::NotFoundError(piece.model()));
      tokens.insert(tokens.end(), piece.token_ids().begin(), piece.token_ids().end());
      for (const char c : piece.text()) tokens.push_back(static_cast<unsigned char>(c));
      if (piece.text() == "!") short_answer = true;
      first = false;
    }
    v1::ScoreDocumentResponse response;
    const size_t end = tokens.size() - short_answer;
    for (size_t next = 1; next < end;) {
      response.Clear();
      response.set_token_count(tokens.size());
      response.set_first(next);
      for (const size_t begin = next; next < std::min(end, begin + kTokensPerMessage); ++next) {
        response.add_token_ids(tokens[next]);
        response.add_logprobs(-1);
      }
      stream->Write(response);
    }
    return grpc::Status::OK;
  }

  // The bytes.
  grpc::Status TokenizeDocument(
      grpc::ServerContext*,
      grpc::ServerReaderWriter<v1::TokenizeDocumentResponse, v1::TokenizeDocumentRequest>* stream) override {
    std::string text;
    v1::TokenizeDocumentRequest piece;
    while (stream->Read(&piece)) text += piece.text();
    if (text == "!") return common::ToGrpcStatus(absl::FailedPreconditionError("no tokenizer"));
    v1::TokenizeDocumentResponse response;
    for (const char c : text) {
      response.add_token_ids(static_cast<unsigned char>(c));
      if (response.token_ids_size() < (1 << 20)) continue;
      stream->Write(response);
      response.Clear();
    }
    stream->Write(response);
    return grpc::Status::OK;
  }

  grpc::Status Logits(grpc::ServerContext*, const v1::LogitsRequest* request,
                      grpc::ServerWriter<v1::LogitsResponse>* writer) override {
    for (int row = 0; row < request->tokens().ids_size(); ++row) {
      v1::LogitsResponse response;
      response.set_first_row(row);
      if (!writer->Write(response)) break;
    }
    return grpc::Status::OK;
  }

  void Expect(std::vector<Script> scripts) {
    absl::MutexLock lock(&mutex_);
    scripts_ = std::move(scripts);
  }
  std::vector<v1::GenerateRequest> requests() const {
    absl::MutexLock lock(&mutex_);
    return requests_;
  }
  absl::Notification& left() { return left_; }  // The client left a call that hung.

 private:
  mutable absl::Mutex mutex_;
  std::vector<Script> scripts_ ABSL_GUARDED_BY(mutex_);
  std::vector<v1::GenerateRequest> requests_ ABSL_GUARDED_BY(mutex_);
  absl::Notification left_;
};

// Answers with what it was asked.
class EchoSessions : public v1::Sessions::Service {
 public:
  grpc::Status Create(grpc::ServerContext*, const v1::SessionsCreateRequest* request,
                      v1::SessionsCreateResponse* response) override {
    response->mutable_session()->set_id(request->session_id());
    return grpc::Status::OK;
  }
  grpc::Status Get(grpc::ServerContext*, const v1::SessionsGetRequest* request, v1::SessionsGetResponse*) override {
    return common::ToGrpcStatus(absl::NotFoundError(absl::StrCat("no session ", request->session_id())));
  }
  grpc::Status Fork(grpc::ServerContext*, const v1::SessionsForkRequest* request,
                    v1::SessionsForkResponse* response) override {
    response->mutable_session()->set_id(request->new_session_id());
    response->mutable_session()->set_forked_from(request->session_id());
    response->mutable_session()->set_fork_position(request->position());
    return grpc::Status::OK;
  }
  grpc::Status Rewind(grpc::ServerContext*, const v1::SessionsRewindRequest* request,
                      v1::SessionsRewindResponse* response) override {
    response->mutable_session()->set_token_count(request->position());
    return grpc::Status::OK;
  }
  grpc::Status Delete(grpc::ServerContext*, const v1::SessionsDeleteRequest*, v1::SessionsDeleteResponse*) override {
    return common::ToGrpcStatus(common::WithRetryInfo(absl::AbortedError("a turn is running"), absl::Milliseconds(70)));
  }
  grpc::Status ExportState(grpc::ServerContext*, const v1::SessionsExportStateRequest*,
                           grpc::ServerWriter<v1::SessionsExportStateResponse>* writer) override {
    for (const char* tensor : {"a", "b"}) {
      v1::SessionsExportStateResponse response;
      response.set_tensor(tensor);
      writer->Write(response);
    }
    return grpc::Status::OK;
  }
};

class FixedCluster : public v1::Cluster::Service {
 public:
  grpc::Status GetStatus(grpc::ServerContext*, const v1::GetStatusRequest*, v1::GetStatusResponse* response) override {
    response->set_pipeline_state("serving");
    return grpc::Status::OK;
  }
};

class RouterClientTest : public ::testing::Test {
 protected:
  RouterClientTest() {
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(&generation_);
    builder.RegisterService(&sessions_);
    builder.RegisterService(&cluster_);
    server_ = builder.BuildAndStart();
    address_ = absl::StrCat("127.0.0.1:", port);
    options_.first_pause = absl::Milliseconds(1);
    options_.last_pause = absl::Milliseconds(4);
  }
  ~RouterClientTest() override { server_->Shutdown(std::chrono::system_clock::now()); }

  std::unique_ptr<RouterClient> Client() const { return MakeRouterClient(common::MakeChannel(address_), options_); }

  static v1::GenerateRequest Resumable() {
    v1::GenerateRequest request;
    request.set_session_id("s");
    request.set_request_id("r");
    request.set_text("Hi");
    return request;
  }

  // What the callback saw: indices, and -1 for the finish.
  absl::Status Generate(const v1::GenerateRequest& request, std::vector<int>& seen,
                        Cancellation* cancellation = nullptr) const {
    return Client()->Generate(
        request,
        [&](const v1::GenerateResponse& response) {
          seen.push_back(response.has_finish() ? -1 : static_cast<int>(response.index()));
          return absl::OkStatus();
        },
        cancellation);
  }

  ScriptedGeneration generation_;
  EchoSessions sessions_;
  FixedCluster cluster_;
  std::unique_ptr<grpc::Server> server_;
  std::string address_;
  RouterClientOptions options_;
};

const absl::Status kLost = absl::UnavailableError("the connection is lost");

TEST_F(RouterClientTest, EachIndexIsSeenOnceOverLostConnections) {
  generation_.Expect(
      {{{0, 1}, false, kLost}, {{}, false, kLost}, {{2, 3, 4}, false, kLost}, {{5}, true, absl::OkStatus()}});
  std::vector<int> seen;
  EXPECT_OK(Generate(Resumable(), seen));
  EXPECT_THAT(seen, ElementsAre(0, 1, 2, 3, 4, 5, -1));
  std::vector<uint64_t> resumed;
  for (const v1::GenerateRequest& request : generation_.requests()) {
    resumed.push_back(request.resume_from());
    EXPECT_EQ(request.text(), "Hi");
    EXPECT_EQ(request.request_id(), "r");
  }
  EXPECT_THAT(resumed, ElementsAre(0, 2, 2, 5));
}

TEST_F(RouterClientTest, StartsWhereTheCallerSays) {
  generation_.Expect({{{7}, false, kLost}, {{8}, true, absl::OkStatus()}});
  v1::GenerateRequest request = Resumable();
  request.set_resume_from(7);
  std::vector<int> seen;
  EXPECT_OK(Generate(request, seen));
  EXPECT_THAT(seen, ElementsAre(7, 8, -1));
}

TEST_F(RouterClientTest, TokensSentAgainAreSkipped) {
  generation_.Expect({{{0, 1}, false, kLost}, {{0, 1, 2}, true, absl::OkStatus()}});
  std::vector<int> seen;
  EXPECT_OK(Generate(Resumable(), seen));
  EXPECT_THAT(seen, ElementsAre(0, 1, 2, -1));
}

TEST_F(RouterClientTest, AConnectionLostAfterTheFinishLosesNothing) {
  generation_.Expect({{{0}, true, kLost}});
  std::vector<int> seen;
  EXPECT_OK(Generate(Resumable(), seen));
  EXPECT_THAT(seen, ElementsAre(0, -1));
}

TEST_F(RouterClientTest, AMissingTokenIsDataLoss) {
  generation_.Expect({{{0, 2}, true, absl::OkStatus()}});
  std::vector<int> seen;
  EXPECT_THAT(Generate(Resumable(), seen), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("index 2")));
  EXPECT_THAT(seen, ElementsAre(0));
}

TEST_F(RouterClientTest, AMissingFinishIsDataLoss) {
  generation_.Expect({{{0, 1}, false, absl::OkStatus()}});
  std::vector<int> seen;
  EXPECT_THAT(Generate(Resumable(), seen), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("last message")));
}

TEST_F(RouterClientTest, WithoutSessionOrRequestIdALostConnectionIsReturned) {
  for (const bool session : {false, true}) {
    generation_.Expect({{{0}, false, kLost}, {{1}, true, absl::OkStatus()}});
    v1::GenerateRequest request = Resumable();
    if (session) {
      request.clear_request_id();
    } else {
      request.clear_session_id();
    }
    std::vector<int> seen;
    EXPECT_THAT(Generate(request, seen), StatusIs(absl::StatusCode::kUnavailable));
    EXPECT_THAT(seen, ElementsAre(0));
  }
  EXPECT_EQ(generation_.requests().size(), 2);
}

TEST_F(RouterClientTest, AttemptsWithoutProgressAreBounded) {
  options_.max_resumes = 3;
  std::vector<int> seen;
  EXPECT_THAT(Generate(Resumable(), seen), StatusIs(absl::StatusCode::kUnavailable));
  EXPECT_EQ(generation_.requests().size(), 4);
}

TEST_F(RouterClientTest, ProgressGivesNewAttempts) {
  options_.max_resumes = 1;
  std::vector<Script> scripts;
  for (uint64_t index = 0; index < 10; ++index) scripts.push_back({{index}, index == 9, kLost});
  generation_.Expect(scripts);
  std::vector<int> seen;
  EXPECT_OK(Generate(Resumable(), seen));
  EXPECT_EQ(seen.size(), 11);
}

TEST_F(RouterClientTest, ItComesBackWhenTheServerSays) {
  constexpr absl::Duration kAsked = absl::Milliseconds(150);  // The client's own pauses are 1 and 2 ms.
  const absl::Status away = common::WithRetryInfo(kLost, kAsked);
  generation_.Expect({{{0}, false, away}, {{}, false, away}, {{1}, true, absl::OkStatus()}});
  std::vector<int> seen;
  const absl::Time begin = absl::Now();
  EXPECT_OK(Generate(Resumable(), seen));
  EXPECT_GE(absl::Now() - begin, 2 * kAsked);
  EXPECT_THAT(seen, ElementsAre(0, 1, -1));
}

TEST_F(RouterClientTest, OtherErrorsAreReturnedWithTheirDetails) {
  generation_.Expect({{{}, false, common::InvalidFieldError("sampling.top_p", "must be in (0, 1], not 2")}});
  std::vector<int> seen;
  const absl::Status status = Generate(Resumable(), seen);
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("not 2")));
  EXPECT_EQ(common::GetInvalidField(status), "sampling.top_p");
  EXPECT_EQ(generation_.requests().size(), 1);
}

TEST_F(RouterClientTest, AnErrorOfTheCallbackEndsTheCallOnTheServerToo) {
  generation_.Expect({{{0, 1}, false, absl::OkStatus(), /*hang=*/true}});
  EXPECT_THAT(
      Client()->Generate(Resumable(), [](const v1::GenerateResponse&) { return absl::OutOfRangeError("enough"); }),
      StatusIs(absl::StatusCode::kOutOfRange, HasSubstr("enough")));
  EXPECT_TRUE(generation_.left().WaitForNotificationWithTimeout(absl::Seconds(10)));
}

TEST_F(RouterClientTest, CancelEndsACallThatWaitsForATokenOnTheServerToo) {
  generation_.Expect({{{0}, false, absl::OkStatus(), /*hang=*/true}});
  Cancellation cancellation;
  absl::Notification first;
  std::thread canceller([&] {
    EXPECT_TRUE(first.WaitForNotificationWithTimeout(absl::Seconds(10))) << "no token";
    cancellation.Cancel();
  });
  const absl::Status status = Client()->Generate(
      Resumable(),
      [&](const v1::GenerateResponse&) {
        first.Notify();
        return absl::OkStatus();
      },
      &cancellation);
  canceller.join();
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kCancelled));
  EXPECT_TRUE(generation_.left().WaitForNotificationWithTimeout(absl::Seconds(10)));
  std::vector<int> seen;
  EXPECT_THAT(Generate(Resumable(), seen, &cancellation), StatusIs(absl::StatusCode::kCancelled));
}

TEST_F(RouterClientTest, CancelEndsAPauseBetweenAttempts) {
  options_.first_pause = options_.last_pause = absl::Hours(1);
  generation_.Expect({{{0}, false, kLost}});
  Cancellation cancellation;
  absl::Notification first;
  std::thread canceller([&] {
    EXPECT_TRUE(first.WaitForNotificationWithTimeout(absl::Seconds(10))) << "no token";
    cancellation.Cancel();
  });
  const absl::Status status = Client()->Generate(
      Resumable(),
      [&](const v1::GenerateResponse&) {
        first.Notify();
        return absl::OkStatus();
      },
      &cancellation);
  canceller.join();
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kCancelled));
}

TEST_F(RouterClientTest, StreamsAndCallsHaveDeadlines) {
  options_.stream_timeout = absl::Milliseconds(100);
  options_.call_timeout = absl::Milliseconds(100);
  generation_.Expect({{{0}, false, absl::OkStatus(), /*hang=*/true}});
  std::vector<int> seen;
  EXPECT_THAT(Generate(Resumable(), seen), StatusIs(absl::StatusCode::kDeadlineExceeded));
  v1::TokenizeRequest request;
  request.set_data("hang");
  EXPECT_THAT(Client()->Tokenize(request), StatusIs(absl::StatusCode::kDeadlineExceeded));
}

TEST_F(RouterClientTest, AGenerateMayHaveADeadlineOfItsOwn) {
  generation_.Expect({{{0}, false, absl::OkStatus(), /*hang=*/true}});
  const auto ignore = [](const v1::GenerateResponse&) { return absl::OkStatus(); };
  EXPECT_THAT(Client()->Generate(Resumable(), ignore, nullptr, absl::Now() + absl::Milliseconds(100)),
              StatusIs(absl::StatusCode::kDeadlineExceeded));
}

TEST_F(RouterClientTest, AServerThatIsGoneIsUnavailable) {
  server_->Shutdown();
  EXPECT_THAT(Client()->GetStatus(), StatusIs(absl::StatusCode::kUnavailable));
}

TEST_F(RouterClientTest, CallsCarryTheirFieldsAndStatuses) {
  const std::unique_ptr<RouterClient> client = Client();
  v1::TokenizeRequest tokenize;
  tokenize.set_data(std::string("a\xFF", 2));
  ASSERT_OK_AND_ASSIGN(const v1::TokenizeResponse tokens, client->Tokenize(tokenize));
  EXPECT_THAT(tokens.token_ids(), ElementsAre('a', 0xFF));

  v1::SessionsCreateRequest create;
  create.set_session_id("new");
  ASSERT_OK_AND_ASSIGN(const v1::Session created, client->CreateSession(create));
  EXPECT_EQ(created.id(), "new");

  v1::SessionsGetRequest get;
  get.set_session_id("gone");
  EXPECT_THAT(client->GetSession(get), StatusIs(absl::StatusCode::kNotFound, HasSubstr("gone")));

  v1::SessionsForkRequest fork;
  fork.set_session_id("old");
  fork.set_position(3);
  fork.set_new_session_id("young");
  ASSERT_OK_AND_ASSIGN(const v1::Session forked, client->ForkSession(fork));
  EXPECT_EQ(forked.id(), "young");
  EXPECT_EQ(forked.fork_position(), 3);

  v1::SessionsRewindRequest rewind;
  rewind.set_position(5);
  ASSERT_OK_AND_ASSIGN(const v1::Session rewound, client->RewindSession(rewind));
  EXPECT_EQ(rewound.token_count(), 5);

  const absl::Status deleted = client->DeleteSession({});
  EXPECT_THAT(deleted, StatusIs(absl::StatusCode::kAborted));
  EXPECT_EQ(common::GetRetryDelay(deleted), absl::Milliseconds(70));

  ASSERT_OK_AND_ASSIGN(const v1::GetStatusResponse status, client->GetStatus());
  EXPECT_EQ(status.pipeline_state(), "serving");
  EXPECT_THAT(client->ListSessions({}), StatusIs(absl::StatusCode::kUnimplemented));
}

TEST_F(RouterClientTest, ADocumentGoesOutInPieces) {
  const std::unique_ptr<RouterClient> client = Client();
  v1::ScoreDocumentRequest document;
  document.set_model("m");
  for (uint32_t id = 0; id < 300000; ++id) document.add_token_ids(id);
  document.set_text(std::string((5 << 20) + 7, 'x'));  // More than a message may hold.
  std::vector<uint32_t> tokens;
  EXPECT_OK(client->ScoreDocument(document, [&](const v1::ScoreDocumentResponse& response) {
    tokens.insert(tokens.end(), response.token_ids().begin(), response.token_ids().end());
    return absl::OkStatus();
  }));
  ASSERT_EQ(tokens.size(), 300000 + document.text().size() - 1);
  for (uint32_t id = 1; id < 300000; ++id) ASSERT_EQ(tokens[id - 1], id);

  const auto ignore = [](const v1::ScoreDocumentResponse&) { return absl::OkStatus(); };
  document.Clear();
  document.set_model("m");
  document.set_text("!");
  document.add_token_ids(0);
  EXPECT_THAT(client->ScoreDocument(document, ignore), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("from 1 on")));
  document.add_token_ids(0);
  EXPECT_THAT(client->ScoreDocument(document, ignore), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("from 2 to 3")));
  EXPECT_THAT(client->ScoreDocument(document, [](const auto&) { return absl::UnavailableError("full"); }),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("full")));
  document.set_model("other");
  EXPECT_THAT(client->ScoreDocument(document, ignore), StatusIs(absl::StatusCode::kNotFound));
}

TEST_F(RouterClientTest, ATextIsTokenizedInPieces) {
  const std::unique_ptr<RouterClient> client = Client();
  std::string text((5 << 20) + 7, 'x');
  text.back() = 'y';
  ASSERT_OK_AND_ASSIGN(const std::vector<uint32_t> tokens, client->TokenizeDocument(text));
  EXPECT_EQ(std::string(tokens.begin(), tokens.end()), text);
  EXPECT_THAT(client->TokenizeDocument("!"), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("tokenizer")));
}

TEST_F(RouterClientTest, StreamsCallBackInOrderAndStopOnAnError) {
  const std::unique_ptr<RouterClient> client = Client();
  std::vector<std::string> tensors;
  EXPECT_OK(client->ExportState({}, [&](const v1::SessionsExportStateResponse& response) {
    tensors.push_back(response.tensor());
    return absl::OkStatus();
  }));
  EXPECT_THAT(tensors, ElementsAre("a", "b"));

  v1::LogitsRequest request;
  for (uint32_t id = 0; id < 1000; ++id) request.mutable_tokens()->add_ids(id);
  uint64_t rows = 0;
  EXPECT_THAT(client->Logits(request,
                             [&](const v1::LogitsResponse& response) {
                               EXPECT_EQ(response.first_row(), rows++);
                               return rows == 10 ? absl::DataLossError("disk full") : absl::OkStatus();
                             }),
              StatusIs(absl::StatusCode::kDataLoss));
  EXPECT_EQ(rows, 10);
}

}  // namespace
}  // namespace rwkv::router
