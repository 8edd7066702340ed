#include "services/router/rpc/document_calls.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "services/common/grpc_status.h"
#include "services/router/rpc/pending_call.h"
#include "services/router/rpc/stream_reactor.h"
#include "services/router/turns/serving_model.h"
#include "services/router/turns/turn_input.h"

namespace rwkv::router {
namespace {

absl::Status TooManyCalls() {
  return common::WithRetryInfo(absl::ResourceExhaustedError("too many calls wait"), absl::Seconds(1));
}

// Adds a piece to what has come. Both kinds of request have text; only one has token ids.
void Append(const v1::ScoreDocumentRequest& piece, Document* document) {
  document->token_ids.insert(document->token_ids.end(), piece.token_ids().begin(), piece.token_ids().end());
  document->text += piece.text();
}
void Append(const v1::TokenizeDocumentRequest& piece, Document* document) { document->text += piece.text(); }

// A document as it comes.
template <typename Piece>
class Reading {
 public:
  Reading(const DocumentCalls& calls, std::function<void(const absl::Status&)> on_late)
      : limits_(calls.turns->limits()), upload_(calls.shares, calls.limits, std::move(on_late)) {}

  Upload& upload() { return upload_; }
  Piece* piece() { return &piece_; }
  Document& document() { return document_; }
  // Whether the piece that came is the first.
  bool IsFirst() { return std::exchange(first_, false); }

  absl::Status Take() {
    const int64_t before = document_.Bytes();
    Append(piece_, &document_);
    if (document_.Bytes() > limits_.max_document_bytes) return DocumentTooLarge(limits_);
    return document_.Bytes() > before ? upload_.Keep(document_.Bytes() - before) : absl::OkStatus();
  }

 private:
  const InputLimits& limits_;
  Upload upload_;
  Piece piece_;
  Document document_;
  bool first_ = true;
};

// The turn manager writes and closes.
class ScoreDocumentReactor final
    : public StreamReactor<v1::ScoreDocumentResponse, v1::ScoreDocumentResponse,
                           grpc::ServerBidiReactor<v1::ScoreDocumentRequest, v1::ScoreDocumentResponse>> {
 public:
  explicit ScoreDocumentReactor(const DocumentCalls& calls)
      : ScoreDocumentReactor(calls, std::make_shared<PendingCall>(calls.turns)) {}

  void OnReadDone(bool ok) override {
    if (!reading_.upload().PieceCame()) return;
    if (!ok) return Score();
    if (reading_.IsFirst()) {
      reading_.document().model = reading_.piece()->model();
      reading_.document().initial_state = reading_.piece()->initial_state();
    }
    if (const absl::Status taken = reading_.Take(); !taken.ok()) return stream()->Close(taken);
    ReadNext();
  }

 private:
  ScoreDocumentReactor(const DocumentCalls& calls, std::shared_ptr<PendingCall> call)
      : StreamReactor([](const v1::ScoreDocumentResponse& response) { return response; }, [call] { call->Cancel(); }),
        calls_(calls),
        call_(std::move(call)),
        reading_(calls, [stream = stream()](const absl::Status& late) { stream->Close(late); }) {
    ReadNext();
  }

  void ReadNext() {
    if (const absl::Status late = reading_.upload().ExpectPiece(); !late.ok()) return stream()->Close(late);
    StartRead(reading_.piece());
  }

  void Score() {
    if (const absl::Status begun = reading_.upload().BeginWork(); !begun.ok()) return stream()->Close(begun);
    auto document = std::make_shared<const Document>(std::move(reading_.document()));
    const auto score = [call = call_, document, stream = stream()] {
      call->turns().ScoreDocument(call->id(), *document, stream);
      call->HandedOver();
    };
    if (calls_.executor->TryRun(score)) return;
    stream()->Close(TooManyCalls());
  }

  const DocumentCalls calls_;
  const std::shared_ptr<PendingCall> call_;
  Reading<v1::ScoreDocumentRequest> reading_;
};

// Writes the tokens itself, a message at a time.
class TokenizeDocumentReactor final
    : public grpc::ServerBidiReactor<v1::TokenizeDocumentRequest, v1::TokenizeDocumentResponse> {
 public:
  explicit TokenizeDocumentReactor(const DocumentCalls& calls)
      : calls_(calls), reading_(calls, [this](const absl::Status& late) { End(late); }) {
    ReadNext();
  }

  void OnReadDone(bool ok) override {
    if (!reading_.upload().PieceCame()) return;
    if (!ok) {  // All of it is here. The reactor lives until Finish, which only what runs next can call.
      if (const absl::Status begun = reading_.upload().BeginWork(); !begun.ok()) return End(begun);
      if (!calls_.executor->TryRun([this] { Tokenize(); })) End(TooManyCalls());
      return;
    }
    if (reading_.IsFirst()) reading_.document().model = reading_.piece()->model();
    if (const absl::Status taken = reading_.Take(); !taken.ok()) return End(taken);
    ReadNext();
  }

  void OnWriteDone(bool ok) override {
    if (!ok || sent_ == tokens_.size()) return End(absl::OkStatus());  // Not ok: nobody is there to be told.
    WriteNext();
  }

  void OnDone() override { delete this; }

 private:
  static constexpr size_t kTokensPerMessage = 1 << 16;

  void End(const absl::Status& status) { Finish(common::ToGrpcStatus(status)); }

  void ReadNext() {
    if (const absl::Status late = reading_.upload().ExpectPiece(); !late.ok()) return End(late);
    StartRead(reading_.piece());
  }

  void Tokenize() {
    const absl::StatusOr<std::shared_ptr<const ServingModel>> model =
        calls_.turns->ModelOrWhyNot(reading_.document().model);
    if (!model.ok()) return End(model.status());
    absl::StatusOr<std::vector<uint32_t>> tokens =
        MakeDocumentTokens(reading_.document(), **model, calls_.turns->limits());
    if (!tokens.ok()) return End(tokens.status());
    reading_.document() = Document();
    tokens_ = *std::move(tokens);
    WriteNext();
  }

  void WriteNext() {
    const size_t end = std::min(tokens_.size(), sent_ + kTokensPerMessage);
    response_.mutable_token_ids()->Assign(tokens_.begin() + sent_, tokens_.begin() + end);
    sent_ = end;
    StartWrite(&response_);
  }

  const DocumentCalls calls_;
  Reading<v1::TokenizeDocumentRequest> reading_;
  std::vector<uint32_t> tokens_;
  size_t sent_ = 0;
  v1::TokenizeDocumentResponse response_;
};

}  // namespace

grpc::ServerBidiReactor<v1::ScoreDocumentRequest, v1::ScoreDocumentResponse>* NewScoreDocumentCall(
    const DocumentCalls& calls) {
  return new ScoreDocumentReactor(calls);
}

grpc::ServerBidiReactor<v1::TokenizeDocumentRequest, v1::TokenizeDocumentResponse>* NewTokenizeDocumentCall(
    const DocumentCalls& calls) {
  return new TokenizeDocumentReactor(calls);
}

}  // namespace rwkv::router
