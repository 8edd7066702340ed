// rwkv.v1.Sessions: the state store's catalog for clients, export and import of a state. What blocks runs on an
// executor.
#pragma once

#include <functional>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "rwkv/v1/sessions.grpc.pb.h"
#include "services/common/executor.h"
#include "services/common/tracing/tracer.h"
#include "services/router/driver/turn_manager.h"
#include "services/router/rpc/uploads.h"
#include "services/router/tenants/tenancy.h"
#include "services/state_store/client/state_store_client.h"

namespace rwkv::router {

class SessionsService final : public v1::Sessions::CallbackService {
 public:
  static constexpr uint32_t kMaxTokensPerGet = 65536;
  static constexpr uint32_t kMaxPageSize = 1000;
  static constexpr uint32_t kDefaultPageSize = 100;

  // Imports that are checked and stored at a time, and bytes of all that are here, those included that still come.
  static constexpr int kMaxImports = 2;
  static constexpr int64_t kMaxImportBytes = int64_t{512} << 20;

  // All borrowed. `random` makes ids. `tracer` may be null.
  SessionsService(TurnManager* turns, state_store::CatalogClient* catalog, state_store::RecordsClient* records,
                  common::Executor* executor, std::function<uint64_t()> random, const UploadLimits& uploads,
                  Tenancy* tenancy, common::Tracer* tracer = nullptr);

  grpc::ServerUnaryReactor* Create(grpc::CallbackServerContext* context, const v1::SessionsCreateRequest* request,
                                   v1::SessionsCreateResponse* response) override;
  grpc::ServerUnaryReactor* Get(grpc::CallbackServerContext* context, const v1::SessionsGetRequest* request,
                                v1::SessionsGetResponse* response) override;
  grpc::ServerUnaryReactor* List(grpc::CallbackServerContext* context, const v1::SessionsListRequest* request,
                                 v1::SessionsListResponse* response) override;
  grpc::ServerUnaryReactor* Fork(grpc::CallbackServerContext* context, const v1::SessionsForkRequest* request,
                                 v1::SessionsForkResponse* response) override;
  grpc::ServerUnaryReactor* Rewind(grpc::CallbackServerContext* context, const v1::SessionsRewindRequest* request,
                                   v1::SessionsRewindResponse* response) override;
  grpc::ServerUnaryReactor* Delete(grpc::CallbackServerContext* context, const v1::SessionsDeleteRequest* request,
                                   v1::SessionsDeleteResponse* response) override;
  grpc::ServerWriteReactor<v1::SessionsExportStateResponse>* ExportState(
      grpc::CallbackServerContext* context, const v1::SessionsExportStateRequest* request) override;
  grpc::ServerReadReactor<v1::SessionsImportRequest>* Import(grpc::CallbackServerContext* context,
                                                             v1::SessionsImportResponse* response) override;

 private:
  // Answers the call with `work`, on the executor; `work` gets who calls and the call's deadline.
  using Work = std::function<absl::Status(const Caller& caller, absl::Time deadline)>;
  grpc::ServerUnaryReactor* Run(grpc::CallbackServerContext* context, Work work);
  absl::Status GetNow(const v1::SessionsGetRequest& request, const Caller& caller, absl::Time deadline,
                      v1::SessionsGetResponse* response) const;
  // Who calls for a session whose id has the right form.
  absl::StatusOr<Caller> EnterSession(const grpc::CallbackServerContext& context, const std::string& session_id) const;
  std::string NewSessionId() const;

  TurnManager* const turns_;
  state_store::CatalogClient* const catalog_;
  state_store::RecordsClient* const records_;
  common::Executor* const executor_;
  const std::function<uint64_t()> random_;
  Tenancy* const tenancy_;
  common::Tracer* const tracer_;
  UploadShares import_shares_;
  const UploadLimits upload_limits_;
};

}  // namespace rwkv::router
