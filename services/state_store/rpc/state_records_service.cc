#include "services/state_store/rpc/state_records_service.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "grpcpp/impl/codegen/proto_utils.h"
#include "grpcpp/impl/rpc_method.h"
#include "grpcpp/impl/rpc_service_method.h"
#include "grpcpp/support/method_handler.h"
#include "kernels/base/status_macros.h"
#include "services/common/grpc_status.h"
#include "services/state_store/client/wire_data.h"
#include "services/state_store/records/record_memory.h"
#include "services/state_store/rpc/validation.h"

namespace rwkv::state_store {
namespace {

enum Method : size_t { kPutRecord, kGetRecord };

using grpc::internal::RpcMethod;

bool Parse(grpc::ByteBuffer* message, v1::PutRecordRequest* request) {
  return grpc::SerializationTraits<v1::PutRecordRequest>::Deserialize(message, request).ok();
}

}  // namespace

StateRecordsService::StateRecordsService(const Options& options, RecordStore* records, common::Metrics* metrics)
    : records_(records), budget_(options.max_bytes_in_flight), metrics_(metrics, {"put_record", "get_record"}) {
  using Put = grpc::internal::ClientStreamingHandler<StateRecordsService, grpc::ByteBuffer, v1::PutRecordResponse>;
  using Get = grpc::internal::ServerStreamingHandler<StateRecordsService, v1::GetRecordRequest, grpc::ByteBuffer>;
  AddMethod(new grpc::internal::RpcServiceMethod(
      "/rwkv.v1.StateRecords/PutRecord", RpcMethod::CLIENT_STREAMING,
      new Put([](StateRecordsService* self, grpc::ServerContext* context, grpc::ServerReader<grpc::ByteBuffer>* reader,
                 v1::PutRecordResponse*) { return self->PutRecord(context, reader); },
              this)));
  AddMethod(new grpc::internal::RpcServiceMethod(
      "/rwkv.v1.StateRecords/GetRecord", RpcMethod::SERVER_STREAMING,
      new Get([](StateRecordsService* self, grpc::ServerContext*, const v1::GetRecordRequest* request,
                 grpc::ServerWriter<grpc::ByteBuffer>* writer) { return self->GetRecord(*request, writer); },
              this)));
}

grpc::Status StateRecordsService::PutRecord(grpc::ServerContext* context,
                                            grpc::ServerReader<grpc::ByteBuffer>* reader) {
  return metrics_.Answer(kPutRecord, [&]() -> absl::Status {
    grpc::ByteBuffer message;
    v1::PutRecordRequest request;
    if (!reader->Read(&message)) return common::InvalidFieldError("info", "missing: the stream is empty");
    if (!Parse(&message, &request) || !request.has_info()) {
      return common::InvalidFieldError("info", "missing: it must be the first message");
    }
    const v1::RecordInfo info = request.info();
    RWKV_RETURN_IF_ERROR(ValidateRecordInfo("info", info));
    const std::string name = absl::StrCat("record ", info.snapshot_id(), "/", info.layer());
    RWKV_ASSIGN_OR_RETURN(const ByteBudget::Share share, budget_.Take(static_cast<int64_t>(info.bytes()), name));
    // A claim alone takes up none of it.
    const RecordMemory memory = NewRecordMemory(info.bytes());
    size_t came = 0;
    const auto add = [&](absl::Span<const char> piece) {
      std::memcpy(memory.get() + came, piece.data(), piece.size());
      came += piece.size();
    };
    WireData data;
    while (reader->Read(&message)) {
      const bool is_data = data.Read(v1::PutRecordRequest::kDataFieldNumber, message);
      if (!is_data && (!Parse(&message, &request) || !request.has_data())) {
        return common::InvalidFieldError("data", "missing: only the first message is info");
      }
      const size_t bytes = is_data ? data.size() : request.data().size();
      if (bytes > kMaxPieceBytes) {
        return common::InvalidFieldError("data",
                                         absl::StrCat(bytes, " bytes in one message, want at most ", kMaxPieceBytes));
      }
      if (bytes > info.bytes() - came) {
        return absl::DataLossError(absl::StrCat(name, ": more than the ", info.bytes(), " bytes of its info came"));
      }
      if (is_data) {
        data.ForEach(add);
      } else {
        add(request.data());
      }
    }
    // Reading also ends when the caller is gone; then what came is a part at best.
    if (context->IsCancelled()) return absl::CancelledError(absl::StrCat(name, ": the caller has gone"));
    return records_->Put(info, absl::MakeConstSpan(memory.get(), came));
  });
}

grpc::Status StateRecordsService::GetRecord(const v1::GetRecordRequest& request,
                                            grpc::ServerWriter<grpc::ByteBuffer>* writer) {
  return metrics_.Answer(kGetRecord, [&]() -> absl::Status {
    const v1::RecordInfo& info = request.info();
    RWKV_RETURN_IF_ERROR(ValidateRecordInfo("info", info));
    const std::string name = absl::StrCat("record ", info.snapshot_id(), "/", info.layer());
    RWKV_ASSIGN_OR_RETURN(const ByteBudget::Share share, budget_.Take(static_cast<int64_t>(info.bytes()), name));
    const size_t blocks = WholeBlocks(info.bytes());
    const std::shared_ptr<char> memory = NewRecordMemory(blocks);
    RWKV_RETURN_IF_ERROR(records_->Read(info, absl::MakeSpan(memory.get(), blocks)));
    absl::Span<const char> left = absl::MakeConstSpan(memory.get(), info.bytes());
    do {
      const absl::Span<const char> piece = left.first(std::min(left.size(), kMaxPieceBytes));
      left.remove_prefix(piece.size());
      if (!writer->Write(WireMessage(v1::GetRecordResponse::kDataFieldNumber, piece, memory))) {
        return absl::CancelledError(absl::StrCat(name, ": the caller has gone"));
      }
    } while (!left.empty());
    return absl::OkStatus();
  });
}

}  // namespace rwkv::state_store
