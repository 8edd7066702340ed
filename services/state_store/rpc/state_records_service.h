// rwkv.v1.StateRecords over gRPC: streams records in and out, in pieces of at most 1 MiB.
#pragma once

#include <cstdint>

#include "grpcpp/server_context.h"
#include "grpcpp/support/status.h"
#include "grpcpp/support/sync_stream.h"
#include "rwkv/v1/state_store.grpc.pb.h"
#include "rwkv/v1/state_store.pb.h"
#include "services/common/metrics.h"
#include "services/state_store/records/record_store.h"
#include "services/state_store/rpc/byte_budget.h"
#include "services/state_store/rpc/rpc_metrics.h"

namespace rwkv::state_store {

// Thread-safe. A record is whole in memory while it is checked, so calls in progress share a budget; beyond it they are
// RESOURCE_EXHAUSTED with RetryInfo.
class StateRecordsService final : public v1::StateRecords::Service {
 public:
  struct Options {
    int64_t max_bytes_in_flight = int64_t{1} << 30;
  };
  // Records and metrics outlive the service.
  StateRecordsService(const Options& options, RecordStore* records, common::Metrics* metrics);

  grpc::Status PutRecord(grpc::ServerContext* context, grpc::ServerReader<v1::PutRecordRequest>* reader,
                         v1::PutRecordResponse* response) override;
  grpc::Status GetRecord(grpc::ServerContext* context, const v1::GetRecordRequest* request,
                         grpc::ServerWriter<v1::GetRecordResponse>* writer) override;

 private:
  RecordStore* const records_;
  ByteBudget budget_;
  const RpcMetrics metrics_;
};

}  // namespace rwkv::state_store
