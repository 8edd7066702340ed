// rwkv.v1.StateRecords over gRPC: streams records in and out, in pieces of at most 1 MiB.
#pragma once

#include <cstdint>
#include <memory>

#include "grpcpp/impl/service_type.h"
#include "grpcpp/server_context.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/status.h"
#include "grpcpp/support/sync_stream.h"
#include "rwkv/v1/state_store.pb.h"
#include "services/common/metrics.h"
#include "services/state_store/client/shared_window.h"
#include "services/state_store/records/record_pool.h"
#include "services/state_store/records/record_store.h"
#include "services/state_store/rpc/byte_budget.h"
#include "services/state_store/rpc/rpc_metrics.h"

namespace rwkv::state_store {

// Thread-safe. The records of a call are whole in memory while they are checked, so calls in progress share a budget;
// beyond it they are RESOURCE_EXHAUSTED with RetryInfo.
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
  using Infos = absl::Span<const v1::RecordInfo>;

  // Messages are those of the method: PutRecordRequest and PutRecordsRequest, GetRecordResponse and GetRecordsResponse.
  grpc::Status PutRecord(grpc::ServerContext* context, grpc::ServerReader<grpc::ByteBuffer>* reader);
  grpc::Status PutRecords(grpc::ServerContext* context, grpc::ServerReader<grpc::ByteBuffer>* reader);
  grpc::Status GetRecord(const v1::GetRecordRequest& request, grpc::ServerWriter<grpc::ByteBuffer>* writer);
  grpc::Status GetRecords(const v1::GetRecordsRequest& request, grpc::ServerWriter<grpc::ByteBuffer>* writer);

  // The messages with data, and the putting of them.
  absl::Status Receive(Infos infos, grpc::ServerContext* context, grpc::ServerReader<grpc::ByteBuffer>* reader);
  absl::Status Send(Infos infos, grpc::ServerWriter<grpc::ByteBuffer>* writer);
  // The same through memory that the client shares with us.
  absl::Status ReceiveShared(Infos infos, const v1::SharedPlace& place);
  absl::Status SendShared(Infos infos, const SharedFile& file, grpc::ServerWriter<grpc::ByteBuffer>* writer);

  RecordStore* const records_;
  ByteBudget budget_;
  const std::shared_ptr<RecordPool> memory_;  // For what the budget has room for.
  const RpcMetrics metrics_;
};

}  // namespace rwkv::state_store
