// ScoreDocument and TokenizeDocument: a document is read whole, then worked on. Each function makes the reactor of one
// call, which deletes itself when the call is over.
#pragma once

#include "rwkv/v1/generation.grpc.pb.h"
#include "services/common/executor.h"
#include "services/router/rpc/uploads.h"
#include "services/router/turns/turn_manager.h"

namespace rwkv::router {

// What they share. All borrowed.
struct DocumentCalls {
  TurnManager* turns = nullptr;
  common::Executor* executor = nullptr;  // Tokenizes.
  UploadShares* shares = nullptr;
  UploadLimits limits;
};

grpc::ServerBidiReactor<v1::ScoreDocumentRequest, v1::ScoreDocumentResponse>* NewScoreDocumentCall(
    const DocumentCalls& calls);
grpc::ServerBidiReactor<v1::TokenizeDocumentRequest, v1::TokenizeDocumentResponse>* NewTokenizeDocumentCall(
    const DocumentCalls& calls);

}  // namespace rwkv::router
