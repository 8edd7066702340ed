#include "services/state_store/rpc/state_records_service.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "kernels/base/status_macros.h"
#include "services/common/grpc_status.h"
#include "services/state_store/rpc/validation.h"

namespace rwkv::state_store {
namespace {

enum Method : size_t { kPutRecord, kGetRecord };

}  // namespace

StateRecordsService::StateRecordsService(const Options& options, RecordStore* records, common::Metrics* metrics)
    : records_(records), budget_(options.max_bytes_in_flight), metrics_(metrics, {"put_record", "get_record"}) {}

grpc::Status StateRecordsService::PutRecord(grpc::ServerContext* context,
                                            grpc::ServerReader<v1::PutRecordRequest>* reader,
                                            v1::PutRecordResponse* response) {
  return metrics_.Answer(kPutRecord, [&]() -> absl::Status {
    v1::PutRecordRequest request;
    if (!reader->Read(&request)) return common::InvalidFieldError("info", "missing: the stream is empty");
    if (!request.has_info()) return common::InvalidFieldError("info", "missing: it must be the first message");
    const v1::RecordInfo info = request.info();
    RWKV_RETURN_IF_ERROR(ValidateRecordInfo("info", info));
    const std::string name = absl::StrCat("record ", info.snapshot_id(), "/", info.layer());
    RWKV_ASSIGN_OR_RETURN(const ByteBudget::Share share, budget_.Take(static_cast<int64_t>(info.bytes()), name));
    // Grows with what comes, so that a claim alone takes no memory.
    std::string data;
    while (reader->Read(&request)) {
      if (!request.has_data()) return common::InvalidFieldError("data", "missing: only the first message is info");
      if (request.data().size() > kMaxPieceBytes) {
        return common::InvalidFieldError(
            "data", absl::StrCat(request.data().size(), " bytes in one message, want at most ", kMaxPieceBytes));
      }
      if (data.size() + request.data().size() > info.bytes()) {
        return absl::DataLossError(absl::StrCat(name, ": more than the ", info.bytes(), " bytes of its info came"));
      }
      if (data.empty()) {
        data.swap(*request.mutable_data());  // Most records are one piece.
      } else {
        data += request.data();
      }
    }
    // Reading also ends when the caller is gone; then what came is a part at best.
    if (context->IsCancelled()) return absl::CancelledError(absl::StrCat(name, ": the caller has gone"));
    return records_->Put(info, data);
  });
}

grpc::Status StateRecordsService::GetRecord(grpc::ServerContext* context, const v1::GetRecordRequest* request,
                                            grpc::ServerWriter<v1::GetRecordResponse>* writer) {
  return metrics_.Answer(kGetRecord, [&]() -> absl::Status {
    const v1::RecordInfo& info = request->info();
    RWKV_RETURN_IF_ERROR(ValidateRecordInfo("info", info));
    const std::string name = absl::StrCat("record ", info.snapshot_id(), "/", info.layer());
    RWKV_ASSIGN_OR_RETURN(const ByteBudget::Share share, budget_.Take(static_cast<int64_t>(info.bytes()), name));
    RWKV_ASSIGN_OR_RETURN(std::string data, records_->Get(info));
    v1::GetRecordResponse response;
    if (data.size() <= kMaxPieceBytes) {
      response.set_data(std::move(data));
      if (!writer->Write(response)) return absl::CancelledError(absl::StrCat(name, ": the caller has gone"));
      return absl::OkStatus();
    }
    for (size_t begin = 0; begin < data.size(); begin += kMaxPieceBytes) {
      const size_t bytes = std::min(kMaxPieceBytes, data.size() - begin);
      response.set_data(data.data() + begin, bytes);
      if (!writer->Write(response)) return absl::CancelledError(absl::StrCat(name, ": the caller has gone"));
    }
    return absl::OkStatus();
  });
}

}  // namespace rwkv::state_store
