// A server that answers as its test says, and a client of it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "grpcpp/server.h"
#include "grpcpp/server_builder.h"
#include "gtest/gtest.h"
#include "rwkv/v1/cluster.grpc.pb.h"
#include "rwkv/v1/generation.grpc.pb.h"
#include "rwkv/v1/sessions.grpc.pb.h"
#include "services/common/channel.h"
#include "services/common/grpc_status.h"
#include "services/router/client/cancellation.h"
#include "services/router/client/router_client.h"
#include "services/state_store/client/crc32c.h"
#include "tests/testing/wait_until.h"

namespace rwkv::router {

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
      const bool cancelled = testing::WaitUntil([context] { return context->IsCancelled(); }, absl::Seconds(20));
      if (cancelled && !left_.HasBeenNotified()) left_.Notify();
    }
    return common::ToGrpcStatus(script.status);
  }

  grpc::Status Tokenize(grpc::ServerContext* context, const v1::TokenizeRequest* request,
                        v1::TokenizeResponse* response) override {
    if (request->data() == "hang") {
      (void)testing::WaitUntil([context] { return context->IsCancelled(); }, absl::Seconds(20));
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
  // A session as long as the file, unless the first bytes are "no".
  grpc::Status Import(grpc::ServerContext*, grpc::ServerReader<v1::SessionsImportRequest>* reader,
                      v1::SessionsImportResponse* response) override {
    v1::SessionsImportRequest piece;
    std::string file;
    absl::optional<uint32_t> crc32c;
    while (reader->Read(&piece)) {
      if (file.empty()) response->mutable_session()->set_id(piece.session_id());
      file += piece.data();
      if (piece.has_crc32c()) crc32c = piece.crc32c();
      if (file.substr(0, 2) == "no") return common::ToGrpcStatus(absl::InvalidArgumentError("no state file"));
    }
    if (crc32c != state_store::Crc32c(file)) return common::ToGrpcStatus(absl::DataLossError("another checksum"));
    response->mutable_session()->set_token_count(file.size());
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

}  // namespace rwkv::router
