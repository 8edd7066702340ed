#include "services/router/rpc/document_calls.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "kernels/base/status_macros.h"
#include "services/common/grpc_status.h"
#include "services/router/core/serving_model.h"
#include "services/router/core/turn_input.h"
#include "services/router/rpc/pending_call.h"
#include "services/router/rpc/stream_reactor.h"

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

// Counts a document when all its answers have gone out; the end waits until that is on disk.
class MeteredDocument final : public ResponseStream<v1::ScoreDocumentResponse> {
 public:
  MeteredDocument(std::shared_ptr<ResponseStream<v1::ScoreDocumentResponse>> inner, Tenancy* tenancy,
                  std::shared_ptr<TenantBook::Ticket> ticket)
      : inner_(std::move(inner)), tenancy_(tenancy), ticket_(std::move(ticket)) {}

  void Send(v1::ScoreDocumentResponse response) override {
    if (ticket_ != nullptr) ticket_->Fed(response.token_count());
    inner_->Send(std::move(response));
  }
  size_t queued() const override { return inner_->queued(); }
  void OnRoom(std::function<void()> on_room) override { inner_->OnRoom(std::move(on_room)); }
  void Close(absl::Status status) override {
    if (ticket_ != nullptr && !status.ok()) ticket_->Refund();
    if (ticket_ == nullptr || !status.ok()) return inner_->Close(std::move(status));
    tenancy_->Record(ticket_, [inner = inner_, status] { inner->Close(status); });
  }

 private:
  const std::shared_ptr<ResponseStream<v1::ScoreDocumentResponse>> inner_;
  Tenancy* const tenancy_;
  const std::shared_ptr<TenantBook::Ticket> ticket_;
};

// The turn manager writes and closes.
class ScoreDocumentReactor final
    : public StreamReactor<v1::ScoreDocumentResponse, v1::ScoreDocumentResponse,
                           grpc::ServerBidiReactor<v1::ScoreDocumentRequest, v1::ScoreDocumentResponse>> {
 public:
  ScoreDocumentReactor(const DocumentCalls& calls, Tenancy* tenancy, const absl::StatusOr<Caller>& caller,
                       std::shared_ptr<TurnTrace> trace)
      : ScoreDocumentReactor(calls, tenancy, caller, std::move(trace), std::make_shared<PendingCall>(calls.turns)) {}

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
  ScoreDocumentReactor(const DocumentCalls& calls, Tenancy* tenancy, const absl::StatusOr<Caller>& caller,
                       std::shared_ptr<TurnTrace> trace, std::shared_ptr<PendingCall> call)
      : StreamReactor([](const v1::ScoreDocumentResponse& response) { return response; }, [call] { call->Cancel(); }),
        calls_(calls),
        tenancy_(tenancy),
        trace_(std::move(trace)),
        call_(std::move(call)),
        reading_(calls, [stream = stream()](const absl::Status& late) { stream->Close(late); }) {
    if (caller.ok()) {
      caller_ = *caller;
      ReadNext();
    } else {
      stream()->Close(caller.status());
    }
  }

  void ReadNext() {
    if (const absl::Status late = reading_.upload().ExpectPiece(); !late.ok()) return stream()->Close(late);
    StartRead(reading_.piece());
  }

  void Score() {
    if (const absl::Status begun = reading_.upload().BeginWork(); !begun.ok()) return stream()->Close(begun);
    auto document = std::make_shared<const Document>(std::move(reading_.document()));
    const absl::StatusOr<std::shared_ptr<TenantBook::Ticket>> ticket = Enter(*document);
    if (!ticket.ok()) return stream()->Close(ticket.status());
    const auto metered = std::make_shared<MeteredDocument>(stream(), tenancy_, *ticket);
    const auto score = [call = call_, document, metered, tenant = caller_.tenant(), trace = trace_] {
      call->turns().ScoreDocument(call->id(), *document, metered, tenant, trace);
      call->HandedOver();
    };
    if (calls_.executor->TryRun(score)) return;
    metered->Close(TooManyCalls());
  }

  absl::StatusOr<std::shared_ptr<TenantBook::Ticket>> Enter(const Document& document) const {
    if (caller_.has_models()) {
      RWKV_ASSIGN_OR_RETURN(const std::shared_ptr<const ServingModel> model,
                            calls_.turns->ModelOrWhyNot(document.model));
      RWKV_RETURN_IF_ERROR(caller_.CheckModel(model->info));
    }
    return caller_.Admit(static_cast<double>(document.token_ids.size() + document.text.size() / 4));
  }

  const DocumentCalls calls_;
  Tenancy* const tenancy_;
  Caller caller_;
  const std::shared_ptr<TurnTrace> trace_;
  const std::shared_ptr<PendingCall> call_;
  Reading<v1::ScoreDocumentRequest> reading_;
};

// Writes the tokens itself, a message at a time.
class TokenizeDocumentReactor final
    : public grpc::ServerBidiReactor<v1::TokenizeDocumentRequest, v1::TokenizeDocumentResponse> {
 public:
  TokenizeDocumentReactor(const DocumentCalls& calls, const absl::StatusOr<Caller>& caller)
      : calls_(calls), reading_(calls, [this](const absl::Status& late) { End(late); }) {
    if (caller.ok()) {
      caller_ = *caller;
      ReadNext();
    } else {
      End(caller.status());
    }
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
    if (const absl::Status may = caller_.CheckModel((*model)->info); !may.ok()) return End(may);
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
  Caller caller_;
  Reading<v1::TokenizeDocumentRequest> reading_;
  std::vector<uint32_t> tokens_;
  size_t sent_ = 0;
  v1::TokenizeDocumentResponse response_;
};

}  // namespace

grpc::ServerBidiReactor<v1::ScoreDocumentRequest, v1::ScoreDocumentResponse>* NewScoreDocumentCall(
    const DocumentCalls& calls, Tenancy* tenancy, const absl::StatusOr<Caller>& caller,
    std::shared_ptr<TurnTrace> trace) {
  return new ScoreDocumentReactor(calls, tenancy, caller, std::move(trace));
}

grpc::ServerBidiReactor<v1::TokenizeDocumentRequest, v1::TokenizeDocumentResponse>* NewTokenizeDocumentCall(
    const DocumentCalls& calls, const absl::StatusOr<Caller>& caller) {
  return new TokenizeDocumentReactor(calls, caller);
}

}  // namespace rwkv::router
