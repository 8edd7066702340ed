#include <grpcpp/grpcpp.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/generation.grpc.pb.h"
#include "rwkv/v1/generation.pb.h"
#include "services/common/grpc_status.h"
#include "services/router/driver/turn_manager.h"
#include "services/router/rpc/generation_service.h"
#include "services/router/rpc/services_fixture.h"
#include "services/router/testing/fake_cluster.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::ElementsAreArray;
using ::testing::HasSubstr;

using DocumentCallsTest = ServicesTest;

TEST_F(DocumentCallsTest, ADocumentComesInPieces) {
  TurnManager::Options options;
  options.limits.max_document_bytes = 5000;
  StartServer(World(), options);
  const auto score = [&](const std::vector<v1::ScoreDocumentRequest>& pieces, std::vector<uint32_t>* tokens) {
    grpc::ClientContext context;
    SetLimit(context);
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

TEST_F(DocumentCallsTest, ADocumentIsTokenizedAsOneText) {
  TurnManager::Options options;
  options.limits.max_document_bytes = 260'000;
  StartServer(World(), options);
  const auto tokenize = [&](const std::vector<std::string>& pieces, std::vector<uint32_t>* tokens,
                            const std::string& model = "") {
    grpc::ClientContext context;
    SetLimit(context);
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
}

// A client's side of an upload that goes on as the test says.
template <typename Request, typename Response>
struct ClientUpload {
  std::unique_ptr<grpc::ClientContext> context = std::make_unique<grpc::ClientContext>();
  std::unique_ptr<grpc::ClientReaderWriter<Request, Response>> stream;

  // Sends the rest and reads the answer.
  absl::Status End() {
    stream->WritesDone();
    return Wait();
  }
  absl::Status Wait() {
    Response response;
    while (stream->Read(&response)) {
    }
    return common::FromGrpcStatus(stream->Finish());
  }
};
using Scored = ClientUpload<v1::ScoreDocumentRequest, v1::ScoreDocumentResponse>;
using Tokenized = ClientUpload<v1::TokenizeDocumentRequest, v1::TokenizeDocumentResponse>;

// Begins uploads and sends `text` as the first piece of each; none at all if it is empty.
Scored BeginScore(v1::Generation::Stub& stub, const std::string& text) {
  Scored upload;
  upload.context->set_deadline(absl::ToChronoTime(absl::Now() + kTestLimit));
  upload.stream = stub.ScoreDocument(upload.context.get());
  v1::ScoreDocumentRequest piece;
  piece.set_text(text);
  if (!text.empty()) upload.stream->Write(piece);
  return upload;
}
Tokenized BeginTokenize(v1::Generation::Stub& stub, const std::string& text) {
  Tokenized upload;
  upload.context->set_deadline(absl::ToChronoTime(absl::Now() + kTestLimit));
  upload.stream = stub.TokenizeDocument(upload.context.get());
  v1::TokenizeDocumentRequest piece;
  piece.set_text(text);
  if (!text.empty()) upload.stream->Write(piece);
  return upload;
}

TEST_F(DocumentCallsTest, UploadsThatFallSilentKeepNobodyAway) {
  StartServer(World());
  std::vector<Scored> scored;
  std::vector<Tokenized> tokenized;
  for (int i = 0; i < 3 * GenerationService::kMaxDocuments; ++i) {
    scored.push_back(BeginScore(*generation_, i % 2 == 0 ? "" : "text"));
    tokenized.push_back(BeginTokenize(*generation_, i % 2 == 0 ? "" : "text"));
  }
  EXPECT_THAT(BeginScore(*generation_, "text").End(), IsOk());
  EXPECT_THAT(BeginTokenize(*generation_, "text").End(), IsOk());
  // They may still go on themselves.
  EXPECT_THAT(scored[1].End(), IsOk());
  EXPECT_THAT(tokenized[1].End(), IsOk());
  for (Scored& upload : scored) upload.context->TryCancel();
  for (Tokenized& upload : tokenized) upload.context->TryCancel();
  scored[0].Wait().IgnoreError();
  for (size_t i = 2; i < scored.size(); ++i) {
    EXPECT_THAT(scored[i].Wait(), StatusIs(absl::StatusCode::kCancelled));
    EXPECT_THAT(tokenized[i].Wait(), StatusIs(absl::StatusCode::kCancelled));
  }
}

TEST_F(DocumentCallsTest, TheNextPieceHasALimit) {
  upload_limits_.piece_timeout = absl::Milliseconds(50);
  StartServer(World());
  const auto is_late =
      StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("no piece of the document came for 50ms"));
  for (const std::string& text : {"", "text"}) {
    SCOPED_TRACE(text);
    EXPECT_THAT(BeginScore(*generation_, text).Wait(), is_late);
    EXPECT_THAT(BeginTokenize(*generation_, text).Wait(), is_late);
  }
  // What is all there is worked on for as long as it takes.
  cluster_->pipeline().PauseSteps();
  Scored slow = BeginScore(*generation_, "text");
  slow.stream->WritesDone();
  EXPECT_THAT(BeginTokenize(*generation_, "").Wait(), is_late);
  cluster_->pipeline().ResumeSteps();
  EXPECT_THAT(slow.Wait(), IsOk());
}

TEST_F(DocumentCallsTest, AllPiecesTogetherHaveALimit) {
  upload_limits_.timeout = absl::Milliseconds(100);
  StartServer(World());
  const auto is_late = StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("did not come within 100ms"));
  Scored scored = BeginScore(*generation_, "a");
  v1::ScoreDocumentRequest piece;
  piece.set_text("b");
  while (scored.stream->Write(piece)) {  // Until it is cut off.
  }
  EXPECT_THAT(scored.Wait(), is_late);
}

TEST_F(DocumentCallsTest, BytesOfAllUploadsTogetherAreBounded) {
  TurnManager::Options options;
  options.limits.max_document_bytes = 1000;
  StartServer(World(), options);
  // One too many: whichever comes last is refused.
  constexpr int kUploads = GenerationService::kMaxDocuments + 1;
  std::vector<Tokenized> uploads;
  std::vector<absl::Status> ends(kUploads);
  std::vector<std::thread> clients;
  std::atomic<int> ended{0};
  for (int i = 0; i < kUploads; ++i) uploads.push_back(BeginTokenize(*generation_, std::string(1000, 'x')));
  for (int i = 0; i < kUploads; ++i) {
    clients.emplace_back([&, i] {
      ends[i] = uploads[i].Wait();
      ++ended;
    });
  }
  EXPECT_TRUE(WaitUntil([&] { return ended == 1; }));
  EXPECT_THAT(BeginTokenize(*generation_, "a").Wait(),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("have 4000 bytes")));
  for (Tokenized& upload : uploads) upload.stream->WritesDone();
  for (std::thread& client : clients) client.join();
  int refused = 0;
  for (const absl::Status& end : ends) {
    if (end.ok()) continue;
    EXPECT_THAT(end, StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("4000 for all together")));
    EXPECT_TRUE(common::GetRetryDelay(end).has_value());
    ++refused;
  }
  EXPECT_EQ(refused, 1);
  EXPECT_TRUE(WaitUntil([&] { return BeginTokenize(*generation_, "a").End().ok(); }));
}

TEST_F(DocumentCallsTest, DocumentsInWorkAreBoundedAndFreedWhenTheirClientsLeave) {
  StartServer(World());
  cluster_->pipeline().PauseSteps();
  std::vector<Scored> uploads;
  for (int i = 0; i < GenerationService::kMaxDocuments; ++i) {
    uploads.push_back(BeginScore(*generation_, "text"));
    uploads.back().stream->WritesDone();
  }
  ASSERT_TRUE(WaitUntil([&] { return cluster_->router().counts().running == GenerationService::kMaxDocuments; }));
  const absl::Status refused = BeginScore(*generation_, "text").Wait();  // With its first piece.
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("documents are in work")));
  EXPECT_TRUE(common::GetRetryDelay(refused).has_value());
  EXPECT_THAT(BeginTokenize(*generation_, "text").Wait(), StatusIs(absl::StatusCode::kResourceExhausted));

  uploads[0].context->TryCancel();
  EXPECT_THAT(uploads[0].Wait(), StatusIs(absl::StatusCode::kCancelled));
  EXPECT_TRUE(WaitUntil([&] { return BeginTokenize(*generation_, "text").End().ok(); }));
  cluster_->pipeline().ResumeSteps();
  for (size_t i = 1; i < uploads.size(); ++i) EXPECT_THAT(uploads[i].Wait(), IsOk());
  EXPECT_TRUE(WaitUntil([&] { return cluster_->pipeline().stats().slots_used == 0; }));
}

}  // namespace
}  // namespace rwkv::router
