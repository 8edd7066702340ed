#include "services/router/rpc/generation_service.h"

#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/slice.h>

#include <cstdint>
#include <functional>
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
#include "services/router/core/serving_model.h"
#include "services/router/core/turn_input.h"
#include "services/router/rpc/pending_call.h"
#include "services/router/rpc/stream_reactor.h"
#include "services/router/rpc/turn_spans.h"
#include "services/router/tenants/metered_stream.h"

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
  UnaryReactor(std::shared_ptr<PendingCall> call, grpc::ByteBuffer* response)
      : call_(std::move(call)), response_(response) {}

  void Done(const absl::StatusOr<Response>& result) {
    if (result.ok()) *response_ = ToBytes(*result);
    Finish(common::ToGrpcStatus(result.status()));
  }
  void OnCancel() override { call_->Cancel(); }
  void OnDone() override { delete this; }

 private:
  const std::shared_ptr<PendingCall> call_;
  grpc::ByteBuffer* const response_;
};

// A token of text has some four bytes.
uint64_t TokensOfText(size_t bytes) { return (bytes + 3) / 4; }
template <typename Request>
uint64_t TokensOf(const Request& request) {
  return request.has_tokens() ? static_cast<uint64_t>(request.tokens().ids_size())
                              : TokensOfText(request.text().size());
}

uint64_t FedBy(const v1::ScoreResponse& response) { return static_cast<uint64_t>(response.token_ids_size()); }
uint64_t FedBy(const v1::EmbedResponse& response) { return response.prompt_tokens(); }

// Ends a unary call of a tenant: its answer waits until what it used is on disk.
template <typename Response>
std::function<void(const absl::StatusOr<Response>&)> Metered(UnaryReactor<Response>* reactor, Tenancy* tenancy,
                                                             GenerationService::Entered entered) {
  return [reactor, tenancy, place = std::move(entered.place),
          ticket = std::move(entered.ticket)](const absl::StatusOr<Response>& result) {
    if (place != nullptr) place->Leave();
    if (ticket == nullptr) return reactor->Done(result);
    if (!result.ok()) {
      ticket->Refund();
      return reactor->Done(result);
    }
    ticket->Fed(FedBy(*result));
    tenancy->Record(ticket, [reactor, result] { reactor->Done(result); });
  };
}

absl::Status TooManyCalls() {
  return common::WithRetryInfo(absl::ResourceExhaustedError("too many texts wait to be tokenized"), absl::Seconds(1));
}

}  // namespace

GenerationService::GenerationService(TurnManager* turns, common::Executor* executor, const UploadLimits& uploads,
                                     Tenancy* tenancy, common::Tracer* tracer)
    : turns_(turns),
      executor_(executor),
      tenancy_(tenancy),
      tracer_(tracer),
      shares_(kMaxDocuments, kMaxDocuments * turns->limits().max_document_bytes),
      documents_{turns, executor, &shares_, uploads} {}

absl::Status GenerationService::CheckModelOf(const Caller& caller, const std::string& model) const {
  if (!caller.has_models()) return absl::OkStatus();
  RWKV_ASSIGN_OR_RETURN(const std::shared_ptr<const ServingModel> serving, turns_->ModelOrWhyNot(model));
  return caller.CheckModel(serving->info);
}

absl::StatusOr<GenerationService::Entered> GenerationService::Enter(const grpc::CallbackServerContext& context,
                                                                    const std::string& model, double tokens) const {
  Entered entered;
  RWKV_ASSIGN_OR_RETURN(entered.caller, tenancy_->CallerOf(context));
  RWKV_ASSIGN_OR_RETURN(entered.place, tenancy_->Enter(entered.caller, false));
  RWKV_RETURN_IF_ERROR(CheckModelOf(entered.caller, model));
  RWKV_ASSIGN_OR_RETURN(entered.ticket, entered.caller.Admit(tokens));
  return entered;
}

bool GenerationService::Run(bool has_text, std::function<void()> work) {
  if (has_text) return executor_->TryRun(std::move(work));
  work();
  return true;
}

grpc::ServerWriteReactor<grpc::ByteBuffer>* GenerationService::Generate(grpc::CallbackServerContext* context,
                                                                        const grpc::ByteBuffer* bytes) {
  using Reactor = StreamReactor<v1::GenerateResponse, grpc::ByteBuffer>;
  const auto call = std::make_shared<PendingCall>(turns_);
  auto* const reactor =
      new Reactor([](const v1::GenerateResponse& response) { return ToBytes(response); }, [call] { call->Cancel(); });
  absl::StatusOr<v1::GenerateRequest> request = Parse<v1::GenerateRequest, v1::GenerateRequestText>(*bytes);
  const auto stream = reactor->stream();
  if (!request.ok()) {
    stream->Close(request.status());
    return reactor;
  }
  const uint64_t tokens = TokensOf(*request);
  const absl::StatusOr<Entered> entered = EnterGenerate(*context, tokens, &*request);
  if (!entered.ok()) {
    stream->Close(entered.status());
    return reactor;
  }
  const auto metered = std::make_shared<MeteredStream>(stream, tenancy_, entered->caller, entered->place,
                                                       entered->ticket, !request->session_id().empty(), tokens);
  const bool has_text = request->has_text();
  if (!Run(has_text, [call, metered, tenant = entered->caller.tenant(),
                      trace = TurnSpans::Of(tracer_, *context, *request), request = *std::move(request)] {
        call->turns().Generate(call->id(), request, metered, tenant, trace);
        call->HandedOver();
      })) {
    metered->Close(TooManyCalls());
  }
  return reactor;
}

absl::StatusOr<GenerationService::Entered> GenerationService::EnterGenerate(const grpc::CallbackServerContext& context,
                                                                            uint64_t tokens,
                                                                            v1::GenerateRequest* request) const {
  Entered entered;
  RWKV_ASSIGN_OR_RETURN(entered.caller, tenancy_->CallerOf(context));
  const Caller& caller = entered.caller;
  // Whether a named turn is there already only the turn manager knows.
  RWKV_ASSIGN_OR_RETURN(entered.place, tenancy_->Enter(caller, !request->request_id().empty()));
  RWKV_RETURN_IF_ERROR(CheckModelOf(caller, request->model()));
  RWKV_RETURN_IF_ERROR(caller.CheckAnswer(request));
  if (!request->session_id().empty()) {
    RWKV_RETURN_IF_ERROR(Caller::CheckSessionId("session_id", request->session_id()));
    RWKV_RETURN_IF_ERROR(caller.CheckStorageWithoutWaiting());
    request->set_session_id(caller.In(request->session_id()));
  }
  RWKV_ASSIGN_OR_RETURN(entered.ticket, caller.Admit(static_cast<double>(tokens)));
  return entered;
}

template <typename Request, typename Response>
grpc::ServerUnaryReactor* GenerationService::Answer(grpc::CallbackServerContext* context, const grpc::ByteBuffer& bytes,
                                                    grpc::ByteBuffer* response, AnsweredBy<Request, Response> method) {
  const auto call = std::make_shared<PendingCall>(turns_);
  auto* const reactor = new UnaryReactor<Response>(call, response);
  // All of them have their text where ScoreRequest has it.
  absl::StatusOr<Request> request = Parse<Request, v1::ScoreRequestText>(bytes);
  if (!request.ok()) {
    reactor->Done(request.status());
    return reactor;
  }
  const absl::StatusOr<Entered> entered = Enter(*context, request->model(), static_cast<double>(TokensOf(*request)));
  if (!entered.ok()) {
    reactor->Done(entered.status());
    return reactor;
  }
  const auto done = Metered(reactor, tenancy_, *entered);
  const bool has_text = request->has_text();
  if (!Run(has_text, [call, done, method, tenant = entered->caller.tenant(), trace = TurnSpans::Of(tracer_, *context),
                      request = *std::move(request)] {
        (call->turns().*method)(call->id(), request, done, tenant, trace);
        call->HandedOver();
      })) {
    done(TooManyCalls());
  }
  return reactor;
}

grpc::ServerUnaryReactor* GenerationService::Score(grpc::CallbackServerContext* context, const grpc::ByteBuffer* bytes,
                                                   grpc::ByteBuffer* response) {
  return Answer(context, *bytes, response, &TurnManager::Score);
}

grpc::ServerUnaryReactor* GenerationService::Embed(grpc::CallbackServerContext* context, const grpc::ByteBuffer* bytes,
                                                   grpc::ByteBuffer* response) {
  return Answer(context, *bytes, response, &TurnManager::Embed);
}

grpc::ServerBidiReactor<v1::ScoreDocumentRequest, v1::ScoreDocumentResponse>* GenerationService::ScoreDocument(
    grpc::CallbackServerContext* context) {
  const absl::StatusOr<Caller> caller = tenancy_->CallerOf(*context);
  return NewScoreDocumentCall(documents_, tenancy_, caller, TurnSpans::Of(tracer_, *context));
}

grpc::ServerWriteReactor<v1::LogitsResponse>* GenerationService::Logits(grpc::CallbackServerContext* context,
                                                                        const v1::LogitsRequest* request) {
  using Reactor = StreamReactor<v1::LogitsResponse, v1::LogitsResponse>;
  const CallId call = turns_->NewCall();
  const absl::StatusOr<Entered> entered = Enter(*context, request->model(), request->tokens().ids_size());
  auto* const reactor = new Reactor([](const v1::LogitsResponse& response) { return response; },
                                    [turns = turns_, call, entered] { turns->Cancel(call); });
  if (!entered.ok()) {
    reactor->stream()->Close(entered.status());
    return reactor;
  }
  turns_->Logits(call, *request, reactor->stream(), entered->caller.tenant(), TurnSpans::Of(tracer_, *context));
  return reactor;
}

absl::Status GenerationService::TokenizeNow(const v1::TokenizeRequest& request, v1::TokenizeResponse* response) const {
  RWKV_ASSIGN_OR_RETURN(const std::shared_ptr<const ServingModel> model, turns_->ModelOrWhyNot(request.model()));
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
  const absl::StatusOr<Caller> caller = tenancy_->CallerOfRequest(*context);
  const absl::Status may = caller.ok() ? CheckModelOf(*caller, request->model()) : caller.status();
  if (!may.ok()) {
    reactor->Finish(common::ToGrpcStatus(may));
    return reactor;
  }
  if (!executor_->TryRun([this, reactor, request, response] {
        reactor->Finish(common::ToGrpcStatus(TokenizeNow(*request, response)));
      })) {
    reactor->Finish(common::ToGrpcStatus(TooManyCalls()));
  }
  return reactor;
}

grpc::ServerBidiReactor<v1::TokenizeDocumentRequest, v1::TokenizeDocumentResponse>* GenerationService::TokenizeDocument(
    grpc::CallbackServerContext* context) {
  return NewTokenizeDocumentCall(documents_, tenancy_->CallerOfRequest(*context));
}

absl::Status GenerationService::DetokenizeNow(const v1::DetokenizeRequest& request,
                                              v1::DetokenizeResponse* response) const {
  RWKV_ASSIGN_OR_RETURN(const std::shared_ptr<const ServingModel> model, turns_->ModelOrWhyNot(request.model()));
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
  const absl::StatusOr<Caller> caller = tenancy_->CallerOfRequest(*context);
  absl::Status status = caller.ok() ? CheckModelOf(*caller, request->model()) : caller.status();
  if (status.ok()) status = DetokenizeNow(*request, response);
  reactor->Finish(common::ToGrpcStatus(status));
  return reactor;
}

grpc::ServerUnaryReactor* GenerationService::ListModels(grpc::CallbackServerContext* context,
                                                        const v1::ListModelsRequest* request,
                                                        v1::ListModelsResponse* response) {
  auto* const reactor = context->DefaultReactor();
  const absl::StatusOr<Caller> caller = tenancy_->CallerOf(*context);
  if (!caller.ok()) {
    reactor->Finish(common::ToGrpcStatus(caller.status()));
    return reactor;
  }
  const auto add = [&](const ServingModel& model) {
    if (caller->CheckModel(model.info).ok()) *response->add_models() = model.info;
  };
  const TurnManager::Models models = turns_->models();
  for (const auto& [fingerprint, model] : models.served) add(*model);
  // Those that only other routers serve.
  for (const auto& [fingerprint, model] : models.seen) {
    if (!models.served.empty() && models.served.count(fingerprint) == 0) add(*model);
  }
  reactor->Finish(grpc::Status::OK);
  return reactor;
}

}  // namespace rwkv::router
