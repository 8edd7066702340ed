#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>

#include "absl/memory/memory.h"
#include "absl/strings/str_cat.h"
#include "absl/types/optional.h"
#include "grpcpp/client_context.h"
#include "grpcpp/impl/codegen/proto_utils.h"
#include "grpcpp/impl/rpc_method.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/slice.h"
#include "grpcpp/support/sync_stream.h"
#include "kernels/base/status_macros.h"
#include "rwkv/v1/state_store.pb.h"
#include "services/common/grpc_status.h"
#include "services/common/logging.h"
#include "services/state_store/client/crc32c.h"
#include "services/state_store/client/shared_window.h"
#include "services/state_store/client/state_store_client.h"
#include "services/state_store/client/store_calls.h"
#include "services/state_store/client/store_choice.h"
#include "services/state_store/client/wire_data.h"

namespace rwkv::state_store {
namespace {

constexpr size_t kMaxPieceBytes = size_t{1} << 20;
constexpr uint64_t kMaxRecordBytes = uint64_t{256} << 20;
// Calls at a time that go through shared memory, and the bytes of each; others go by the connection.
constexpr size_t kPlaces = 8;
constexpr size_t kPlaceBytes = size_t{8} << 20;
constexpr size_t kSharedPieceBytes = size_t{128} << 10;  // Is in the cache while its checksum is made.
constexpr char kNoSharedMemory[] = "NO_SHARED_MEMORY";

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

std::string Name(const v1::RecordInfo& info) { return absl::StrCat("record ", info.snapshot_id(), "/", info.layer()); }

// Records that come, one after the other, in pieces.
class Arrival {
 public:
  Arrival(absl::Span<const v1::RecordInfo> infos, absl::Span<const absl::Span<char>> to) : infos_(infos), to_(to) {}

  // Of one record. kDataLoss: it is not what was asked for.
  absl::Status Add(const WireData& data) {
    RWKV_RETURN_IF_ERROR(CheckRoom(data.size()));
    data.ForEach([this](absl::Span<const char> piece) { Copy(piece); });
    return CheckIfWhole();
  }
  absl::Status Add(const std::string& data) {
    RWKV_RETURN_IF_ERROR(CheckRoom(data.size()));
    Copy(data);
    return CheckIfWhole();
  }
  // All of them.
  absl::Status ReadAll(const SharedFile& file) {
    uint64_t at = 0;
    while (record_ < infos_.size()) {
      const absl::Span<char> piece = to_[record_].subspan(came_, kSharedPieceBytes);
      RWKV_RETURN_IF_ERROR(file.Read(at, piece));
      at += piece.size();
      Count(piece.size());
      RWKV_RETURN_IF_ERROR(CheckIfWhole());
    }
    return absl::OkStatus();
  }
  // Nothing more comes.
  absl::Status End() const {
    if (record_ == infos_.size()) return absl::OkStatus();
    return absl::DataLossError(
        absl::StrCat(Name(infos_[record_]), ": ", came_, " of ", infos_[record_].bytes(), " bytes came"));
  }

 private:
  absl::Status CheckRoom(size_t bytes) const {
    if (bytes <= (record_ < infos_.size() ? to_[record_].size() - came_ : 0)) return absl::OkStatus();
    const v1::RecordInfo& info = infos_[std::min(record_, infos_.size() - 1)];
    return absl::DataLossError(absl::StrCat(Name(info), ": more than ", info.bytes(), " bytes came"));
  }
  void Copy(absl::Span<const char> piece) {
    if (piece.empty()) return;  // There may be no record that it could be of.
    std::memcpy(to_[record_].data() + came_, piece.data(), piece.size());
    Count(piece.size());
  }
  void Count(size_t bytes) {
    crc_ = ExtendCrc32c(crc_, to_[record_].subspan(came_, bytes));  // While it is in the cache.
    came_ += bytes;
  }
  absl::Status CheckIfWhole() {
    if (record_ == infos_.size() || came_ < to_[record_].size()) return absl::OkStatus();
    const v1::RecordInfo& info = infos_[record_++];
    const uint32_t crc = std::exchange(crc_, 0);
    came_ = 0;
    if (crc == info.crc32c()) return absl::OkStatus();
    return absl::DataLossError(absl::StrCat(Name(info), ": CRC32C ", absl::Hex(crc, absl::kZeroPad8), " came, want ",
                                            absl::Hex(info.crc32c(), absl::kZeroPad8)));
  }

  const absl::Span<const v1::RecordInfo> infos_;
  const absl::Span<const absl::Span<char>> to_;
  size_t record_ = 0;  // That is coming.
  size_t came_ = 0;    // Of it.
  uint32_t crc_ = 0;   // Of that.
};

class GrpcRecordsClient final : public RecordsClient {
 public:
  GrpcRecordsClient(std::vector<std::shared_ptr<grpc::Channel>> channels, size_t home, bool share_memory)
      : stubs_(StubsOf<RecordsStub>(channels)),
        shares_(stubs_.size()),
        window_(share_memory ? SharedWindow::Create(kPlaces, kPlaceBytes) : nullptr),
        stores_(std::move(channels), home) {
    for (std::atomic<bool>& shares : shares_) shares = share_memory;
  }

  absl::Status PutRecords(absl::Span<const v1::RecordInfo> infos, absl::Span<const absl::Span<const char>> data,
                          size_t in_all, const std::shared_ptr<const void>& owner, absl::Time deadline) override {
    for (size_t i = 0; i < infos.size(); ++i) {
      if (data[i].size() == infos[i].bytes()) continue;
      return absl::DataLossError(
          absl::StrCat(Name(infos[i]), ": ", data[i].size(), " bytes given, its info says ", infos[i].bytes()));
    }
    return Retried(
        stores_, deadline,
        [&](size_t store, absl::Time limit) {
          const absl::optional<absl::Status> done = PutShared(store, infos, data, in_all, limit);
          return done.has_value() ? *done : PutRecordsOnce(*stubs_[store], infos, data, in_all, owner, limit);
        },
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
        [&](size_t store, absl::Time limit) {
          absl::optional<SharedWindow::Place> place = TakePlace(store, BytesOf(infos));
          bool refused = false;
          absl::Status status =
              ReadRecordsOnce(*stubs_[store], infos, to, place.has_value() ? &*place : nullptr, limit, &refused);
          if (refused) shares_[store] = false;
          const bool given_up =
              absl::IsDeadlineExceeded(status) || absl::IsCancelled(status) || absl::IsUnavailable(status);
          if (given_up && place.has_value()) place->Abandon();
          return status;
        },
        BytesOf(infos));
  }

 private:
  static v1::PutRecordsRequest Head(absl::Span<const v1::RecordInfo> infos, size_t in_all) {
    v1::PutRecordsRequest request;
    *request.mutable_infos()->mutable_records() = {infos.begin(), infos.end()};
    request.set_records_in_all(static_cast<uint32_t>(in_all));
    return request;
  }

  static uint64_t BytesOf(absl::Span<const v1::RecordInfo> infos) {
    uint64_t bytes = 0;
    for (const v1::RecordInfo& info : infos) bytes += info.bytes();
    return bytes;
  }

  // Unset: the store is asked without one.
  absl::optional<SharedWindow::Place> TakePlace(size_t store, uint64_t bytes) {
    if (!shares_[store]) return absl::nullopt;
    absl::StatusOr<absl::optional<SharedWindow::Place>> place = window_->Take(bytes);
    if (place.ok()) return *std::move(place);
    common::LogWarning("no_shared_memory", {{"error", place.status()}, {"then", "records go by connections"}});
    for (std::atomic<bool>& shares : shares_) shares = false;
    return absl::nullopt;
  }

  // Unset: the records have to go by the connection.
  absl::optional<absl::Status> PutShared(size_t store, absl::Span<const v1::RecordInfo> infos,
                                         absl::Span<const absl::Span<const char>> data, size_t in_all,
                                         absl::Time deadline) {
    const absl::optional<SharedWindow::Place> place = TakePlace(store, BytesOf(infos));
    if (!place.has_value()) return absl::nullopt;
    uint64_t at = 0;
    for (const absl::Span<const char> record : data) {
      if (!place->file().Write(at, record).ok()) return absl::nullopt;  // No memory.
      at += record.size();
    }
    grpc::ClientContext context;
    SetDeadline(context, deadline);
    context.set_initial_metadata_corked(true);
    v1::PutRecordsResponse response;
    const auto writer = stubs_[store]->PutRecords(&context, &response);
    v1::PutRecordsRequest request = Head(infos, in_all);
    request.mutable_shared()->set_name(place->name());
    const grpc::Slice message(request.SerializeAsString());
    writer->WriteLast(grpc::ByteBuffer(&message, 1), grpc::WriteOptions());
    const absl::Status status = common::FromGrpcStatus(writer->Finish());
    // Whatever became of the bytes there, the connection tells what is wrong with them. A store of an older version finds
    // none.
    const bool refused = common::GetErrorReason(status) == std::string(kNoSharedMemory) || absl::IsDataLoss(status);
    if (!refused) return status;
    shares_[store] = false;
    return absl::nullopt;
  }

  static absl::Status PutRecordsOnce(RecordsStub& stub, absl::Span<const v1::RecordInfo> infos,
                                     absl::Span<const absl::Span<const char>> data, size_t in_all,
                                     const std::shared_ptr<const void>& owner, absl::Time deadline) {
    grpc::ClientContext context;
    SetDeadline(context, deadline);
    context.set_initial_metadata_corked(true);  // Goes with the first message.
    v1::PutRecordsResponse response;
    const auto writer = stub.PutRecords(&context, &response);
    // A failed Write means that the store has answered already: Finish has the reason.
    const std::string head = Head(infos, in_all).SerializeAsString();
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

  // `place`: where the bytes may come; null: nowhere. *refused: they came by the connection nevertheless.
  static absl::Status ReadRecordsOnce(RecordsStub& stub, absl::Span<const v1::RecordInfo> infos,
                                      absl::Span<const absl::Span<char>> to, const SharedWindow::Place* place,
                                      absl::Time deadline, bool* refused) {
    grpc::ClientContext context;
    SetDeadline(context, deadline);
    v1::GetRecordsRequest request;
    *request.mutable_infos()->mutable_records() = {infos.begin(), infos.end()};
    if (place != nullptr) {
      request.mutable_shared()->set_name(place->name());
    }
    const auto reader = stub.GetRecords(&context, request);
    grpc::ByteBuffer message;
    WireData data;
    Arrival arrival(infos, to);
    absl::Status wrong;  // What came is not what was asked for.
    while (reader->Read(&message)) {
      v1::GetRecordsResponse response;
      const bool is_data = data.Read(v1::GetRecordsResponse::kDataFieldNumber, message);
      if (!is_data && !grpc::SerializationTraits<v1::GetRecordsResponse>::Deserialize(&message, &response).ok()) {
        return absl::InternalError("state store: an answer that is not a GetRecordsResponse");
      }
      if (!wrong.ok()) continue;
      if (place != nullptr && response.shared()) {
        wrong = arrival.ReadAll(place->file());
      } else {
        *refused = place != nullptr;
        wrong = is_data ? arrival.Add(data) : arrival.Add(response.data());
      }
      if (!wrong.ok()) context.TryCancel();
    }
    const grpc::Status status = reader->Finish();
    if (!wrong.ok()) return wrong;
    if (!status.ok()) return common::FromGrpcStatus(status);
    return arrival.End();
  }

  const std::vector<std::unique_ptr<RecordsStub>> stubs_;
  std::vector<std::atomic<bool>> shares_;       // Of each store: whether it may have memory in common with us.
  const std::shared_ptr<SharedWindow> window_;  // Null: nothing is shared.
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

std::unique_ptr<RecordsClient> NewRecordsClient(std::shared_ptr<grpc::Channel> channel, bool share_memory) {
  return NewRecordsClient(Channels{std::move(channel)}, 0, share_memory);
}
std::unique_ptr<RecordsClient> NewRecordsClient(Channels channels, absl::optional<size_t> home, bool share_memory) {
  const size_t first = home.has_value() ? *home : AnyHome(channels.size());
  return std::make_unique<GrpcRecordsClient>(std::move(channels), first, share_memory);
}

}  // namespace rwkv::state_store
