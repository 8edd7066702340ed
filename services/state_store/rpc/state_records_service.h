// rwkv.v1.StateRecords over gRPC: streams records in and out, in pieces of at most 1 MiB.
#pragma once

#include <cstdint>

#include "grpcpp/impl/service_type.h"
#include "grpcpp/server_context.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/status.h"
#include "grpcpp/support/sync_stream.h"
#include "rwkv/v1/state_store.pb.h"
#include "services/common/metrics.h"
#include "services/state_store/records/record_store.h"
#include "services/state_store/rpc/byte_budget.h"
#include "services/state_store/rpc/rpc_metrics.h"

namespace rwkv::state_store {

// Thread-safe. A record is whole in memory while it is checked, so calls in progress share a budget; beyond it they are
// RESOURCE_EXHAUSTED with RetryInfo.
//
// Not the generated class, which copies each record out of a message or into one.
class StateRecordsService final : public grpc::Service {
 public:
  struct Options {
    int64_t max_bytes_in_flight = int64_t{1} << 30;
  };
  // Records and metrics outlive the service.
  StateRecordsService(const Options& options, RecordStore* records, common::Metrics* metrics);

 private:
  // Messages are a PutRecordRequest's.
  grpc::Status PutRecord(grpc::ServerContext* context, grpc::ServerReader<grpc::ByteBuffer>* reader);
  // Messages are a GetRecordResponse's.
  grpc::Status GetRecord(const v1::GetRecordRequest& request, grpc::ServerWriter<grpc::ByteBuffer>* writer);

  RecordStore* const records_;
  ByteBudget budget_;
  const RpcMetrics metrics_;
};

}  // namespace rwkv::state_store
