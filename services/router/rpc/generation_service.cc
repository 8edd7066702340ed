#include "services/router/rpc/generation_service.h"

#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/slice.h>

#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "rwkv/v1/turn_spec.pb.h"
#include "services/common/grpc_status.h"
#include "services/router/rpc/stream_reactor.h"
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
class ScoreReactor final : public grpc::ServerUnaryReactor {
 public:
  ScoreReactor(TurnManager* turns, CallId call, grpc::ByteBuffer* response)
      : turns_(turns), call_(call), response_(response) {}

  void Done(const absl::StatusOr<v1::ScoreResponse>& result) {
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
  auto* const reactor = new ScoreReactor(turns_, call, response);
  const absl::StatusOr<v1::ScoreRequest> request = Parse<v1::ScoreRequest, v1::ScoreRequestText>(*bytes);
  if (request.ok()) {
    turns_->Score(call, *request,
                  [reactor](const absl::StatusOr<v1::ScoreResponse>& result) { reactor->Done(result); });
  } else {
    reactor->Done(request.status());
  }
  return reactor;
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
  const std::vector<uint32_t> ids = model->tokenizer->Encode(request.data());
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
