// rwkv.v1.Generation, thin over the turn manager. Nothing here waits: texts are tokenized on an executor.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "rwkv/v1/generation.grpc.pb.h"
#include "services/common/executor.h"
#include "services/common/tracing/tracer.h"
#include "services/router/driver/turn_manager.h"
#include "services/router/rpc/document_calls.h"
#include "services/router/rpc/uploads.h"
#include "services/router/tenants/crowd.h"
#include "services/router/tenants/tenancy.h"

namespace rwkv::router {

// Generate, Score and Embed are taken as bytes: a text that is not UTF-8 does not parse, and gRPC by itself would only
// say that something is wrong.
using GenerationServiceBase =
    v1::Generation::WithRawCallbackMethod_Generate<v1::Generation::WithRawCallbackMethod_Score<
        v1::Generation::WithRawCallbackMethod_Embed<v1::Generation::WithCallbackMethod_ScoreDocument<
            v1::Generation::WithCallbackMethod_Logits<v1::Generation::WithCallbackMethod_Tokenize<
                v1::Generation::WithCallbackMethod_TokenizeDocument<v1::Generation::WithCallbackMethod_Detokenize<
                    v1::Generation::WithCallbackMethod_ListModels<v1::Generation::Service>>>>>>>>>;

class GenerationService final : public GenerationServiceBase {
 public:
  // Of what Tokenize and Detokenize take and give: an answer has to fit a message.
  static constexpr size_t kMaxTextBytes = 1 << 20;
  static constexpr int kMaxTokenIds = 1 << 18;

  // Documents that are tokenized or scored at a time; one more is RESOURCE_EXHAUSTED. So many times
  // --max_document_bytes may be here of all documents together, those included that are still coming.
  static constexpr int kMaxDocuments = 4;

  // Who calls, and may: with a place, and the right to feed the model that it asks for so many tokens.
  struct Entered {
    Caller caller;
    std::shared_ptr<Crowd::Place> place;         // Null: those are not counted.
    std::shared_ptr<TenantBook::Ticket> ticket;  // Null: nothing is.
  };

  // None is owned; texts are tokenized on the executor. `tracer` may be null.
  GenerationService(TurnManager* turns, common::Executor* executor, const UploadLimits& uploads, Tenancy* tenancy,
                    common::Tracer* tracer = nullptr);

  grpc::ServerWriteReactor<grpc::ByteBuffer>* Generate(grpc::CallbackServerContext* context,
                                                       const grpc::ByteBuffer* request) override;
  grpc::ServerUnaryReactor* Score(grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
                                  grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* Embed(grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
                                  grpc::ByteBuffer* response) override;
  grpc::ServerBidiReactor<v1::ScoreDocumentRequest, v1::ScoreDocumentResponse>* ScoreDocument(
      grpc::CallbackServerContext* context) override;
  grpc::ServerWriteReactor<v1::LogitsResponse>* Logits(grpc::CallbackServerContext* context,
                                                       const v1::LogitsRequest* request) override;
  grpc::ServerUnaryReactor* Tokenize(grpc::CallbackServerContext* context, const v1::TokenizeRequest* request,
                                     v1::TokenizeResponse* response) override;
  grpc::ServerBidiReactor<v1::TokenizeDocumentRequest, v1::TokenizeDocumentResponse>* TokenizeDocument(
      grpc::CallbackServerContext* context) override;
  grpc::ServerUnaryReactor* Detokenize(grpc::CallbackServerContext* context, const v1::DetokenizeRequest* request,
                                       v1::DetokenizeResponse* response) override;
  grpc::ServerUnaryReactor* ListModels(grpc::CallbackServerContext* context, const v1::ListModelsRequest* request,
                                       v1::ListModelsResponse* response) override;

 private:
  // On the executor if there is a text to be tokenized. False: it is full.
  bool Run(bool has_text, std::function<void()> work);
  absl::StatusOr<Entered> Enter(const grpc::CallbackServerContext& context, const std::string& model,
                                double tokens) const;
  // The same for a turn, whose session then has its name inside the cluster.
  absl::StatusOr<Entered> EnterGenerate(const grpc::CallbackServerContext& context, uint64_t tokens,
                                        v1::GenerateRequest* request) const;
  absl::Status CheckModelOf(const Caller& caller, const std::string& model) const;
  // A call with one answer, which `method` of the turn manager gives.
  template <typename Request, typename Response>
  using AnsweredBy = void (TurnManager::*)(CallId, const Request&, std::function<void(absl::StatusOr<Response>)>,
                                           const std::string& tenant, std::shared_ptr<TurnTrace>);
  template <typename Request, typename Response>
  grpc::ServerUnaryReactor* Answer(grpc::CallbackServerContext* context, const grpc::ByteBuffer& bytes,
                                   grpc::ByteBuffer* response, AnsweredBy<Request, Response> method);
  absl::Status TokenizeNow(const v1::TokenizeRequest& request, v1::TokenizeResponse* response) const;
  absl::Status DetokenizeNow(const v1::DetokenizeRequest& request, v1::DetokenizeResponse* response) const;

  TurnManager* const turns_;
  common::Executor* const executor_;
  Tenancy* const tenancy_;
  common::Tracer* const tracer_;
  UploadShares shares_;
  const DocumentCalls documents_;
};

}  // namespace rwkv::router
