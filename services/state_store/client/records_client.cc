#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/memory/memory.h"
#include "absl/strings/str_cat.h"
#include "grpcpp/client_context.h"
#include "grpcpp/impl/codegen/proto_utils.h"
#include "grpcpp/impl/rpc_method.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/slice.h"
#include "grpcpp/support/sync_stream.h"
#include "kernels/base/status_macros.h"
#include "rwkv/v1/state_store.pb.h"
#include "services/common/grpc_status.h"
#include "services/state_store/client/crc32c.h"
#include "services/state_store/client/state_store_client.h"
#include "services/state_store/client/store_calls.h"
#include "services/state_store/client/store_choice.h"
#include "services/state_store/client/wire_data.h"

namespace rwkv::state_store {
namespace {

constexpr size_t kMaxPieceBytes = size_t{1} << 20;
constexpr uint64_t kMaxRecordBytes = uint64_t{256} << 20;

// Not by the generated stub, which copies a record into a message and that onto the wire.
class RecordsStub {
 public:
  explicit RecordsStub(const std::shared_ptr<grpc::Channel>& channel)
      : channel_(channel),
        put_records_("/rwkv.v1.StateRecords/PutRecords", grpc::internal::RpcMethod::CLIENT_STREAMING, channel),
        get_records_("/rwkv.v1.StateRecords/GetRecords", grpc::internal::RpcMethod::SERVER_STREAMING, channel) {}

  // Messages are a PutRecordsRequest's.
  std::unique_ptr<grpc::ClientWriter<grpc::ByteBuffer>> PutRecords(grpc::ClientContext* context,
                                                                   v1::PutRecordsResponse* response) {
    return absl::WrapUnique(
        grpc::internal::ClientWriterFactory<grpc::ByteBuffer>::Create(channel_.get(), put_records_, context, response));
  }
  // Messages are a GetRecordsResponse's.
  std::unique_ptr<grpc::ClientReader<grpc::ByteBuffer>> GetRecords(grpc::ClientContext* context,
                                                                   const v1::GetRecordsRequest& request) {
    return absl::WrapUnique(
        grpc::internal::ClientReaderFactory<grpc::ByteBuffer>::Create(channel_.get(), get_records_, context, request));
  }

 private:
  const std::shared_ptr<grpc::Channel> channel_;
  const grpc::internal::RpcMethod put_records_;
  const grpc::internal::RpcMethod get_records_;
};

class GrpcRecordsClient final : public RecordsClient {
 public:
  GrpcRecordsClient(std::vector<std::shared_ptr<grpc::Channel>> channels, size_t home)
      : stubs_(StubsOf<RecordsStub>(channels)), stores_(std::move(channels), home) {}

  absl::Status PutRecords(absl::Span<const v1::RecordInfo> infos, absl::Span<const absl::Span<const char>> data,
                          const std::shared_ptr<const void>& owner, absl::Time deadline) override {
    for (size_t i = 0; i < infos.size(); ++i) {
      if (data[i].size() == infos[i].bytes()) continue;
      return absl::DataLossError(
          absl::StrCat(Name(infos[i]), ": ", data[i].size(), " bytes given, its info says ", infos[i].bytes()));
    }
    return Retried(
        stores_, deadline,
        [&](size_t store, absl::Time limit) { return PutRecordsOnce(*stubs_[store], infos, data, owner, limit); },
        BytesOf(infos));
  }

  absl::Status ReadRecords(absl::Span<const v1::RecordInfo> infos, absl::Span<const absl::Span<char>> to,
                           absl::Time deadline) override {
    for (size_t i = 0; i < infos.size(); ++i) {
      if (to[i].size() == infos[i].bytes()) continue;
      return absl::DataLossError(
          absl::StrCat(Name(infos[i]), " has ", infos[i].bytes(), " bytes, its place ", to[i].size()));
    }
    return Retried(
        stores_, deadline,
        [&](size_t store, absl::Time limit) { return ReadRecordsOnce(*stubs_[store], infos, to, limit); },
        BytesOf(infos));
  }

 private:
  static std::string Name(const v1::RecordInfo& info) {
    return absl::StrCat("record ", info.snapshot_id(), "/", info.layer());
  }
  static uint64_t BytesOf(absl::Span<const v1::RecordInfo> infos) {
    uint64_t bytes = 0;
    for (const v1::RecordInfo& info : infos) bytes += info.bytes();
    return bytes;
  }

  static absl::Status PutRecordsOnce(RecordsStub& stub, absl::Span<const v1::RecordInfo> infos,
                                     absl::Span<const absl::Span<const char>> data,
                                     const std::shared_ptr<const void>& owner, absl::Time deadline) {
    grpc::ClientContext context;
    SetDeadline(context, deadline);
    context.set_initial_metadata_corked(true);  // Goes with the first message.
    v1::PutRecordsResponse response;
    const auto writer = stub.PutRecords(&context, &response);
    v1::PutRecordsRequest request;
    *request.mutable_infos()->mutable_records() = {infos.begin(), infos.end()};
    // A failed Write means that the store has answered already: Finish has the reason.
    const std::string head = request.SerializeAsString();
    const grpc::Slice head_slice(head);
    bool open = writer->Write(grpc::ByteBuffer(&head_slice, 1), grpc::WriteOptions().set_buffer_hint());
    uint64_t left = BytesOf(infos);
    for (absl::Span<const char> record : data) {
      while (open && !record.empty()) {
        const absl::Span<const char> piece = record.first(std::min(record.size(), kMaxPieceBytes));
        record.remove_prefix(piece.size());
        left -= piece.size();
        const grpc::ByteBuffer message = WireMessage(v1::PutRecordsRequest::kDataFieldNumber, piece, owner);
        if (left == 0) {
          writer->WriteLast(message, grpc::WriteOptions());
        } else {
          open = writer->Write(message, grpc::WriteOptions().set_buffer_hint());
        }
      }
    }
    if (open && BytesOf(infos) == 0) writer->WritesDone();
    return common::FromGrpcStatus(writer->Finish());
  }

  static absl::Status ReadRecordsOnce(RecordsStub& stub, absl::Span<const v1::RecordInfo> infos,
                                      absl::Span<const absl::Span<char>> to, absl::Time deadline) {
    grpc::ClientContext context;
    SetDeadline(context, deadline);
    v1::GetRecordsRequest request;
    *request.mutable_infos()->mutable_records() = {infos.begin(), infos.end()};
    const auto reader = stub.GetRecords(&context, request);
    grpc::ByteBuffer message;
    WireData data;
    size_t record = 0;  // That is coming.
    size_t came = 0;    // Of it.
    uint32_t crc = 0;
    absl::Status wrong;  // What came is not what was asked for.
    const auto add = [&](absl::Span<const char> piece) {
      if (piece.empty()) return;  // There may be no record that it could be of.
      std::memcpy(to[record].data() + came, piece.data(), piece.size());
      crc = ExtendCrc32c(crc, to[record].subspan(came, piece.size()));  // While it is in the cache.
      came += piece.size();
    };
    while (reader->Read(&message)) {
      v1::GetRecordsResponse response;
      const bool is_data = data.Read(v1::GetRecordsResponse::kDataFieldNumber, message);
      if (!is_data && !grpc::SerializationTraits<v1::GetRecordsResponse>::Deserialize(&message, &response).ok()) {
        return absl::InternalError("state store: an answer that is not a GetRecordsResponse");
      }
      if (!wrong.ok()) continue;
      const size_t room = record < infos.size() ? to[record].size() - came : 0;
      if ((is_data ? data.size() : response.data().size()) > room) {
        const v1::RecordInfo& info = infos[std::min(record, infos.size() - 1)];
        wrong = absl::DataLossError(absl::StrCat(Name(info), ": more than ", info.bytes(), " bytes came"));
      } else if (is_data) {
        data.ForEach(add);
      } else {
        add(response.data());
      }
      if (wrong.ok() && record < infos.size() && came == to[record].size()) {
        wrong = CheckCrc(infos[record], crc);
        ++record;
        came = crc = 0;
      }
      if (!wrong.ok()) context.TryCancel();
    }
    const grpc::Status status = reader->Finish();
    if (!wrong.ok()) return wrong;
    if (!status.ok()) return common::FromGrpcStatus(status);
    if (record == infos.size()) return absl::OkStatus();
    return absl::DataLossError(
        absl::StrCat(Name(infos[record]), ": ", came, " of ", infos[record].bytes(), " bytes came"));
  }

  static absl::Status CheckCrc(const v1::RecordInfo& info, uint32_t crc) {
    if (crc == info.crc32c()) return absl::OkStatus();
    return absl::DataLossError(absl::StrCat(Name(info), ": CRC32C ", absl::Hex(crc, absl::kZeroPad8), " came, want ",
                                            absl::Hex(info.crc32c(), absl::kZeroPad8)));
  }

  const std::vector<std::unique_ptr<RecordsStub>> stubs_;
  StoreChoice stores_;
};

}  // namespace

absl::StatusOr<std::string> RecordsClient::GetRecord(const v1::RecordInfo& info, absl::Time deadline) {
  if (info.bytes() > kMaxRecordBytes) {
    return common::InvalidFieldError("info.bytes", absl::StrCat(info.bytes(), " is over ", kMaxRecordBytes));
  }
  std::string data(info.bytes(), '\0');
  RWKV_RETURN_IF_ERROR(ReadRecord(info, absl::MakeSpan(data), deadline));
  return data;
}

std::unique_ptr<RecordsClient> NewRecordsClient(std::shared_ptr<grpc::Channel> channel) {
  return NewRecordsClient(Channels{std::move(channel)}, 0);
}
std::unique_ptr<RecordsClient> NewRecordsClient(Channels channels, absl::optional<size_t> home) {
  const size_t first = home.has_value() ? *home : AnyHome(channels.size());
  return std::make_unique<GrpcRecordsClient>(std::move(channels), first);
}

}  // namespace rwkv::state_store
