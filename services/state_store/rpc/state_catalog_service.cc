#include "services/state_store/rpc/state_catalog_service.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "kernels/base/status_macros.h"
#include "services/common/grpc_status.h"
#include "services/state_store/catalog/catalog.h"
#include "services/state_store/rpc/validation.h"

namespace rwkv::state_store {
namespace {

constexpr uint64_t kPageTokens = 65536;

// Indices into the names below.
enum Method : size_t {
  kDescribe,
  kCreateSession,
  kImportSession,
  kGetSession,
  kListSessions,
  kForkSession,
  kRewindSession,
  kDeleteSession,
  kAcquireLease,
  kRenewLeases,
  kReleaseLease,
  kBeginTurn,
  kAppendTokens,
  kFindTurn,
  kReadTokens,
  kCommitSnapshot,
  kFindSnapshot,
  kDropSnapshot,
  kFindPrefix,
  kPutPrefix,
  kDropPrefix,
  kGetUsage,
  kPutUsage,
};

// The session that a request is about; empty: none, or several.
template <typename Request>
auto SessionOf(const Request& request, int) -> decltype(request.lease().session_id()) {
  return request.lease().session_id();
}
template <typename Request>
auto SessionOf(const Request& request, int) -> decltype(request.session_id()) {
  return request.session_id();
}
template <typename Request>
std::string SessionOf(const Request&, long) {  // NOLINT(google-runtime-int): what fits second best.
  return "";
}

}  // namespace

StateCatalogService::StateCatalogService(const Identity& identity, StateStore* store, common::Metrics* metrics)
    : identity_(identity),
      store_(store),
      metrics_(metrics, {"describe",        "create_session", "import_session", "get_session",   "list_sessions",
                         "fork_session",    "rewind_session", "delete_session", "acquire_lease", "renew_leases",
                         "release_lease",   "begin_turn",     "append_tokens",  "find_turn",     "read_tokens",
                         "commit_snapshot", "find_snapshot",  "drop_snapshot",  "find_prefix",   "put_prefix",
                         "drop_prefix",     "get_usage",      "put_usage"}),
      append_items_(metrics->Histogram("rwkv_state_store_append_items", "Turns in one AppendTokens, so in one commit.",
                                       common::Metrics::CountBuckets())) {}

grpc::Status StateCatalogService::Answer(const grpc::ServerContext& context, size_t method,
                                         absl::string_view session_id, absl::FunctionRef<absl::Status()> handle) const {
  return metrics_.Answer(method, [&]() -> absl::Status {
    // A process that was stopped finds calls that were given up long ago, and have perhaps been made at another store.
    if (context.IsCancelled()) return absl::CancelledError("the caller has gone");
    const absl::Status status = handle();
    // Rows of logs and states are named by numbers, which say nothing to who asked.
    if (!absl::IsDataLoss(status) || session_id.empty() || absl::StrContains(status.message(), session_id)) {
      return status;
    }
    return absl::DataLossError(absl::StrCat("session ", session_id, ": ", status.message()));
  });
}

grpc::Status StateCatalogService::Describe(grpc::ServerContext* context, const v1::StateCatalogDescribeRequest* request,
                                           v1::StateCatalogDescribeResponse* response) {
  return Answer(*context, kDescribe, SessionOf(*request, 0), [&]() -> absl::Status {
    response->set_name(identity_.name);
    response->set_pid(identity_.pid);
    response->set_metrics_address(identity_.metrics_address);
    return absl::OkStatus();
  });
}

grpc::Status StateCatalogService::CreateSession(grpc::ServerContext* context, const v1::CreateSessionRequest* request,
                                                v1::CreateSessionResponse* response) {
  return Answer(*context, kCreateSession, SessionOf(*request, 0), [&]() -> absl::Status {
    RWKV_RETURN_IF_ERROR(Validate(*request));
    RWKV_ASSIGN_OR_RETURN(*response->mutable_session(),
                          store_->CreateSession(request->session_id(), request->initial_state()));
    return absl::OkStatus();
  });
}

grpc::Status StateCatalogService::ImportSession(grpc::ServerContext* context, const v1::ImportSessionRequest* request,
                                                v1::ImportSessionResponse* response) {
  return Answer(*context, kImportSession, SessionOf(*request, 0), [&]() -> absl::Status {
    RWKV_RETURN_IF_ERROR(Validate(*request));
    NewImport import;
    import.initial_state = request->initial_state();
    import.manifest = request->manifest();
    import.token_ids = request->token_ids();
    import.base = request->base();
    RWKV_ASSIGN_OR_RETURN(*response->mutable_session(), store_->ImportSession(request->session_id(), import));
    return absl::OkStatus();
  });
}

grpc::Status StateCatalogService::GetSession(grpc::ServerContext* context, const v1::GetSessionRequest* request,
                                             v1::GetSessionResponse* response) {
  return Answer(*context, kGetSession, SessionOf(*request, 0), [&]() -> absl::Status {
    RWKV_RETURN_IF_ERROR(Validate(*request));
    RWKV_ASSIGN_OR_RETURN(*response->mutable_session(), store_->catalog().GetSession(request->session_id()));
    return absl::OkStatus();
  });
}

grpc::Status StateCatalogService::ListSessions(grpc::ServerContext* context, const v1::ListSessionsRequest* request,
                                               v1::ListSessionsResponse* response) {
  return Answer(*context, kListSessions, SessionOf(*request, 0), [&]() -> absl::Status {
    RWKV_RETURN_IF_ERROR(Validate(*request));
    const int page_size = request->page_size() == 0 ? kDefaultPageSize : static_cast<int>(request->page_size());
    RWKV_ASSIGN_OR_RETURN(SessionPage page, store_->catalog().ListSessions(page_size, request->page_token()));
    for (v1::Session& session : page.sessions) *response->add_sessions() = std::move(session);
    response->set_next_page_token(page.next_page_token);
    return absl::OkStatus();
  });
}

grpc::Status StateCatalogService::ForkSession(grpc::ServerContext* context, const v1::ForkSessionRequest* request,
                                              v1::ForkSessionResponse* response) {
  return Answer(*context, kForkSession, SessionOf(*request, 0), [&]() -> absl::Status {
    RWKV_RETURN_IF_ERROR(Validate(*request));
    const absl::optional<uint64_t> position =
        request->has_position() ? absl::make_optional(request->position()) : absl::nullopt;
    RWKV_ASSIGN_OR_RETURN(*response->mutable_session(),
                          store_->ForkSession(request->session_id(), position, request->new_session_id()));
    return absl::OkStatus();
  });
}

grpc::Status StateCatalogService::RewindSession(grpc::ServerContext* context, const v1::RewindSessionRequest* request,
                                                v1::RewindSessionResponse* response) {
  return Answer(*context, kRewindSession, SessionOf(*request, 0), [&]() -> absl::Status {
    RWKV_RETURN_IF_ERROR(Validate(*request));
    RWKV_ASSIGN_OR_RETURN(*response->mutable_session(),
                          store_->RewindSession(request->lease(), request->position(), request->log_branch()));
    return absl::OkStatus();
  });
}

grpc::Status StateCatalogService::DeleteSession(grpc::ServerContext* context, const v1::DeleteSessionRequest* request,
                                                v1::DeleteSessionResponse* response) {
  return Answer(*context, kDeleteSession, SessionOf(*request, 0), [&]() -> absl::Status {
    RWKV_RETURN_IF_ERROR(Validate(*request));
    return store_->DeleteSession(request->lease());
  });
}

grpc::Status StateCatalogService::AcquireLease(grpc::ServerContext* context, const v1::AcquireLeaseRequest* request,
                                               v1::AcquireLeaseResponse* response) {
  return Answer(*context, kAcquireLease, SessionOf(*request, 0), [&]() -> absl::Status {
    RWKV_RETURN_IF_ERROR(Validate(*request));
    RWKV_ASSIGN_OR_RETURN(const absl::Duration ttl, ValidateTtl("ttl", request->has_ttl(), request->ttl()));
    RWKV_ASSIGN_OR_RETURN(LeaseGrant grant, store_->catalog().AcquireLease(request->session_id(), request->holder(),
                                                                           request->incarnation(), ttl));
    *response->mutable_lease() = std::move(grant.lease);
    *response->mutable_session() = std::move(grant.session);
    response->set_log_branch(grant.log_branch);
    return absl::OkStatus();
  });
}

grpc::Status StateCatalogService::RenewLeases(grpc::ServerContext* context, const v1::RenewLeasesRequest* request,
                                              v1::RenewLeasesResponse* response) {
  return Answer(*context, kRenewLeases, SessionOf(*request, 0), [&]() -> absl::Status {
    RWKV_RETURN_IF_ERROR(Validate(*request));
    RWKV_ASSIGN_OR_RETURN(const absl::Duration ttl, ValidateTtl("ttl", request->has_ttl(), request->ttl()));
    const std::vector<v1::Lease> leases(request->leases().begin(), request->leases().end());
    RWKV_ASSIGN_OR_RETURN(const std::vector<v1::Lease> lost, store_->catalog().RenewLeases(leases, ttl));
    for (const v1::Lease& lease : lost) *response->add_lost() = lease;
    return absl::OkStatus();
  });
}

grpc::Status StateCatalogService::ReleaseLease(grpc::ServerContext* context, const v1::ReleaseLeaseRequest* request,
                                               v1::ReleaseLeaseResponse* response) {
  return Answer(*context, kReleaseLease, SessionOf(*request, 0), [&]() -> absl::Status {
    RWKV_RETURN_IF_ERROR(Validate(*request));
    return store_->catalog().ReleaseLease(request->lease());
  });
}

grpc::Status StateCatalogService::BeginTurn(grpc::ServerContext* context, const v1::BeginTurnRequest* request,
                                            v1::BeginTurnResponse* response) {
  return Answer(*context, kBeginTurn, SessionOf(*request, 0), [&]() -> absl::Status {
    RWKV_RETURN_IF_ERROR(Validate(*request));
    NewTurn turn;
    turn.request_id = request->request_id();
    turn.token_ids = request->token_ids();
    turn.spec = request->spec();
    turn.model_fingerprint = request->model_fingerprint();
    RWKV_ASSIGN_OR_RETURN(TurnStart start, store_->BeginTurn(request->lease(), turn));
    *response->mutable_turn() = std::move(start.turn);
    response->set_existed(start.existed);
    response->set_session_tokens(start.session_tokens);
    return absl::OkStatus();
  });
}

grpc::Status StateCatalogService::AppendTokens(grpc::ServerContext* context, const v1::AppendTokensRequest* request,
                                               v1::AppendTokensResponse* response) {
  return Answer(*context, kAppendTokens, SessionOf(*request, 0), [&]() -> absl::Status {
    RWKV_RETURN_IF_ERROR(Validate(*request));
    std::vector<absl::Status> statuses;
    std::vector<const v1::AppendItem*> items;
    std::vector<size_t> indices;  // Of `items` in the request.
    for (const v1::AppendItem& item : request->items()) {
      statuses.push_back(ValidateItem(item));
      if (!statuses.back().ok()) continue;
      items.push_back(&item);
      indices.push_back(statuses.size() - 1);
    }
    if (!items.empty()) {
      append_items_.Observe(static_cast<double>(items.size()));
      const std::vector<absl::Status> results = store_->catalog().AppendTokens(items);
      for (size_t i = 0; i < items.size(); ++i) statuses[indices[i]] = results[i];
    }
    for (const absl::Status& status : statuses) {
      metrics_.CountError(status);
      *response->add_statuses() = common::ToStatusProto(status);
    }
    return absl::OkStatus();
  });
}

grpc::Status StateCatalogService::FindTurn(grpc::ServerContext* context, const v1::FindTurnRequest* request,
                                           v1::FindTurnResponse* response) {
  return Answer(*context, kFindTurn, SessionOf(*request, 0), [&]() -> absl::Status {
    RWKV_RETURN_IF_ERROR(Validate(*request));
    RWKV_ASSIGN_OR_RETURN(absl::optional<v1::Turn> turn,
                          store_->catalog().FindTurn(request->session_id(), request->request_id()));
    if (turn.has_value()) *response->mutable_turn() = *std::move(turn);
    return absl::OkStatus();
  });
}

grpc::Status StateCatalogService::ReadTokens(grpc::ServerContext* context, const v1::ReadTokensRequest* request,
                                             grpc::ServerWriter<v1::ReadTokensResponse>* writer) {
  return Answer(*context, kReadTokens, SessionOf(*request, 0), [&]() -> absl::Status {
    RWKV_RETURN_IF_ERROR(Validate(*request));
    // At least one page, so that an empty range of no session, or beyond the log, is an error too.
    std::string log_branch;
    for (uint64_t begin = request->begin();;) {
      const uint64_t end = std::min(request->end(), begin + kPageTokens);
      // The first page is read only if all are there.
      if (log_branch.empty() && end < request->end()) {
        RWKV_ASSIGN_OR_RETURN(const TokenPage last,
                              store_->catalog().ReadTokens(request->session_id(), request->end(), request->end()));
        log_branch = last.log_branch;
      }
      RWKV_ASSIGN_OR_RETURN(const TokenPage page, store_->catalog().ReadTokens(request->session_id(), begin, end));
      if (!log_branch.empty() && page.log_branch != log_branch) {
        return absl::AbortedError(
            absl::StrCat("session ", request->session_id(), " was rewound while its tokens were being read"));
      }
      log_branch = page.log_branch;
      v1::ReadTokensResponse response;
      response.mutable_token_ids()->Add(page.token_ids.begin(), page.token_ids.end());
      if (!page.token_ids.empty() && !writer->Write(response)) return absl::CancelledError("the caller has gone");
      if (end == request->end()) return absl::OkStatus();
      begin = end;
    }
  });
}

grpc::Status StateCatalogService::CommitSnapshot(grpc::ServerContext* context, const v1::CommitSnapshotRequest* request,
                                                 v1::CommitSnapshotResponse* response) {
  return Answer(*context, kCommitSnapshot, SessionOf(*request, 0), [&]() -> absl::Status {
    RWKV_RETURN_IF_ERROR(Validate(*request));
    return store_->CommitSnapshot(request->lease(), request->log_branch(), request->manifest());
  });
}

grpc::Status StateCatalogService::FindSnapshot(grpc::ServerContext* context, const v1::FindSnapshotRequest* request,
                                               v1::FindSnapshotResponse* response) {
  return Answer(*context, kFindSnapshot, SessionOf(*request, 0), [&]() -> absl::Status {
    RWKV_RETURN_IF_ERROR(Validate(*request));
    RWKV_ASSIGN_OR_RETURN(
        absl::optional<v1::SnapshotManifest> manifest,
        store_->catalog().FindSnapshot(request->session_id(), request->at_or_before(), request->model_fingerprint()));
    if (manifest.has_value()) *response->mutable_manifest() = *std::move(manifest);
    return absl::OkStatus();
  });
}

grpc::Status StateCatalogService::DropSnapshot(grpc::ServerContext* context, const v1::DropSnapshotRequest* request,
                                               v1::DropSnapshotResponse* response) {
  return Answer(*context, kDropSnapshot, SessionOf(*request, 0), [&]() -> absl::Status {
    RWKV_RETURN_IF_ERROR(Validate(*request));
    if (request->session_id().empty()) return store_->DropUncommitted(request->snapshot_id());
    return store_->DropSnapshot(request->session_id(), request->snapshot_id(), request->reason()).status();
  });
}

grpc::Status StateCatalogService::FindPrefix(grpc::ServerContext* context, const v1::FindPrefixRequest* request,
                                             v1::FindPrefixResponse* response) {
  return Answer(*context, kFindPrefix, SessionOf(*request, 0), [&]() -> absl::Status {
    RWKV_RETURN_IF_ERROR(Validate(*request));
    RWKV_ASSIGN_OR_RETURN(absl::optional<v1::SnapshotManifest> found,
                          store_->FindPrefix(request->scope(), request->token_ids()));
    if (found.has_value()) *response->mutable_manifest() = *std::move(found);
    return absl::OkStatus();
  });
}

grpc::Status StateCatalogService::PutPrefix(grpc::ServerContext* context, const v1::PutPrefixRequest* request,
                                            v1::PutPrefixResponse* response) {
  return Answer(*context, kPutPrefix, SessionOf(*request, 0), [&]() -> absl::Status {
    RWKV_RETURN_IF_ERROR(Validate(*request));
    RWKV_ASSIGN_OR_RETURN(const bool added,
                          store_->PutPrefix({request->scope(), request->token_ids(), request->manifest()}));
    response->set_existed(!added);
    return absl::OkStatus();
  });
}

grpc::Status StateCatalogService::DropPrefix(grpc::ServerContext* context, const v1::DropPrefixRequest* request,
                                             v1::DropPrefixResponse* response) {
  return Answer(*context, kDropPrefix, SessionOf(*request, 0), [&]() -> absl::Status {
    RWKV_RETURN_IF_ERROR(Validate(*request));
    return store_->DropPrefix(request->snapshot_id(), request->reason());
  });
}

grpc::Status StateCatalogService::GetUsage(grpc::ServerContext* context, const v1::GetUsageRequest* request,
                                           v1::GetUsageResponse* response) {
  return metrics_.Answer(kGetUsage, [&]() -> absl::Status {
    RWKV_RETURN_IF_ERROR(Validate(*request));
    RWKV_ASSIGN_OR_RETURN(const TenantUsage usage, store_->catalog().GetUsage(request->tenant()));
    response->mutable_usage()->set_turns(usage.turns);
    response->mutable_usage()->set_prompt_tokens(usage.prompt_tokens);
    response->mutable_usage()->set_generated_tokens(usage.generated_tokens);
    response->set_sessions(static_cast<uint64_t>(usage.sessions));
    response->set_stored_bytes(
        static_cast<uint64_t>(usage.snapshot_bytes + SessionLimits::kBytesPerToken * usage.log_tokens));
    return absl::OkStatus();
  });
}

grpc::Status StateCatalogService::PutUsage(grpc::ServerContext* context, const v1::PutUsageRequest* request,
                                           v1::PutUsageResponse* response) {
  return metrics_.Answer(kPutUsage, [&]() -> absl::Status {
    RWKV_RETURN_IF_ERROR(Validate(*request));
    TenantUsage total;
    total.turns = request->total().turns();
    total.prompt_tokens = request->total().prompt_tokens();
    total.generated_tokens = request->total().generated_tokens();
    return store_->catalog().PutUsage(request->tenant(), request->source(), total);
  });
}

}  // namespace rwkv::state_store
