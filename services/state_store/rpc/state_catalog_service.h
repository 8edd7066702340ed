// rwkv.v1.StateCatalog over gRPC: checks the form of requests, calls the store, converts. Holds no state.
#pragma once

#include <cstdint>
#include <string>

#include "absl/functional/function_ref.h"
#include "absl/strings/string_view.h"
#include "grpcpp/server_context.h"
#include "grpcpp/support/status.h"
#include "grpcpp/support/sync_stream.h"
#include "rwkv/v1/state_store.grpc.pb.h"
#include "rwkv/v1/state_store.pb.h"
#include "services/common/metrics.h"
#include "services/state_store/rpc/rpc_metrics.h"
#include "services/state_store/state_store.h"

namespace rwkv::state_store {

// Thread-safe. Each call takes a thread of the server until it is answered (RpcServer bounds them).
class StateCatalogService final : public v1::StateCatalog::Service {
 public:
  // What Describe says.
  struct Identity {
    std::string name;
    int64_t pid = 0;
    std::string metrics_address;
  };
  // Store and metrics outlive the service.
  StateCatalogService(const Identity& identity, StateStore* store, common::Metrics* metrics);

  grpc::Status Describe(grpc::ServerContext* context, const v1::StateCatalogDescribeRequest* request,
                        v1::StateCatalogDescribeResponse* response) override;
  grpc::Status ImportSession(grpc::ServerContext* context, const v1::ImportSessionRequest* request,
                             v1::ImportSessionResponse* response) override;
  grpc::Status CreateSession(grpc::ServerContext* context, const v1::CreateSessionRequest* request,
                             v1::CreateSessionResponse* response) override;
  grpc::Status GetSession(grpc::ServerContext* context, const v1::GetSessionRequest* request,
                          v1::GetSessionResponse* response) override;
  grpc::Status ListSessions(grpc::ServerContext* context, const v1::ListSessionsRequest* request,
                            v1::ListSessionsResponse* response) override;
  grpc::Status ForkSession(grpc::ServerContext* context, const v1::ForkSessionRequest* request,
                           v1::ForkSessionResponse* response) override;
  grpc::Status RewindSession(grpc::ServerContext* context, const v1::RewindSessionRequest* request,
                             v1::RewindSessionResponse* response) override;
  grpc::Status DeleteSession(grpc::ServerContext* context, const v1::DeleteSessionRequest* request,
                             v1::DeleteSessionResponse* response) override;
  grpc::Status AcquireLease(grpc::ServerContext* context, const v1::AcquireLeaseRequest* request,
                            v1::AcquireLeaseResponse* response) override;
  grpc::Status RenewLeases(grpc::ServerContext* context, const v1::RenewLeasesRequest* request,
                           v1::RenewLeasesResponse* response) override;
  grpc::Status ReleaseLease(grpc::ServerContext* context, const v1::ReleaseLeaseRequest* request,
                            v1::ReleaseLeaseResponse* response) override;
  grpc::Status BeginTurn(grpc::ServerContext* context, const v1::BeginTurnRequest* request,
                         v1::BeginTurnResponse* response) override;
  grpc::Status AppendTokens(grpc::ServerContext* context, const v1::AppendTokensRequest* request,
                            v1::AppendTokensResponse* response) override;
  grpc::Status FindTurn(grpc::ServerContext* context, const v1::FindTurnRequest* request,
                        v1::FindTurnResponse* response) override;
  grpc::Status ReadTokens(grpc::ServerContext* context, const v1::ReadTokensRequest* request,
                          grpc::ServerWriter<v1::ReadTokensResponse>* writer) override;
  grpc::Status CommitSnapshot(grpc::ServerContext* context, const v1::CommitSnapshotRequest* request,
                              v1::CommitSnapshotResponse* response) override;
  grpc::Status FindSnapshot(grpc::ServerContext* context, const v1::FindSnapshotRequest* request,
                            v1::FindSnapshotResponse* response) override;
  grpc::Status DropSnapshot(grpc::ServerContext* context, const v1::DropSnapshotRequest* request,
                            v1::DropSnapshotResponse* response) override;
  grpc::Status FindPrefix(grpc::ServerContext* context, const v1::FindPrefixRequest* request,
                          v1::FindPrefixResponse* response) override;
  grpc::Status PutPrefix(grpc::ServerContext* context, const v1::PutPrefixRequest* request,
                         v1::PutPrefixResponse* response) override;
  grpc::Status DropPrefix(grpc::ServerContext* context, const v1::DropPrefixRequest* request,
                          v1::DropPrefixResponse* response) override;
  grpc::Status GetUsage(grpc::ServerContext* context, const v1::GetUsageRequest* request,
                        v1::GetUsageResponse* response) override;
  grpc::Status PutUsage(grpc::ServerContext* context, const v1::PutUsageRequest* request,
                        v1::PutUsageResponse* response) override;

 private:
  // Nothing is done for a caller that has gone. Who asked about one session is told so when something of it is lost.
  grpc::Status Answer(const grpc::ServerContext& context, size_t method, absl::string_view session_id,
                      absl::FunctionRef<absl::Status()> handle) const;

  const Identity identity_;
  StateStore* const store_;
  const RpcMetrics metrics_;
  prometheus::Histogram& append_items_;
};

}  // namespace rwkv::state_store
