#include "services/state_store/rpc/state_records_service.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

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
#include "services/state_store/records/record_pool.h"
#include "services/state_store/rpc/validation.h"

namespace rwkv::state_store {
namespace {

enum Method : size_t { kPutRecord, kGetRecord, kPutRecords, kGetRecords };

using grpc::internal::RpcMethod;

// Of the calls of a worker that saves and restores at a time, and the bytes of each (records_client.cc).
constexpr size_t kKeptBuffers = 8;
constexpr size_t kBufferBytes = size_t{8} << 20;

// Pieces of records are the same field of the messages of one record and of several.
static_assert(v1::PutRecordsRequest::kDataFieldNumber == v1::PutRecordRequest::kDataFieldNumber);
static_assert(v1::GetRecordsResponse::kDataFieldNumber == v1::GetRecordResponse::kDataFieldNumber);

template <typename Message>
bool Parse(grpc::ByteBuffer* from, Message* message) {
  return grpc::SerializationTraits<Message>::Deserialize(from, message).ok();
}

std::string Name(const v1::RecordInfo& info) { return absl::StrCat("record ", info.snapshot_id(), "/", info.layer()); }

// Places for records that follow each other, of whole blocks.
struct Places {
  Places(RecordPool& pool, absl::Span<const v1::RecordInfo> infos) {
    size_t bytes = 0;
    for (const v1::RecordInfo& info : infos) bytes += WholeBlocks(info.bytes());
    memory = pool.Take(bytes);  // A claim alone takes up none of it.
    char* begin = memory.get();
    for (const v1::RecordInfo& info : infos) {
      places.emplace_back(begin, WholeBlocks(info.bytes()));
      begin += places.back().size();
    }
  }

  // The record in one of them, which has come; what is behind it goes to the disk with it.
  absl::Span<const char> Record(size_t i, size_t bytes) const {
    std::fill(places[i].begin() + bytes, places[i].end(), '\0');
    return places[i].first(bytes);
  }

  std::shared_ptr<char> memory;
  std::vector<absl::Span<char>> places;
};

absl::Status Write(absl::Span<const v1::RecordInfo> infos, const Places& records,
                   grpc::ServerWriter<grpc::ByteBuffer>* writer) {
  for (size_t i = 0; i < infos.size(); ++i) {
    absl::Span<const char> left = records.places[i].first(infos[i].bytes());
    do {
      const absl::Span<const char> piece = left.first(std::min(left.size(), kMaxPieceBytes));
      left.remove_prefix(piece.size());
      if (!writer->Write(WireMessage(v1::GetRecordResponse::kDataFieldNumber, piece, records.memory))) {
        return absl::CancelledError(absl::StrCat(Name(infos[i]), ": the caller has gone"));
      }
    } while (!left.empty());
  }
  return absl::OkStatus();
}

int64_t BytesOf(absl::Span<const v1::RecordInfo> infos) {
  int64_t bytes = 0;
  for (const v1::RecordInfo& info : infos) bytes += static_cast<int64_t>(info.bytes());
  return bytes;
}

}  // namespace

StateRecordsService::StateRecordsService(const Options& options, RecordStore* records, common::Metrics* metrics)
    : records_(records),
      budget_(options.max_bytes_in_flight),
      memory_(RecordPool::Create(kKeptBuffers, kBufferBytes)),
      metrics_(metrics, {"put_record", "get_record", "put_records", "get_records"}) {
  const auto add_put = [this](const char* name, auto response, auto method) {
    using Put = grpc::internal::ClientStreamingHandler<StateRecordsService, grpc::ByteBuffer, decltype(response)>;
    AddMethod(new grpc::internal::RpcServiceMethod(
        name, RpcMethod::CLIENT_STREAMING,
        new Put([method](StateRecordsService* self, grpc::ServerContext* context,
                         grpc::ServerReader<grpc::ByteBuffer>* reader,
                         decltype(response)*) { return (self->*method)(context, reader); },
                this)));
  };
  const auto add_get = [this](const char* name, auto request, auto method) {
    using Get = grpc::internal::ServerStreamingHandler<StateRecordsService, decltype(request), grpc::ByteBuffer>;
    AddMethod(new grpc::internal::RpcServiceMethod(
        name, RpcMethod::SERVER_STREAMING,
        new Get([method](StateRecordsService* self, grpc::ServerContext*, const decltype(request)* asked,
                         grpc::ServerWriter<grpc::ByteBuffer>* writer) { return (self->*method)(*asked, writer); },
                this)));
  };
  add_put("/rwkv.v1.StateRecords/PutRecord", v1::PutRecordResponse(), &StateRecordsService::PutRecord);
  add_get("/rwkv.v1.StateRecords/GetRecord", v1::GetRecordRequest(), &StateRecordsService::GetRecord);
  add_put("/rwkv.v1.StateRecords/PutRecords", v1::PutRecordsResponse(), &StateRecordsService::PutRecords);
  add_get("/rwkv.v1.StateRecords/GetRecords", v1::GetRecordsRequest(), &StateRecordsService::GetRecords);
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
    RWKV_RETURN_IF_ERROR(ValidateRecordInfo("info", request.info()));
    return Receive({&request.info(), 1}, context, reader);
  });
}

grpc::Status StateRecordsService::PutRecords(grpc::ServerContext* context,
                                             grpc::ServerReader<grpc::ByteBuffer>* reader) {
  return metrics_.Answer(kPutRecords, [&]() -> absl::Status {
    grpc::ByteBuffer message;
    v1::PutRecordsRequest request;
    if (!reader->Read(&message)) return common::InvalidFieldError("infos", "missing: the stream is empty");
    if (!Parse(&message, &request) || !request.has_infos()) {
      return common::InvalidFieldError("infos", "missing: it must be the first message");
    }
    RWKV_RETURN_IF_ERROR(ValidateRecordInfos(request.infos()));
    const std::vector<v1::RecordInfo> infos(request.infos().records().begin(), request.infos().records().end());
    RWKV_RETURN_IF_ERROR(request.has_shared() ? ReceiveShared(infos, request.shared())
                                              : Receive(infos, context, reader));
    if (request.records_in_all() > 0) records_->MakeDurableSoon(infos[0].snapshot_id(), request.records_in_all());
    return absl::OkStatus();
  });
}

absl::Status StateRecordsService::Receive(Infos infos, grpc::ServerContext* context,
                                          grpc::ServerReader<grpc::ByteBuffer>* reader) {
  RWKV_ASSIGN_OR_RETURN(const ByteBudget::Share share, budget_.Take(BytesOf(infos), Name(infos[0])));
  const Places room(*memory_, infos);
  std::vector<absl::Span<const char>> records;
  size_t came = 0;  // Of the record that is coming.
  const auto add = [&](absl::Span<const char> piece) {
    if (piece.empty()) return;  // There may be no record that it could be of.
    std::memcpy(room.places[records.size()].data() + came, piece.data(), piece.size());
    came += piece.size();
  };
  grpc::ByteBuffer message;
  v1::PutRecordRequest request;
  WireData data;
  while (reader->Read(&message)) {
    const bool is_data = data.Read(v1::PutRecordRequest::kDataFieldNumber, message);
    if (!is_data && (!Parse(&message, &request) || !request.has_data())) {
      return common::InvalidFieldError("data", "missing: only the first message has none");
    }
    const size_t bytes = is_data ? data.size() : request.data().size();
    if (bytes > kMaxPieceBytes) {
      return common::InvalidFieldError("data",
                                       absl::StrCat(bytes, " bytes in one message, want at most ", kMaxPieceBytes));
    }
    const bool all_came = records.size() == infos.size();
    const v1::RecordInfo& info = infos[all_came ? infos.size() - 1 : records.size()];
    if (bytes > (all_came ? 0 : info.bytes() - came)) {
      return absl::DataLossError(absl::StrCat(Name(info), ": more than the ", info.bytes(), " bytes of its info came"));
    }
    if (is_data) {
      data.ForEach(add);
    } else {
      add(request.data());
    }
    if (all_came || came < info.bytes()) continue;
    records.push_back(room.Record(records.size(), came));
    came = 0;
  }
  // Reading also ends when the caller is gone; then what came is a part at best.
  if (context->IsCancelled()) return absl::CancelledError(absl::StrCat(Name(infos[0]), ": the caller has gone"));
  if (records.size() < infos.size()) {
    const v1::RecordInfo& info = infos[records.size()];
    return absl::DataLossError(
        absl::StrCat(Name(info), ": ", came, " bytes of the ", info.bytes(), " of its info came"));
  }
  return records_->PutAll(infos, records);
}

absl::Status StateRecordsService::ReceiveShared(Infos infos, const v1::SharedPlace& place) {
  const absl::StatusOr<SharedFile> file = SharedFile::Open(place.name());
  if (!file.ok()) {
    return common::WithErrorInfo(absl::FailedPreconditionError(file.status().message()), "NO_SHARED_MEMORY");
  }
  RWKV_ASSIGN_OR_RETURN(const ByteBudget::Share share, budget_.Take(BytesOf(infos), Name(infos[0])));
  const Places room(*memory_, infos);
  std::vector<absl::Span<const char>> records;
  uint64_t at = 0;
  for (size_t i = 0; i < infos.size(); ++i) {
    RWKV_RETURN_IF_ERROR(file->Read(at, room.places[i].first(infos[i].bytes())));
    at += infos[i].bytes();
    records.push_back(room.Record(i, infos[i].bytes()));
  }
  return records_->PutAll(infos, records);
}

grpc::Status StateRecordsService::GetRecord(const v1::GetRecordRequest& request,
                                            grpc::ServerWriter<grpc::ByteBuffer>* writer) {
  return metrics_.Answer(kGetRecord, [&]() -> absl::Status {
    RWKV_RETURN_IF_ERROR(ValidateRecordInfo("info", request.info()));
    return Send({&request.info(), 1}, writer);
  });
}

grpc::Status StateRecordsService::GetRecords(const v1::GetRecordsRequest& request,
                                             grpc::ServerWriter<grpc::ByteBuffer>* writer) {
  return metrics_.Answer(kGetRecords, [&]() -> absl::Status {
    RWKV_RETURN_IF_ERROR(ValidateRecordInfos(request.infos()));
    const std::vector<v1::RecordInfo> infos(request.infos().records().begin(), request.infos().records().end());
    if (request.has_shared()) {
      const absl::StatusOr<SharedFile> file = SharedFile::Open(request.shared().name());
      if (file.ok()) return SendShared(infos, *file, writer);
    }
    return Send(infos, writer);
  });
}

absl::Status StateRecordsService::Send(Infos infos, grpc::ServerWriter<grpc::ByteBuffer>* writer) {
  RWKV_ASSIGN_OR_RETURN(const ByteBudget::Share share, budget_.Take(BytesOf(infos), Name(infos[0])));
  const Places records(*memory_, infos);
  RWKV_RETURN_IF_ERROR(records_->ReadAll(infos, records.places));
  return Write(infos, records, writer);
}

absl::Status StateRecordsService::SendShared(Infos infos, const SharedFile& file,
                                             grpc::ServerWriter<grpc::ByteBuffer>* writer) {
  RWKV_ASSIGN_OR_RETURN(const ByteBudget::Share share, budget_.Take(BytesOf(infos), Name(infos[0])));
  const Places records(*memory_, infos);
  RWKV_RETURN_IF_ERROR(records_->ReadAll(infos, records.places));
  uint64_t at = 0;
  for (size_t i = 0; i < infos.size(); ++i) {
    // There may be no memory left for it; the connection needs none.
    if (!file.Write(at, records.places[i].first(infos[i].bytes())).ok()) return Write(infos, records, writer);
    at += infos[i].bytes();
  }
  v1::GetRecordsResponse response;
  response.set_shared(true);
  const grpc::Slice message(response.SerializeAsString());
  if (writer->Write(grpc::ByteBuffer(&message, 1))) return absl::OkStatus();
  return absl::CancelledError(absl::StrCat(Name(infos[0]), ": the caller has gone"));
}

}  // namespace rwkv::state_store
