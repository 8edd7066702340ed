#include "services/state_store/client/state_store_client.h"

#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/blocking_counter.h"
#include "grpcpp/client_context.h"
#include "rwkv/v1/state_store.grpc.pb.h"
#include "services/common/grpc_status.h"
#include "services/state_store/client/store_calls.h"
#include "services/state_store/client/store_choice.h"

namespace rwkv::state_store {
namespace {

// gRPC had no connection to send it on (1.51: pick_first.cc), though there was one a moment ago.
bool WasNeverSent(const absl::Status& status) {
  return absl::IsUnavailable(status) && absl::StartsWith(status.message(), "failed to connect to all addresses");
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

}  // namespace

std::unique_ptr<CatalogClient> NewCatalogClient(std::shared_ptr<grpc::Channel> channel) {
  return NewCatalogClient(Channels{std::move(channel)}, 0);
}
std::unique_ptr<CatalogClient> NewCatalogClient(Channels channels, absl::optional<size_t> home) {
  const size_t first = home.has_value() ? *home : AnyHome(channels.size());
  return std::make_unique<GrpcCatalogClient>(std::move(channels), first);
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
