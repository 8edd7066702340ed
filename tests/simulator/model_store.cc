#include "tests/simulator/model_store.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "services/common/grpc_status.h"

namespace rwkv::simulator {
namespace {

absl::Duration FromProto(const google::protobuf::Duration& duration) {
  return absl::Seconds(duration.seconds()) + absl::Nanoseconds(duration.nanos());
}

absl::Status NotModelled() { return absl::UnimplementedError("not part of the model"); }

}  // namespace

template <typename Response>
absl::StatusOr<Response> ModelStore::Call(const std::function<absl::StatusOr<Response>()>& change) {
  const Fate fate = fate_ ? fate_() : Fate::kAnswered;
  if (fate == Fate::kNeverCame) return absl::UnavailableError("the call never came");
  absl::StatusOr<Response> response = change();
  if (fate == Fate::kAnswerLost) return absl::UnavailableError("the answer is lost");
  return response;
}

const uint64_t* ModelStore::FindState(const std::string& snapshot_id) const {
  const auto it = states_.find(snapshot_id);
  return it == states_.end() ? nullptr : &it->second;
}

void ModelStore::LoseStates(const std::function<bool()>& chosen) {
  for (auto it = states_.begin(); it != states_.end();) it = chosen() ? states_.erase(it) : std::next(it);
}

void ModelStore::DamageStates(const std::function<bool()>& chosen) {
  for (auto& [id, state] : states_) {
    if (!chosen()) continue;
    state ^= 1;
    damaged_.insert(id);
  }
}

absl::StatusOr<ModelStore::SessionRow*> ModelStore::Owned(const v1::Lease& lease) {
  if (before_fence_) before_fence_();
  const auto it = sessions_.find(lease.session_id());
  if (it == sessions_.end()) return absl::NotFoundError(absl::StrCat("no session ", lease.session_id()));
  // A lease that has run out is good until another takes over: the token alone fences.
  if (broken_.store_fences_nobody) return &it->second;
  if (it->second.holder.empty() || it->second.fencing_token != lease.fencing_token()) {
    return absl::AbortedError(absl::StrCat("session ", lease.session_id(), ": the lease is another's"));
  }
  return &it->second;
}

absl::StatusOr<v1::AcquireLeaseResponse> ModelStore::AcquireLease(const v1::AcquireLeaseRequest& request, absl::Time) {
  return Call<v1::AcquireLeaseResponse>([&]() -> absl::StatusOr<v1::AcquireLeaseResponse> {
    const auto it = sessions_.find(request.session_id());
    if (it == sessions_.end()) return absl::NotFoundError(absl::StrCat("no session ", request.session_id()));
    SessionRow& session = it->second;
    const std::string holder = absl::StrCat(request.holder(), "/", request.incarnation());
    const bool is_live = !session.holder.empty() && session.lease_end > clock_->Now();
    const bool is_same_router = session.holder.substr(0, session.holder.find('/')) == request.holder();
    if (is_live && !is_same_router) {
      return common::WithRetryInfo(
          absl::AbortedError(absl::StrCat("session ", request.session_id(), " is held by ", session.holder)),
          absl::Milliseconds(100));
    }
    if (!is_live || session.holder != holder) ++session.fencing_token;
    if (!session.holder.empty() && !is_same_router) ++takeovers_;
    session.holder = holder;
    session.lease_end = clock_->Now() + FromProto(request.ttl());
    v1::AcquireLeaseResponse response;
    response.mutable_lease()->set_session_id(request.session_id());
    response.mutable_lease()->set_fencing_token(session.fencing_token);
    response.mutable_session()->set_id(request.session_id());
    response.mutable_session()->set_token_count(session.log.size());
    response.mutable_session()->set_model_fingerprint(session.model_fingerprint);
    response.set_log_branch(absl::StrCat(session.branch));
    return response;
  });
}

absl::StatusOr<v1::RenewLeasesResponse> ModelStore::RenewLeases(const v1::RenewLeasesRequest& request, absl::Time) {
  return Call<v1::RenewLeasesResponse>([&]() -> absl::StatusOr<v1::RenewLeasesResponse> {
    v1::RenewLeasesResponse response;
    for (const v1::Lease& lease : request.leases()) {
      const absl::StatusOr<SessionRow*> session = Owned(lease);
      if (session.ok()) {
        (*session)->lease_end = clock_->Now() + FromProto(request.ttl());
      } else {
        *response.add_lost() = lease;
      }
    }
    return response;
  });
}

absl::StatusOr<v1::ReleaseLeaseResponse> ModelStore::ReleaseLease(const v1::ReleaseLeaseRequest& request, absl::Time) {
  return Call<v1::ReleaseLeaseResponse>([&]() -> absl::StatusOr<v1::ReleaseLeaseResponse> {
    RWKV_ASSIGN_OR_RETURN(SessionRow * session, Owned(request.lease()));
    session->holder.clear();
    return v1::ReleaseLeaseResponse();
  });
}

absl::StatusOr<v1::BeginTurnResponse> ModelStore::BeginTurn(const v1::BeginTurnRequest& request, absl::Time) {
  return Call<v1::BeginTurnResponse>([&]() -> absl::StatusOr<v1::BeginTurnResponse> {
    RWKV_ASSIGN_OR_RETURN(SessionRow * session, Owned(request.lease()));
    v1::BeginTurnResponse response;
    const auto known = session->turns.find(request.request_id());
    if (known != session->turns.end() && !broken_.store_forgets_requests) {
      *response.mutable_turn() = known->second;
      response.set_existed(true);
      response.set_session_tokens(session->log.size());
      return response;
    }
    const auto newest = session->turns.find(session->newest_turn);
    if (newest != session->turns.end() && newest->second.state() == v1::TURN_STATE_OPEN) {
      newest->second.set_state(v1::TURN_STATE_FINISHED);
      newest->second.set_finish_reason(v1::FINISH_REASON_CANCELLED);
    }
    v1::Turn& turn = session->turns[request.request_id()];
    turn.Clear();
    turn.set_request_id(request.request_id());
    turn.set_begin(session->log.size());
    turn.set_prompt_count(request.token_ids_size());
    turn.set_state(v1::TURN_STATE_OPEN);
    turn.set_spec(request.spec());
    session->newest_turn = request.request_id();
    session->model_fingerprint = request.model_fingerprint();
    session->log.insert(session->log.end(), request.token_ids().begin(), request.token_ids().end());
    *response.mutable_turn() = turn;
    response.set_session_tokens(session->log.size());
    return response;
  });
}

absl::Status ModelStore::Append(const v1::AppendItem& item) {
  RWKV_ASSIGN_OR_RETURN(SessionRow * session, Owned(item.lease()));
  const auto it = session->turns.find(item.request_id());
  if (it == session->turns.end() || it->second.state() != v1::TURN_STATE_OPEN) {
    return absl::FailedPreconditionError("the turn is not open");
  }
  if (session->log.size() != item.expected_length()) return absl::AbortedError("the log has another length");
  if (broken_.store_forgets_appends && session->log.size() % 7 == 0) return absl::OkStatus();
  session->log.insert(session->log.end(), item.token_ids().begin(), item.token_ids().end());
  v1::Turn& turn = it->second;
  turn.set_token_count(turn.token_count() + item.token_ids_size());
  turn.mutable_logprobs()->MergeFrom(item.logprobs());
  if (item.finish_reason() == v1::FINISH_REASON_UNSPECIFIED) return absl::OkStatus();
  turn.set_state(v1::TURN_STATE_FINISHED);
  turn.set_finish_reason(item.finish_reason());
  return absl::OkStatus();
}

absl::StatusOr<v1::AppendTokensResponse> ModelStore::AppendTokens(const v1::AppendTokensRequest& request, absl::Time) {
  return Call<v1::AppendTokensResponse>([&]() -> absl::StatusOr<v1::AppendTokensResponse> {
    v1::AppendTokensResponse response;
    for (const v1::AppendItem& item : request.items()) *response.add_statuses() = common::ToStatusProto(Append(item));
    return response;
  });
}

absl::StatusOr<v1::FindTurnResponse> ModelStore::FindTurn(const v1::FindTurnRequest& request, absl::Time) {
  return Call<v1::FindTurnResponse>([&]() -> absl::StatusOr<v1::FindTurnResponse> {
    v1::FindTurnResponse response;
    const SessionRow& session = sessions_.at(request.session_id());
    const auto it = session.turns.find(request.request_id().empty() ? session.newest_turn : request.request_id());
    if (it != session.turns.end()) *response.mutable_turn() = it->second;
    return response;
  });
}

absl::StatusOr<std::vector<uint32_t>> ModelStore::ReadTokens(const v1::ReadTokensRequest& request, absl::Time) {
  return Call<std::vector<uint32_t>>([&]() -> absl::StatusOr<std::vector<uint32_t>> {
    const std::vector<uint32_t>& log = sessions_.at(request.session_id()).log;
    if (request.end() > log.size() || request.begin() > request.end()) return absl::OutOfRangeError("beyond the log");
    return std::vector<uint32_t>(log.begin() + request.begin(), log.begin() + request.end());
  });
}

absl::StatusOr<v1::CommitSnapshotResponse> ModelStore::CommitSnapshot(const v1::CommitSnapshotRequest& request,
                                                                      absl::Time) {
  return Call<v1::CommitSnapshotResponse>([&]() -> absl::StatusOr<v1::CommitSnapshotResponse> {
    RWKV_ASSIGN_OR_RETURN(SessionRow * session, Owned(request.lease()));
    if (FindState(request.manifest().snapshot_id()) == nullptr) return absl::DataLossError("a record is not there");
    if (request.log_branch() != absl::StrCat(session->branch)) return absl::AbortedError("the log is another by now");
    if (request.manifest().position() > session->log.size()) return absl::OutOfRangeError("beyond the log");
    session->snapshots[request.manifest().position()] = request.manifest();
    return v1::CommitSnapshotResponse();
  });
}

absl::StatusOr<v1::RewindSessionResponse> ModelStore::RewindSession(const v1::RewindSessionRequest& request,
                                                                    absl::Time) {
  return Call<v1::RewindSessionResponse>([&]() -> absl::StatusOr<v1::RewindSessionResponse> {
    RWKV_ASSIGN_OR_RETURN(SessionRow * session, Owned(request.lease()));
    const uint64_t position = request.position();
    if (request.log_branch() != absl::StrCat(session->branch) && position != session->log.size()) {
      return absl::AbortedError("the log is another by now");
    }
    if (position > session->log.size()) {
      return absl::OutOfRangeError(absl::StrCat("the log has ", session->log.size(), " tokens, not ", position));
    }
    if (position == session->log.size()) return v1::RewindSessionResponse();
    if (!broken_.store_keeps_branches) ++session->branch;
    session->log.resize(position);
    session->newest_turn.clear();
    uint64_t newest = 0;
    for (auto it = session->turns.begin(); it != session->turns.end();) {
      const v1::Turn& turn = it->second;
      if (turn.begin() + turn.prompt_count() + turn.token_count() > position) {
        it = session->turns.erase(it);
        continue;
      }
      if (session->newest_turn.empty() || turn.begin() > newest) session->newest_turn = it->first;
      newest = std::max(newest, turn.begin());
      ++it;
    }
    CutSnapshots(session);
    return v1::RewindSessionResponse();
  });
}

void ModelStore::CutSnapshots(SessionRow* session) const {
  if (broken_.store_keeps_snapshots) return;
  session->snapshots.erase(session->snapshots.upper_bound(session->log.size()), session->snapshots.end());
}

absl::StatusOr<v1::ForkSessionResponse> ModelStore::ForkSession(const v1::ForkSessionRequest& request, absl::Time) {
  return Call<v1::ForkSessionResponse>([&]() -> absl::StatusOr<v1::ForkSessionResponse> {
    if (sessions_.count(request.new_session_id()) > 0) return absl::AlreadyExistsError("there is one");
    const SessionRow& parent = sessions_.at(request.session_id());
    if (request.position() > parent.log.size()) return absl::OutOfRangeError("beyond the log");
    SessionRow fork;
    fork.log.assign(parent.log.begin(), parent.log.begin() + static_cast<int64_t>(request.position()));
    fork.model_fingerprint = fork.log.empty() ? "" : parent.model_fingerprint;
    fork.snapshots = parent.snapshots;
    CutSnapshots(&fork);
    sessions_[request.new_session_id()] = std::move(fork);
    return v1::ForkSessionResponse();
  });
}

absl::StatusOr<v1::FindSnapshotResponse> ModelStore::FindSnapshot(const v1::FindSnapshotRequest& request, absl::Time) {
  return Call<v1::FindSnapshotResponse>([&]() -> absl::StatusOr<v1::FindSnapshotResponse> {
    v1::FindSnapshotResponse response;
    const SessionRow& session = sessions_.at(request.session_id());
    auto it = session.snapshots.upper_bound(request.at_or_before());
    if (it != session.snapshots.begin()) *response.mutable_manifest() = std::prev(it)->second;
    return response;
  });
}

absl::StatusOr<v1::DropSnapshotResponse> ModelStore::DropSnapshot(const v1::DropSnapshotRequest& request, absl::Time) {
  return Call<v1::DropSnapshotResponse>([&]() -> absl::StatusOr<v1::DropSnapshotResponse> {
    if (FindPrefixOf(request.snapshot_id()) != prefixes_.end()) {
      return absl::FailedPreconditionError("it is a state of the prefix cache");
    }
    states_.erase(request.snapshot_id());
    const auto session = sessions_.find(request.session_id());
    if (session == sessions_.end()) return v1::DropSnapshotResponse();
    for (auto it = session->second.snapshots.begin(); it != session->second.snapshots.end();) {
      it = it->second.snapshot_id() == request.snapshot_id() ? session->second.snapshots.erase(it) : std::next(it);
    }
    return v1::DropSnapshotResponse();
  });
}

std::vector<ModelStore::Prefix>::iterator ModelStore::FindPrefixOf(const std::string& snapshot_id) {
  return std::find_if(prefixes_.begin(), prefixes_.end(),
                      [&](const Prefix& prefix) { return prefix.manifest.snapshot_id() == snapshot_id; });
}

absl::StatusOr<v1::FindPrefixResponse> ModelStore::FindPrefix(const v1::FindPrefixRequest& request, absl::Time) {
  return Call<v1::FindPrefixResponse>([&]() -> absl::StatusOr<v1::FindPrefixResponse> {
    v1::FindPrefixResponse response;
    const std::string scope = request.scope().SerializeAsString();
    const auto& ids = request.token_ids();
    auto longest = prefixes_.end();
    for (auto it = prefixes_.begin(); it != prefixes_.end(); ++it) {
      if ((it->scope != scope && !broken_.store_scopes_nothing) || it->tokens.size() > static_cast<size_t>(ids.size()))
        continue;
      const size_t compared = broken_.store_compares_nothing ? 16 : it->tokens.size();
      if (!std::equal(it->tokens.begin(), it->tokens.begin() + compared, ids.begin())) continue;
      if (longest == prefixes_.end() || longest->tokens.size() < it->tokens.size()) longest = it;
    }
    if (longest == prefixes_.end()) return response;
    *response.mutable_manifest() = longest->manifest;
    std::rotate(longest, longest + 1, prefixes_.end());  // Used last.
    return response;
  });
}

absl::StatusOr<v1::PutPrefixResponse> ModelStore::PutPrefix(const v1::PutPrefixRequest& request, absl::Time) {
  return Call<v1::PutPrefixResponse>([&]() -> absl::StatusOr<v1::PutPrefixResponse> {
    v1::PutPrefixResponse response;
    const std::string& id = request.manifest().snapshot_id();
    if (FindState(id) == nullptr) return absl::DataLossError("a record is not there");
    Prefix put{request.scope().SerializeAsString(),
               {request.token_ids().begin(), request.token_ids().end()},
               request.manifest()};
    const auto same = std::find_if(prefixes_.begin(), prefixes_.end(), [&put](const Prefix& prefix) {
      return prefix.scope == put.scope && prefix.tokens == put.tokens;
    });
    if (same != prefixes_.end() && FindState(same->manifest.snapshot_id()) != nullptr) {
      if (same->manifest.snapshot_id() != id) states_.erase(id);
      response.set_existed(true);
      return response;
    }
    if (same != prefixes_.end()) prefixes_.erase(same);
    prefixes_.push_back(std::move(put));
    while (prefixes_.size() > most_prefixes_) {
      states_.erase(prefixes_.front().manifest.snapshot_id());
      prefixes_.erase(prefixes_.begin());
    }
    return response;
  });
}

absl::StatusOr<v1::DropPrefixResponse> ModelStore::DropPrefix(const v1::DropPrefixRequest& request, absl::Time) {
  return Call<v1::DropPrefixResponse>([&]() -> absl::StatusOr<v1::DropPrefixResponse> {
    const auto prefix = FindPrefixOf(request.snapshot_id());
    if (prefix == prefixes_.end()) return v1::DropPrefixResponse();
    prefixes_.erase(prefix);
    states_.erase(request.snapshot_id());
    return v1::DropPrefixResponse();
  });
}

absl::StatusOr<v1::StateCatalogDescribeResponse> ModelStore::Describe(const v1::StateCatalogDescribeRequest&,
                                                                      absl::Time) {
  return NotModelled();
}
absl::StatusOr<v1::CreateSessionResponse> ModelStore::CreateSession(const v1::CreateSessionRequest&, absl::Time) {
  return NotModelled();
}
absl::StatusOr<v1::ImportSessionResponse> ModelStore::ImportSession(const v1::ImportSessionRequest&, absl::Time) {
  return NotModelled();
}
absl::StatusOr<v1::GetSessionResponse> ModelStore::GetSession(const v1::GetSessionRequest&, absl::Time) {
  return NotModelled();
}
absl::StatusOr<v1::ListSessionsResponse> ModelStore::ListSessions(const v1::ListSessionsRequest&, absl::Time) {
  return NotModelled();
}
absl::StatusOr<v1::DeleteSessionResponse> ModelStore::DeleteSession(const v1::DeleteSessionRequest&, absl::Time) {
  return NotModelled();
}
absl::StatusOr<v1::GetUsageResponse> ModelStore::GetUsage(const v1::GetUsageRequest&, absl::Time) {
  return NotModelled();
}
absl::StatusOr<v1::PutUsageResponse> ModelStore::PutUsage(const v1::PutUsageRequest&, absl::Time) {
  return NotModelled();
}

}  // namespace rwkv::simulator
