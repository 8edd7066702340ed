#include "services/router/rpc/generation_service.h"

#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/slice.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "kernels/base/status_macros.h"
#include "rwkv/v1/turn_spec.pb.h"
#include "services/common/grpc_status.h"
#include "services/router/rpc/stream_reactor.h"
#include "services/router/turns/executor.h"
#include "services/router/turns/serving_model.h"
#include "services/router/turns/turn_input.h"

namespace rwkv::router {
namespace {

grpc::ByteBuffer ToBytes(const google::protobuf::MessageLite& message) {
  const grpc::Slice slice(message.SerializeAsString());
  return grpc::ByteBuffer(&slice, 1);
}

// `Text` is the message with the same text field as bytes; see turn_spec.proto.
template <typename Request, typename Text>
absl::StatusOr<Request> Parse(const grpc::ByteBuffer& bytes) {
  grpc::Slice slice;
  if (!bytes.DumpToSingleSlice(&slice).ok()) return absl::InternalError("the message cannot be read");
  Request request;
  if (request.ParseFromArray(slice.begin(), static_cast<int>(slice.size()))) return request;
  Text text;
  (void)text.ParseFromArray(slice.begin(), static_cast<int>(slice.size()));
  return UnparsableRequest(Request::descriptor()->name(), text.text());
}

absl::Status NoTokenizer(const ServingModel& model) {
  return absl::FailedPreconditionError(absl::StrCat("the model \"", model.info.name(), "\" (", model.info.vocab_size(),
                                                    " ids) has no known tokenizer: ", model.no_tokenizer));
}

// A unary call that the turn manager answers, and that can be cancelled until then.
template <typename Response>
class UnaryReactor final : public grpc::ServerUnaryReactor {
 public:
  UnaryReactor(TurnManager* turns, CallId call, grpc::ByteBuffer* response)
      : turns_(turns), call_(call), response_(response) {}

  void Done(const absl::StatusOr<Response>& result) {
    if (result.ok()) *response_ = ToBytes(*result);
    Finish(common::ToGrpcStatus(result.status()));
  }
  void OnCancel() override { turns_->Cancel(call_); }
  void OnDone() override { delete this; }

 private:
  TurnManager* const turns_;
  const CallId call_;
  grpc::ByteBuffer* const response_;
};

absl::Status TooManyDocuments() {
  return common::WithRetryInfo(absl::ResourceExhaustedError(absl::StrCat("already ", GenerationService::kMaxDocuments,
                                                                         " documents are in work")),
                               absl::Seconds(1));
}

absl::Status TooManyCalls() {
  return common::WithRetryInfo(absl::ResourceExhaustedError("too many calls wait"), absl::Seconds(1));
}

// Reads a document whole, then hands it over; the turn manager writes and closes. `documents` counts those that are
// there.
class DocumentReactor final
    : public StreamReactor<v1::ScoreDocumentResponse, v1::ScoreDocumentResponse,
                           grpc::ServerBidiReactor<v1::ScoreDocumentRequest, v1::ScoreDocumentResponse>> {
 public:
  DocumentReactor(TurnManager* turns, Executor* executor, std::atomic<int>* documents)
      : DocumentReactor(turns, executor, documents, std::make_shared<std::atomic<bool>>(false), turns->NewCall()) {}

  void OnReadDone(bool ok) override {
    if (!ok) return Score();
    if (first_) {
      document_.model = piece_.model();
      document_.initial_state = piece_.initial_state();
    }
    first_ = false;
    document_.token_ids.insert(document_.token_ids.end(), piece_.token_ids().begin(), piece_.token_ids().end());
    document_.text += piece_.text();
    if (document_.Bytes() > turns_->limits().max_document_bytes) {
      return stream()->Close(DocumentTooLarge(turns_->limits()));
    }
    StartRead(&piece_);
  }

  void OnDone() override {
    --*documents_;
    StreamReactor::OnDone();
  }

 private:
  DocumentReactor(TurnManager* turns, Executor* executor, std::atomic<int>* documents,
                  std::shared_ptr<std::atomic<bool>> gone, CallId call)
      : StreamReactor([](const v1::ScoreDocumentResponse& response) { return response; },
                      [turns, call, gone] {
                        *gone = true;
                        turns->Cancel(call);
                      }),
        turns_(turns),
        executor_(executor),
        documents_(documents),
        gone_(std::move(gone)),
        call_(call) {
    if (++*documents_ > GenerationService::kMaxDocuments) {
      stream()->Close(TooManyDocuments());
      return;
    }
    StartRead(&piece_);
  }

  void Score() {
    auto document = std::make_shared<const Document>(std::move(document_));
    const auto score = [turns = turns_, call = call_, gone = gone_, document, stream = stream()] {
      turns->ScoreDocument(call, *document, stream);
      if (*gone) turns->Cancel(call);  // The first Cancel() may have come before there was anything to cancel.
    };
    if (executor_->TryRun(score)) return;
    stream()->Close(TooManyCalls());
  }

  TurnManager* const turns_;
  Executor* const executor_;
  std::atomic<int>* const documents_;
  const std::shared_ptr<std::atomic<bool>> gone_;  // The client, that is.
  const CallId call_;
  v1::ScoreDocumentRequest piece_;
  Document document_;
  bool first_ = true;
};

// Reads a document whole, then writes its tokens, a message at a time. `documents` counts those that are there.
class TokenizeReactor final
    : public grpc::ServerBidiReactor<v1::TokenizeDocumentRequest, v1::TokenizeDocumentResponse> {
 public:
  TokenizeReactor(const TurnManager* turns, Executor* executor, std::atomic<int>* documents)
      : turns_(turns), executor_(executor), documents_(documents) {
    if (++*documents_ > GenerationService::kMaxDocuments) {
      End(TooManyDocuments());
    } else {
      StartRead(&piece_);
    }
  }

  void OnReadDone(bool ok) override {
    if (!ok) {  // All of it is here. The reactor lives until Finish, which only what runs next can call.
      if (!executor_->TryRun([this] { Tokenize(); })) End(TooManyCalls());
      return;
    }
    if (first_) document_.model = piece_.model();
    first_ = false;
    document_.text += piece_.text();
    if (document_.Bytes() > turns_->limits().max_document_bytes) return End(DocumentTooLarge(turns_->limits()));
    StartRead(&piece_);
  }

  void OnWriteDone(bool ok) override {
    if (!ok || sent_ == tokens_.size()) return End(absl::OkStatus());  // Not ok: nobody is there to be told.
    WriteNext();
  }

  void OnDone() override {
    --*documents_;
    delete this;
  }

 private:
  static constexpr size_t kTokensPerMessage = 1 << 16;

  void End(const absl::Status& status) { Finish(common::ToGrpcStatus(status)); }

  void Tokenize() {
    const absl::StatusOr<std::shared_ptr<const ServingModel>> model = turns_->ModelOrWhyNot();
    if (!model.ok()) return End(model.status());
    absl::StatusOr<std::vector<uint32_t>> tokens = MakeDocumentTokens(document_, **model, turns_->limits());
    if (!tokens.ok()) return End(tokens.status());
    document_ = Document();
    tokens_ = *std::move(tokens);
    WriteNext();
  }

  void WriteNext() {
    const size_t end = std::min(tokens_.size(), sent_ + kTokensPerMessage);
    response_.mutable_token_ids()->Assign(tokens_.begin() + sent_, tokens_.begin() + end);
    sent_ = end;
    StartWrite(&response_);
  }

  const TurnManager* const turns_;
  Executor* const executor_;
  std::atomic<int>* const documents_;
  v1::TokenizeDocumentRequest piece_;
  Document document_;
  bool first_ = true;
  std::vector<uint32_t> tokens_;
  size_t sent_ = 0;
  v1::TokenizeDocumentResponse response_;
};

}  // namespace

grpc::ServerWriteReactor<grpc::ByteBuffer>* GenerationService::Generate(grpc::CallbackServerContext* context,
                                                                        const grpc::ByteBuffer* bytes) {
  using Reactor = StreamReactor<v1::GenerateResponse, grpc::ByteBuffer>;
  const CallId call = turns_->NewCall();
  auto* const reactor = new Reactor([](const v1::GenerateResponse& response) { return ToBytes(response); },
                                    [turns = turns_, call] { turns->Cancel(call); });
  const absl::StatusOr<v1::GenerateRequest> request = Parse<v1::GenerateRequest, v1::GenerateRequestText>(*bytes);
  if (request.ok()) {
    turns_->Generate(call, *request, reactor->stream());
  } else {
    reactor->stream()->Close(request.status());
  }
  return reactor;
}

grpc::ServerUnaryReactor* GenerationService::Score(grpc::CallbackServerContext* context, const grpc::ByteBuffer* bytes,
                                                   grpc::ByteBuffer* response) {
  const CallId call = turns_->NewCall();
  auto* const reactor = new UnaryReactor<v1::ScoreResponse>(turns_, call, response);
  const absl::StatusOr<v1::ScoreRequest> request = Parse<v1::ScoreRequest, v1::ScoreRequestText>(*bytes);
  if (request.ok()) {
    turns_->Score(call, *request,
                  [reactor](const absl::StatusOr<v1::ScoreResponse>& result) { reactor->Done(result); });
  } else {
    reactor->Done(request.status());
  }
  return reactor;
}

grpc::ServerUnaryReactor* GenerationService::Embed(grpc::CallbackServerContext* context, const grpc::ByteBuffer* bytes,
                                                   grpc::ByteBuffer* response) {
  const CallId call = turns_->NewCall();
  auto* const reactor = new UnaryReactor<v1::EmbedResponse>(turns_, call, response);
  // Both have their text at the same place.
  const absl::StatusOr<v1::EmbedRequest> request = Parse<v1::EmbedRequest, v1::ScoreRequestText>(*bytes);
  if (request.ok()) {
    turns_->Embed(call, *request,
                  [reactor](const absl::StatusOr<v1::EmbedResponse>& result) { reactor->Done(result); });
  } else {
    reactor->Done(request.status());
  }
  return reactor;
}

grpc::ServerBidiReactor<v1::ScoreDocumentRequest, v1::ScoreDocumentResponse>* GenerationService::ScoreDocument(
    grpc::CallbackServerContext* context) {
  return new DocumentReactor(turns_, executor_, &documents_);
}

grpc::ServerWriteReactor<v1::LogitsResponse>* GenerationService::Logits(grpc::CallbackServerContext* context,
                                                                        const v1::LogitsRequest* request) {
  using Reactor = StreamReactor<v1::LogitsResponse, v1::LogitsResponse>;
  const CallId call = turns_->NewCall();
  auto* const reactor = new Reactor([](const v1::LogitsResponse& response) { return response; },
                                    [turns = turns_, call] { turns->Cancel(call); });
  turns_->Logits(call, *request, reactor->stream());
  return reactor;
}

absl::Status GenerationService::TokenizeNow(const v1::TokenizeRequest& request, v1::TokenizeResponse* response) const {
  RWKV_ASSIGN_OR_RETURN(const std::shared_ptr<const ServingModel> model, turns_->ModelOrWhyNot());
  RWKV_RETURN_IF_ERROR(CheckModel(request.model(), *model));
  if (model->tokenizer == nullptr) return NoTokenizer(*model);
  if (request.data().size() > kMaxTextBytes) {
    return common::InvalidFieldError("data", absl::StrCat(request.data().size(), " bytes; at most ", kMaxTextBytes));
  }
  const std::vector<uint32_t> ids =
      request.plain_text() ? model->tokenizer->EncodePlain(request.data()) : model->tokenizer->Encode(request.data());
  response->mutable_token_ids()->Add(ids.begin(), ids.end());
  return absl::OkStatus();
}

grpc::ServerUnaryReactor* GenerationService::Tokenize(grpc::CallbackServerContext* context,
                                                      const v1::TokenizeRequest* request,
                                                      v1::TokenizeResponse* response) {
  auto* const reactor = context->DefaultReactor();
  reactor->Finish(common::ToGrpcStatus(TokenizeNow(*request, response)));
  return reactor;
}

grpc::ServerBidiReactor<v1::TokenizeDocumentRequest, v1::TokenizeDocumentResponse>* GenerationService::TokenizeDocument(
    grpc::CallbackServerContext* context) {
  return new TokenizeReactor(turns_, executor_, &documents_);
}

absl::Status GenerationService::DetokenizeNow(const v1::DetokenizeRequest& request,
                                              v1::DetokenizeResponse* response) const {
  RWKV_ASSIGN_OR_RETURN(const std::shared_ptr<const ServingModel> model, turns_->ModelOrWhyNot());
  RWKV_RETURN_IF_ERROR(CheckModel(request.model(), *model));
  if (model->tokenizer == nullptr) return NoTokenizer(*model);
  if (request.token_ids_size() > kMaxTokenIds) {
    return common::InvalidFieldError("token_ids",
                                     absl::StrCat(request.token_ids_size(), " ids; at most ", kMaxTokenIds));
  }
  for (int i = 0; i < request.token_ids_size(); ++i) {
    if (request.token_ids(i) >= static_cast<uint32_t>(model->info.vocab_size())) {
      return common::InvalidFieldError(
          absl::StrCat("token_ids[", i, "]"),
          absl::StrCat("token id ", request.token_ids(i), " is not below the model's vocabulary of ",
                       model->info.vocab_size()));
    }
    response->mutable_data()->append(model->tokenizer->TokenBytes(request.token_ids(i)).data(),
                                     model->tokenizer->TokenBytes(request.token_ids(i)).size());
    if (response->data().size() > kMaxTextBytes) {
      response->clear_data();
      return common::InvalidFieldError("token_ids", absl::StrCat("stand for more than ", kMaxTextBytes, " bytes"));
    }
  }
  return absl::OkStatus();
}

grpc::ServerUnaryReactor* GenerationService::Detokenize(grpc::CallbackServerContext* context,
                                                        const v1::DetokenizeRequest* request,
                                                        v1::DetokenizeResponse* response) {
  auto* const reactor = context->DefaultReactor();
  reactor->Finish(common::ToGrpcStatus(DetokenizeNow(*request, response)));
  return reactor;
}

grpc::ServerUnaryReactor* GenerationService::ListModels(grpc::CallbackServerContext* context,
                                                        const v1::ListModelsRequest* request,
                                                        v1::ListModelsResponse* response) {
  if (const std::shared_ptr<const ServingModel> model = turns_->model()) *response->add_models() = model->info;
  auto* const reactor = context->DefaultReactor();
  reactor->Finish(grpc::Status::OK);
  return reactor;
}

}  // namespace rwkv::router
