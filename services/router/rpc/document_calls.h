// ScoreDocument and TokenizeDocument: a document is read whole, then worked on. Each function makes the reactor of one
// call, which deletes itself when the call is over.
#pragma once

#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "rwkv/v1/generation.grpc.pb.h"
#include "services/common/executor.h"
#include "services/router/core/turn_trace.h"
#include "services/router/driver/turn_manager.h"
#include "services/router/rpc/uploads.h"
#include "services/router/tenants/tenancy.h"

namespace rwkv::router {

// What they share. All borrowed.
struct DocumentCalls {
  TurnManager* turns = nullptr;
  common::Executor* executor = nullptr;  // Tokenizes.
  UploadShares* shares = nullptr;
  UploadLimits limits;
};

// `tenancy` is borrowed. A caller that is not known is told so. `trace`: null: the call is not traced.
grpc::ServerBidiReactor<v1::ScoreDocumentRequest, v1::ScoreDocumentResponse>* NewScoreDocumentCall(
    const DocumentCalls& calls, Tenancy* tenancy, const absl::StatusOr<Caller>& caller,
    std::shared_ptr<TurnTrace> trace);
grpc::ServerBidiReactor<v1::TokenizeDocumentRequest, v1::TokenizeDocumentResponse>* NewTokenizeDocumentCall(
    const DocumentCalls& calls, const absl::StatusOr<Caller>& caller);

}  // namespace rwkv::router
