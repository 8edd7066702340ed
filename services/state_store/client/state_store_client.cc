#include "services/state_store/client/state_store_client.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/memory/memory.h"
#include "absl/random/random.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/blocking_counter.h"
#include "absl/time/clock.h"
#include "grpcpp/client_context.h"
#include "grpcpp/impl/rpc_method.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/slice.h"
#include "grpcpp/support/sync_stream.h"
#include "kernels/base/status_macros.h"
#include "rwkv/v1/state_store.grpc.pb.h"
#include "services/common/grpc_status.h"
#include "services/common/tracing/trace_context.h"
#include "services/state_store/client/crc32c.h"
#include "services/state_store/client/store_choice.h"
#include "services/state_store/client/wire_data.h"

namespace rwkv::state_store {
namespace {

// A store that restarts is away for about a second. Whoever must outlast that has its own loop; this only hides a
// connection that broke between two calls.
constexpr int kMaxAttempts = 4;
// Of several stores at least so many for each; the first at each comes at once.
constexpr int kMaxAttemptsPerStore = 2;
// One of several stores that says nothing for so long is left for another. A record has a second more per 10 MB.
constexpr absl::Duration kAttemptLimit = absl::Seconds(5);
constexpr absl::Duration kLastBackoffOfSeveral = absl::Milliseconds(500);
constexpr double kRecordBytesPerSecond = 10e6;
constexpr absl::Duration kFirstBackoff = absl::Milliseconds(20);  // Then 4x more each time: 20, 80, 320 ms.
constexpr size_t kMaxPieceBytes = size_t{1} << 20;
constexpr uint64_t kMaxRecordBytes = uint64_t{256} << 20;

// And the trace that the call is part of.
void SetDeadline(grpc::ClientContext& context, absl::Time deadline) {
  common::AddTrace(&context);
  if (deadline != absl::InfiniteFuture()) context.set_deadline(absl::ToChronoTime(deadline));
}

const absl::Status& StatusOf(const absl::Status& status) { return status; }
template <typename T>
const absl::Status& StatusOf(const absl::StatusOr<T>& result) {
  return result.status();
}

// How long a call at one of the stores may take.
absl::Time AttemptDeadline(const StoreChoice& stores, absl::Time deadline, uint64_t bytes = 0) {
  if (stores.size() == 1) return deadline;
  return std::min(deadline, absl::Now() + kAttemptLimit + absl::Seconds(bytes / kRecordBytesPerSecond));
}

// Makes one whole call, attempt(store, deadline), and learns from what came of it.
template <typename Attempt>
auto Tried(StoreChoice& stores, absl::Time deadline, absl::Time attempt_deadline, Attempt attempt) {
  const size_t store = stores.Choose(deadline);
  auto result = attempt(store, attempt_deadline);
  // Nobody cancels here: it is a store that ends with calls under way, done or not.
  if (absl::IsCancelled(StatusOf(result))) {
    result = absl::UnavailableError(absl::StrCat("the store ended the call: ", StatusOf(result).message()));
  }
  const absl::Status& status = StatusOf(result);
  if (absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status)) {
    stores.Failed(store);
  } else {
    stores.Answered(store);
  }
  return result;
}

// `bytes`: of the record, if it is one.
template <typename Attempt>
auto Retried(StoreChoice& stores, absl::Time deadline, Attempt attempt, uint64_t bytes = 0) {
  absl::BitGen random;
  const int others = static_cast<int>(stores.size()) - 1;
  const int most = std::max(kMaxAttempts, kMaxAttemptsPerStore * (others + 1));
  absl::Duration backoff = kFirstBackoff;
  for (int i = 1;; ++i) {
    const absl::Time attempt_deadline = AttemptDeadline(stores, deadline, bytes);
    auto result = Tried(stores, deadline, attempt_deadline, attempt);
    const absl::Status& status = StatusOf(result);
    const bool again = absl::IsUnavailable(status) || (absl::IsDeadlineExceeded(status) && attempt_deadline < deadline);
    const absl::Duration wait = i <= others ? absl::ZeroDuration() : backoff * absl::Uniform(random, 0.5, 1.0);
    if (!again || i == most || absl::Now() + wait >= deadline) return result;
    if (i <= others) continue;
    absl::SleepFor(wait);
    backoff *= 4;
    if (others > 0) backoff = std::min(backoff, kLastBackoffOfSeveral);
  }
}

// gRPC had no connection to send it on (1.51: pick_first.cc), though there was one a moment ago.
bool WasNeverSent(const absl::Status& status) {
  return absl::IsUnavailable(status) && absl::StartsWith(status.message(), "failed to connect to all addresses");
}

template <typename Stub>
std::vector<std::unique_ptr<Stub>> StubsOf(const std::vector<std::shared_ptr<grpc::Channel>>& channels) {
  std::vector<std::unique_ptr<Stub>> stubs;
  for (const std::shared_ptr<grpc::Channel>& channel : channels) stubs.push_back(std::make_unique<Stub>(channel));
  return stubs;
}

size_t AnyHome(size_t stores) {
  absl::BitGen random;
  return absl::Uniform<size_t>(random, 0, stores);
}

class GrpcCatalogClient final : public CatalogClient {
 public:
  GrpcCatalogClient(std::vector<std::shared_ptr<grpc::Channel>> channels, size_t home)
      : stubs_(StubsOf<Stub>(channels)), stores_(std::move(channels), home) {}

  absl::StatusOr<v1::StateCatalogDescribeResponse> Describe(const v1::StateCatalogDescribeRequest& request,
                                                            absl::Time deadline) override {
    return RetriedCall(&Stub::Describe, request, deadline);
  }
  absl::StatusOr<v1::CreateSessionResponse> CreateSession(const v1::CreateSessionRequest& request,
                                                          absl::Time deadline) override {
    return CallOnce(&Stub::CreateSession, request, deadline);
  }
  absl::StatusOr<v1::ImportSessionResponse> ImportSession(const v1::ImportSessionRequest& request,
                                                          absl::Time deadline) override {
    return CallOnce(&Stub::ImportSession, request, deadline);
  }
  absl::StatusOr<v1::GetSessionResponse> GetSession(const v1::GetSessionRequest& request,
                                                    absl::Time deadline) override {
    return RetriedCall(&Stub::GetSession, request, deadline);
  }
  absl::StatusOr<v1::ListSessionsResponse> ListSessions(const v1::ListSessionsRequest& request,
                                                        absl::Time deadline) override {
    return RetriedCall(&Stub::ListSessions, request, deadline);
  }
  absl::StatusOr<v1::ForkSessionResponse> ForkSession(const v1::ForkSessionRequest& request,
                                                      absl::Time deadline) override {
    return CallOnce(&Stub::ForkSession, request, deadline);
  }
  absl::StatusOr<v1::RewindSessionResponse> RewindSession(const v1::RewindSessionRequest& request,
                                                          absl::Time deadline) override {
    return RetriedCall(&Stub::RewindSession, request, deadline);
  }
  absl::StatusOr<v1::DeleteSessionResponse> DeleteSession(const v1::DeleteSessionRequest& request,
                                                          absl::Time deadline) override {
    return CallOnce(&Stub::DeleteSession, request, deadline);
  }
  absl::StatusOr<v1::AcquireLeaseResponse> AcquireLease(const v1::AcquireLeaseRequest& request,
                                                        absl::Time deadline) override {
    return RetriedCall(&Stub::AcquireLease, request, deadline);
  }
  absl::StatusOr<v1::RenewLeasesResponse> RenewLeases(const v1::RenewLeasesRequest& request,
                                                      absl::Time deadline) override {
    return RetriedCall(&Stub::RenewLeases, request, deadline);
  }
  absl::StatusOr<v1::ReleaseLeaseResponse> ReleaseLease(const v1::ReleaseLeaseRequest& request,
                                                        absl::Time deadline) override {
    return RetriedCall(&Stub::ReleaseLease, request, deadline);
  }
  absl::StatusOr<v1::BeginTurnResponse> BeginTurn(const v1::BeginTurnRequest& request, absl::Time deadline) override {
    return RetriedCall(&Stub::BeginTurn, request, deadline);
  }
  absl::StatusOr<v1::AppendTokensResponse> AppendTokens(const v1::AppendTokensRequest& request,
                                                        absl::Time deadline) override {
    return CallOnce(&Stub::AppendTokens, request, deadline);
  }
  absl::StatusOr<v1::FindTurnResponse> FindTurn(const v1::FindTurnRequest& request, absl::Time deadline) override {
    return RetriedCall(&Stub::FindTurn, request, deadline);
  }
  absl::StatusOr<std::vector<uint32_t>> ReadTokens(const v1::ReadTokensRequest& request, absl::Time deadline) override {
    return Retried(stores_, deadline,
                   [&](size_t store, absl::Time limit) { return ReadTokensOnce(*stubs_[store], request, limit); });
  }
  absl::StatusOr<v1::CommitSnapshotResponse> CommitSnapshot(const v1::CommitSnapshotRequest& request,
                                                            absl::Time deadline) override {
    return RetriedCall(&Stub::CommitSnapshot, request, deadline);
  }
  absl::StatusOr<v1::FindSnapshotResponse> FindSnapshot(const v1::FindSnapshotRequest& request,
                                                        absl::Time deadline) override {
    return RetriedCall(&Stub::FindSnapshot, request, deadline);
  }
  absl::StatusOr<v1::DropSnapshotResponse> DropSnapshot(const v1::DropSnapshotRequest& request,
                                                        absl::Time deadline) override {
    return RetriedCall(&Stub::DropSnapshot, request, deadline);
  }
  absl::StatusOr<v1::FindPrefixResponse> FindPrefix(const v1::FindPrefixRequest& request,
                                                    absl::Time deadline) override {
    return RetriedCall(&Stub::FindPrefix, request, deadline);
  }
  absl::StatusOr<v1::PutPrefixResponse> PutPrefix(const v1::PutPrefixRequest& request, absl::Time deadline) override {
    return RetriedCall(&Stub::PutPrefix, request, deadline);
  }
  absl::StatusOr<v1::DropPrefixResponse> DropPrefix(const v1::DropPrefixRequest& request,
                                                    absl::Time deadline) override {
    return RetriedCall(&Stub::DropPrefix, request, deadline);
  }
  absl::StatusOr<v1::GetUsageResponse> GetUsage(const v1::GetUsageRequest& request, absl::Time deadline) override {
    return RetriedCall(&Stub::GetUsage, request, deadline);
  }
  absl::StatusOr<v1::PutUsageResponse> PutUsage(const v1::PutUsageRequest& request, absl::Time deadline) override {
    return RetriedCall(&Stub::PutUsage, request, deadline);
  }

 private:
  using Stub = v1::StateCatalog::Stub;

  template <typename Request, typename Response>
  using Method = grpc::Status (Stub::*)(grpc::ClientContext*, const Request&, Response*);

  template <typename Request, typename Response>
  static absl::StatusOr<Response> Call(Stub& stub, Method<Request, Response> method, const Request& request,
                                       absl::Time deadline) {
    grpc::ClientContext context;
    SetDeadline(context, deadline);
    Response response;
    const grpc::Status status = (stub.*method)(&context, request, &response);
    if (!status.ok()) return common::FromGrpcStatus(status);
    return response;
  }

  template <typename Request, typename Response>
  absl::StatusOr<Response> CallOnce(Method<Request, Response> method, const Request& request, absl::Time deadline) {
    for (size_t tries = 1;; ++tries) {
      auto result = Tried(stores_, deadline, deadline, [&](size_t store, absl::Time limit) {
        return Call<Request, Response>(*stubs_[store], method, request, limit);
      });
      if (!WasNeverSent(result.status()) || tries >= stores_.size()) return result;
    }
  }

  template <typename Request, typename Response>
  absl::StatusOr<Response> RetriedCall(Method<Request, Response> method, const Request& request, absl::Time deadline) {
    return Retried(stores_, deadline, [&](size_t store, absl::Time limit) {
      return Call<Request, Response>(*stubs_[store], method, request, limit);
    });
  }

  static absl::StatusOr<std::vector<uint32_t>> ReadTokensOnce(Stub& stub, const v1::ReadTokensRequest& request,
                                                              absl::Time deadline) {
    grpc::ClientContext context;
    SetDeadline(context, deadline);
    std::vector<uint32_t> tokens;
    v1::ReadTokensResponse response;
    const auto reader = stub.ReadTokens(&context, request);
    while (reader->Read(&response)) {
      tokens.insert(tokens.end(), response.token_ids().begin(), response.token_ids().end());
    }
    if (const grpc::Status status = reader->Finish(); !status.ok()) return common::FromGrpcStatus(status);
    if (tokens.size() != request.end() - request.begin()) {
      return absl::InternalError(absl::StrCat("state store: ", tokens.size(), " tokens came for [", request.begin(),
                                              ", ", request.end(), ") of session ", request.session_id()));
    }
    return tokens;
  }

  const std::vector<std::unique_ptr<Stub>> stubs_;
  StoreChoice stores_;
};

// Not by the generated stub, which copies a record into a message and that onto the wire.
class RecordsStub {
 public:
  explicit RecordsStub(const std::shared_ptr<grpc::Channel>& channel)
      : channel_(channel),
        put_record_("/rwkv.v1.StateRecords/PutRecord", grpc::internal::RpcMethod::CLIENT_STREAMING, channel),
        get_record_("/rwkv.v1.StateRecords/GetRecord", grpc::internal::RpcMethod::SERVER_STREAMING, channel) {}

  // Messages are a PutRecordRequest's.
  std::unique_ptr<grpc::ClientWriter<grpc::ByteBuffer>> PutRecord(grpc::ClientContext* context,
                                                                  v1::PutRecordResponse* response) {
    return absl::WrapUnique(
        grpc::internal::ClientWriterFactory<grpc::ByteBuffer>::Create(channel_.get(), put_record_, context, response));
  }
  // Messages are a GetRecordResponse's.
  std::unique_ptr<grpc::ClientReader<grpc::ByteBuffer>> GetRecord(grpc::ClientContext* context,
                                                                  const v1::GetRecordRequest& request) {
    return absl::WrapUnique(
        grpc::internal::ClientReaderFactory<grpc::ByteBuffer>::Create(channel_.get(), get_record_, context, request));
  }

 private:
  const std::shared_ptr<grpc::Channel> channel_;
  const grpc::internal::RpcMethod put_record_;
  const grpc::internal::RpcMethod get_record_;
};

class GrpcRecordsClient final : public RecordsClient {
 public:
  GrpcRecordsClient(std::vector<std::shared_ptr<grpc::Channel>> channels, size_t home)
      : stubs_(StubsOf<RecordsStub>(channels)), stores_(std::move(channels), home) {}

  absl::Status PutRecord(const v1::RecordInfo& info, absl::Span<const char> data,
                         const std::shared_ptr<const void>& owner, absl::Time deadline) override {
    if (data.size() != info.bytes()) {
      return absl::DataLossError(absl::StrCat("record ", info.snapshot_id(), "/", info.layer(), ": ", data.size(),
                                              " bytes given, its info says ", info.bytes()));
    }
    return Retried(
        stores_, deadline,
        [&](size_t store, absl::Time limit) { return PutRecordOnce(*stubs_[store], info, data, owner, limit); },
        info.bytes());
  }

  absl::Status ReadRecord(const v1::RecordInfo& info, absl::Span<char> to, absl::Time deadline) override {
    if (to.size() != info.bytes()) {
      return absl::DataLossError(absl::StrCat("record ", info.snapshot_id(), "/", info.layer(), " has ", info.bytes(),
                                              " bytes, its place ", to.size()));
    }
    return Retried(
        stores_, deadline,
        [&](size_t store, absl::Time limit) { return ReadRecordOnce(*stubs_[store], info, to, limit); }, info.bytes());
  }

 private:
  static absl::Status PutRecordOnce(RecordsStub& stub, const v1::RecordInfo& info, absl::Span<const char> data,
                                    const std::shared_ptr<const void>& owner, absl::Time deadline) {
    grpc::ClientContext context;
    SetDeadline(context, deadline);
    context.set_initial_metadata_corked(true);  // Goes with the first message.
    v1::PutRecordResponse response;
    const auto writer = stub.PutRecord(&context, &response);
    v1::PutRecordRequest request;
    *request.mutable_info() = info;
    // A failed Write means that the store has answered already: Finish has the reason.
    const std::string head = request.SerializeAsString();
    const grpc::Slice head_slice(head);
    bool open = writer->Write(grpc::ByteBuffer(&head_slice, 1), grpc::WriteOptions().set_buffer_hint());
    while (open && !data.empty()) {
      const absl::Span<const char> piece = data.first(std::min(data.size(), kMaxPieceBytes));
      data.remove_prefix(piece.size());
      const grpc::ByteBuffer message = WireMessage(v1::PutRecordRequest::kDataFieldNumber, piece, owner);
      if (data.empty()) {
        writer->WriteLast(message, grpc::WriteOptions());
      } else {
        open = writer->Write(message, grpc::WriteOptions().set_buffer_hint());
      }
    }
    if (open && info.bytes() == 0) writer->WritesDone();
    return common::FromGrpcStatus(writer->Finish());
  }

  static absl::Status ReadRecordOnce(RecordsStub& stub, const v1::RecordInfo& info, absl::Span<char> to,
                                     absl::Time deadline) {
    grpc::ClientContext context;
    SetDeadline(context, deadline);
    v1::GetRecordRequest request;
    *request.mutable_info() = info;
    const auto reader = stub.GetRecord(&context, request);
    grpc::ByteBuffer message;
    WireData data;
    size_t came = 0;
    uint32_t crc = 0;
    const auto add = [&](absl::Span<const char> piece) {
      std::memcpy(to.data() + came, piece.data(), piece.size());
      crc = ExtendCrc32c(crc, to.subspan(came, piece.size()));  // While it is in the cache.
      came += piece.size();
    };
    bool too_long = false;
    while (reader->Read(&message)) {
      v1::GetRecordResponse response;
      const bool is_data = data.Read(v1::GetRecordResponse::kDataFieldNumber, message);
      if (!is_data && !grpc::SerializationTraits<v1::GetRecordResponse>::Deserialize(&message, &response).ok()) {
        return absl::InternalError("state store: an answer that is not a GetRecordResponse");
      }
      too_long |= (is_data ? data.size() : response.data().size()) > to.size() - came;
      if (too_long) {
        context.TryCancel();
      } else if (is_data) {
        data.ForEach(add);
      } else {
        add(response.data());
      }
    }
    const grpc::Status status = reader->Finish();
    const std::string name = absl::StrCat("record ", info.snapshot_id(), "/", info.layer());
    if (too_long) return absl::DataLossError(absl::StrCat(name, ": more than ", info.bytes(), " bytes came"));
    if (!status.ok()) return common::FromGrpcStatus(status);
    if (came != info.bytes()) {
      return absl::DataLossError(absl::StrCat(name, ": ", came, " of ", info.bytes(), " bytes came"));
    }
    if (crc != info.crc32c()) {
      return absl::DataLossError(absl::StrCat(name, ": CRC32C ", absl::Hex(crc, absl::kZeroPad8), " came, want ",
                                              absl::Hex(info.crc32c(), absl::kZeroPad8)));
    }
    return absl::OkStatus();
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

std::unique_ptr<CatalogClient> NewCatalogClient(std::shared_ptr<grpc::Channel> channel) {
  return NewCatalogClient(Channels{std::move(channel)}, 0);
}
std::unique_ptr<CatalogClient> NewCatalogClient(Channels channels, absl::optional<size_t> home) {
  const size_t first = home.has_value() ? *home : AnyHome(channels.size());
  return std::make_unique<GrpcCatalogClient>(std::move(channels), first);
}

std::unique_ptr<RecordsClient> NewRecordsClient(std::shared_ptr<grpc::Channel> channel) {
  return NewRecordsClient(Channels{std::move(channel)}, 0);
}
std::unique_ptr<RecordsClient> NewRecordsClient(Channels channels, absl::optional<size_t> home) {
  const size_t first = home.has_value() ? *home : AnyHome(channels.size());
  return std::make_unique<GrpcRecordsClient>(std::move(channels), first);
}

std::vector<absl::StatusOr<v1::StateCatalogDescribeResponse>> DescribeStores(const Channels& channels,
                                                                             absl::Time deadline) {
  struct Call {
    explicit Call(const std::shared_ptr<grpc::Channel>& channel) : stub(channel) {}
    v1::StateCatalog::Stub stub;
    grpc::ClientContext context;
    v1::StateCatalogDescribeRequest request;
    v1::StateCatalogDescribeResponse response;
    grpc::Status status;
  };
  absl::BlockingCounter left(static_cast<int>(channels.size()));
  std::vector<std::unique_ptr<Call>> calls;
  for (const std::shared_ptr<grpc::Channel>& channel : channels) {
    Call* const call = calls.emplace_back(std::make_unique<Call>(channel)).get();
    SetDeadline(call->context, deadline);
    call->stub.async()->Describe(&call->context, &call->request, &call->response, [call, &left](grpc::Status status) {
      call->status = std::move(status);
      left.DecrementCount();
    });
  }
  left.Wait();
  std::vector<absl::StatusOr<v1::StateCatalogDescribeResponse>> answers;
  for (const std::unique_ptr<Call>& call : calls) {
    if (call->status.ok()) {
      answers.emplace_back(std::move(call->response));
    } else {
      answers.emplace_back(common::FromGrpcStatus(call->status));
    }
  }
  return answers;
}

}  // namespace rwkv::state_store
