// Sessions.Import: a file is read whole into memory, checked, and becomes a session.
#pragma once

#include <functional>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "rwkv/v1/sessions.grpc.pb.h"
#include "services/common/executor.h"
#include "services/common/tracing/trace_context.h"
#include "services/router/driver/turn_manager.h"
#include "services/router/rpc/uploads.h"
#include "services/router/tenants/tenancy.h"
#include "services/state_store/client/state_store_client.h"

namespace rwkv::router {

struct ImportCalls {
  // Not owned.
  TurnManager* turns = nullptr;
  state_store::CatalogClient* catalog = nullptr;
  state_store::RecordsClient* records = nullptr;
  common::Executor* executor = nullptr;  // Checks and stores.
  UploadShares* shares = nullptr;

  absl::Status known;  // Not OK: the caller is not known, and is told so.
  Caller caller;
  common::TraceContext trace;  // That its calls to the store are part of; not valid: none.
  UploadLimits limits;
  std::function<std::string()> new_session_id;
  std::function<std::string()> new_snapshot_id;
};

// The reactor of one call, which deletes itself when the call is over. `response` lives as long as the call.
grpc::ServerReadReactor<v1::SessionsImportRequest>* NewImportCall(ImportCalls calls, absl::Time deadline,
                                                                  v1::SessionsImportResponse* response);

}  // namespace rwkv::router
