#include "services/state_store/client/state_store_client.h"

#include <algorithm>
#include <utility>

#include "absl/random/random.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "grpcpp/client_context.h"
#include "rwkv/v1/state_store.grpc.pb.h"
#include "services/common/grpc_status.h"
#include "services/state_store/client/crc32c.h"

namespace rwkv::state_store {
namespace {

// A store that restarts is away for about a second. Whoever must outlast that has its own loop; this only hides a
// connection that broke between two calls.
constexpr int kMaxAttempts = 4;
constexpr absl::Duration kFirstBackoff = absl::Milliseconds(20);  // Then 4x more each time: 20, 80, 320 ms.
constexpr size_t kMaxPieceBytes = size_t{1} << 20;
constexpr uint64_t kMaxRecordBytes = uint64_t{256} << 20;

void SetDeadline(grpc::ClientContext& context, absl::Time deadline) {
  if (deadline != absl::InfiniteFuture()) context.set_deadline(absl::ToChronoTime(deadline));
}

const absl::Status& StatusOf(const absl::Status& status) { return status; }
template <typename T>
const absl::Status& StatusOf(const absl::StatusOr<T>& result) {
  return result.status();
}

// `attempt` makes one whole call and returns absl::Status or StatusOr.
template <typename Attempt>
auto Retried(absl::Time deadline, Attempt attempt) {
  absl::BitGen random;
  absl::Duration backoff = kFirstBackoff;
  for (int i = 1;; ++i) {
    auto result = attempt();
    const absl::Duration wait = backoff * absl::Uniform(random, 0.5, 1.0);
    if (!absl::IsUnavailable(StatusOf(result)) || i == kMaxAttempts || absl::Now() + wait >= deadline) return result;
    absl::SleepFor(wait);
    backoff *= 4;
  }
}

template <typename Stub, typename Request, typename Response>
absl::StatusOr<Response> Call(Stub& stub, grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Response*),
                              const Request& request, absl::Time deadline) {
  grpc::ClientContext context;
  SetDeadline(context, deadline);
  Response response;
  const grpc::Status status = (stub.*method)(&context, request, &response);
  if (!status.ok()) return common::FromGrpcStatus(status);
  return response;
}

template <typename Stub, typename Request, typename Response>
absl::StatusOr<Response> RetriedCall(Stub& stub,
                                     grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Response*),
                                     const Request& request, absl::Time deadline) {
  return Retried(deadline, [&] { return Call(stub, method, request, deadline); });
}

class GrpcCatalogClient final : public CatalogClient {
 public:
  explicit GrpcCatalogClient(std::shared_ptr<grpc::Channel> channel) : stub_(std::move(channel)) {}

  absl::StatusOr<v1::StateCatalogDescribeResponse> Describe(const v1::StateCatalogDescribeRequest& request,
                                                            absl::Time deadline) override {
    return RetriedCall(stub_, &Stub::Describe, request, deadline);
  }
  absl::StatusOr<v1::CreateSessionResponse> CreateSession(const v1::CreateSessionRequest& request,
                                                          absl::Time deadline) override {
    return Call(stub_, &Stub::CreateSession, request, deadline);
  }
  absl::StatusOr<v1::ImportSessionResponse> ImportSession(const v1::ImportSessionRequest& request,
                                                          absl::Time deadline) override {
    return Call(stub_, &Stub::ImportSession, request, deadline);
  }
  absl::StatusOr<v1::GetSessionResponse> GetSession(const v1::GetSessionRequest& request,
                                                    absl::Time deadline) override {
    return RetriedCall(stub_, &Stub::GetSession, request, deadline);
  }
  absl::StatusOr<v1::ListSessionsResponse> ListSessions(const v1::ListSessionsRequest& request,
                                                        absl::Time deadline) override {
    return RetriedCall(stub_, &Stub::ListSessions, request, deadline);
  }
  absl::StatusOr<v1::ForkSessionResponse> ForkSession(const v1::ForkSessionRequest& request,
                                                      absl::Time deadline) override {
    return Call(stub_, &Stub::ForkSession, request, deadline);
  }
  absl::StatusOr<v1::RewindSessionResponse> RewindSession(const v1::RewindSessionRequest& request,
                                                          absl::Time deadline) override {
    return RetriedCall(stub_, &Stub::RewindSession, request, deadline);
  }
  absl::StatusOr<v1::DeleteSessionResponse> DeleteSession(const v1::DeleteSessionRequest& request,
                                                          absl::Time deadline) override {
    return Call(stub_, &Stub::DeleteSession, request, deadline);
  }
  absl::StatusOr<v1::AcquireLeaseResponse> AcquireLease(const v1::AcquireLeaseRequest& request,
                                                        absl::Time deadline) override {
    return RetriedCall(stub_, &Stub::AcquireLease, request, deadline);
  }
  absl::StatusOr<v1::RenewLeasesResponse> RenewLeases(const v1::RenewLeasesRequest& request,
                                                      absl::Time deadline) override {
    return RetriedCall(stub_, &Stub::RenewLeases, request, deadline);
  }
  absl::StatusOr<v1::ReleaseLeaseResponse> ReleaseLease(const v1::ReleaseLeaseRequest& request,
                                                        absl::Time deadline) override {
    return RetriedCall(stub_, &Stub::ReleaseLease, request, deadline);
  }
  absl::StatusOr<v1::BeginTurnResponse> BeginTurn(const v1::BeginTurnRequest& request, absl::Time deadline) override {
    return RetriedCall(stub_, &Stub::BeginTurn, request, deadline);
  }
  absl::StatusOr<v1::AppendTokensResponse> AppendTokens(const v1::AppendTokensRequest& request,
                                                        absl::Time deadline) override {
    return Call(stub_, &Stub::AppendTokens, request, deadline);
  }
  absl::StatusOr<v1::FindTurnResponse> FindTurn(const v1::FindTurnRequest& request, absl::Time deadline) override {
    return RetriedCall(stub_, &Stub::FindTurn, request, deadline);
  }
  absl::StatusOr<std::vector<uint32_t>> ReadTokens(const v1::ReadTokensRequest& request, absl::Time deadline) override {
    return Retried(deadline, [&] { return ReadTokensOnce(request, deadline); });
  }
  absl::StatusOr<v1::CommitSnapshotResponse> CommitSnapshot(const v1::CommitSnapshotRequest& request,
                                                            absl::Time deadline) override {
    return RetriedCall(stub_, &Stub::CommitSnapshot, request, deadline);
  }
  absl::StatusOr<v1::FindSnapshotResponse> FindSnapshot(const v1::FindSnapshotRequest& request,
                                                        absl::Time deadline) override {
    return RetriedCall(stub_, &Stub::FindSnapshot, request, deadline);
  }
  absl::StatusOr<v1::DropSnapshotResponse> DropSnapshot(const v1::DropSnapshotRequest& request,
                                                        absl::Time deadline) override {
    return RetriedCall(stub_, &Stub::DropSnapshot, request, deadline);
  }

 private:
  using Stub = v1::StateCatalog::Stub;

  absl::StatusOr<std::vector<uint32_t>> ReadTokensOnce(const v1::ReadTokensRequest& request, absl::Time deadline) {
    grpc::ClientContext context;
    SetDeadline(context, deadline);
    std::vector<uint32_t> tokens;
    v1::ReadTokensResponse response;
    const auto reader = stub_.ReadTokens(&context, request);
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

  Stub stub_;
};

class GrpcRecordsClient final : public RecordsClient {
 public:
  explicit GrpcRecordsClient(std::shared_ptr<grpc::Channel> channel) : stub_(std::move(channel)) {}

  absl::Status PutRecord(const v1::RecordInfo& info, absl::Span<const char> data, absl::Time deadline) override {
    if (data.size() != info.bytes()) {
      return absl::DataLossError(absl::StrCat("record ", info.snapshot_id(), "/", info.layer(), ": ", data.size(),
                                              " bytes given, its info says ", info.bytes()));
    }
    return Retried(deadline, [&] { return PutRecordOnce(info, data, deadline); });
  }

  absl::StatusOr<std::string> GetRecord(const v1::RecordInfo& info, absl::Time deadline) override {
    if (info.bytes() > kMaxRecordBytes) {
      return common::InvalidFieldError("info.bytes", absl::StrCat(info.bytes(), " is over ", kMaxRecordBytes));
    }
    return Retried(deadline, [&] { return GetRecordOnce(info, deadline); });
  }

 private:
  absl::Status PutRecordOnce(const v1::RecordInfo& info, absl::Span<const char> data, absl::Time deadline) {
    grpc::ClientContext context;
    SetDeadline(context, deadline);
    v1::PutRecordResponse response;
    const auto writer = stub_.PutRecord(&context, &response);
    v1::PutRecordRequest request;
    *request.mutable_info() = info;
    // A failed Write means that the store has answered already: Finish has the reason.
    bool open = writer->Write(request);
    while (open && !data.empty()) {
      const absl::Span<const char> piece = data.first(std::min(data.size(), kMaxPieceBytes));
      request.set_data(piece.data(), piece.size());
      open = writer->Write(request);
      data.remove_prefix(piece.size());
    }
    if (open) writer->WritesDone();
    return common::FromGrpcStatus(writer->Finish());
  }

  absl::StatusOr<std::string> GetRecordOnce(const v1::RecordInfo& info, absl::Time deadline) {
    grpc::ClientContext context;
    SetDeadline(context, deadline);
    v1::GetRecordRequest request;
    *request.mutable_info() = info;
    std::string data;
    data.reserve(info.bytes());
    v1::GetRecordResponse response;
    const auto reader = stub_.GetRecord(&context, request);
    bool too_long = false;
    while (reader->Read(&response)) {
      too_long |= data.size() + response.data().size() > info.bytes();
      if (too_long) {
        context.TryCancel();
      } else {
        data += response.data();
      }
    }
    const grpc::Status status = reader->Finish();
    const std::string name = absl::StrCat("record ", info.snapshot_id(), "/", info.layer());
    if (too_long) return absl::DataLossError(absl::StrCat(name, ": more than ", info.bytes(), " bytes came"));
    if (!status.ok()) return common::FromGrpcStatus(status);
    if (data.size() != info.bytes()) {
      return absl::DataLossError(absl::StrCat(name, ": ", data.size(), " of ", info.bytes(), " bytes came"));
    }
    if (const uint32_t crc = Crc32c(data); crc != info.crc32c()) {
      return absl::DataLossError(absl::StrCat(name, ": CRC32C ", absl::Hex(crc, absl::kZeroPad8), " came, want ",
                                              absl::Hex(info.crc32c(), absl::kZeroPad8)));
    }
    return data;
  }

  v1::StateRecords::Stub stub_;
};

}  // namespace

std::unique_ptr<CatalogClient> NewCatalogClient(std::shared_ptr<grpc::Channel> channel) {
  return std::make_unique<GrpcCatalogClient>(std::move(channel));
}

std::unique_ptr<RecordsClient> NewRecordsClient(std::shared_ptr<grpc::Channel> channel) {
  return std::make_unique<GrpcRecordsClient>(std::move(channel));
}

}  // namespace rwkv::state_store
