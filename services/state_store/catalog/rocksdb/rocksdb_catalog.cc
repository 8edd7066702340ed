#include "services/state_store/catalog/rocksdb/rocksdb_catalog.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "services/common/grpc_status.h"
#include "services/state_store/catalog/rocksdb/branch_tree.h"
#include "services/state_store/catalog/rocksdb/session_rows.h"
#include "services/state_store/catalog/rocksdb/view.h"
#include "services/state_store/rocksdb/numbers.h"

namespace rwkv::state_store {
namespace {

constexpr char kNextIdKey[] = "next_id";
constexpr uint64_t kIdsReserved = 1024;            // One fsync for so many ids; lost by a restart, which is fine.
constexpr size_t kMaxChunkTokens = 16384;          // Of one row, so that reading a few tokens stays cheap.
constexpr uint64_t kMaxTurnLogprobs = 768 * 1024;  // 3 MiB of the 4 MiB a message may have.

std::string FamilyLock(uint64_t family) { return absl::StrCat("session family ", family); }

google::protobuf::Timestamp ToTimestamp(int64_t unix_nanos) {
  google::protobuf::Timestamp timestamp;
  timestamp.set_seconds(unix_nanos / 1000000000);
  timestamp.set_nanos(static_cast<int32_t>(unix_nanos % 1000000000));
  return timestamp;
}

v1::Session ToSession(absl::string_view session_id, const SessionRow& row) {
  v1::Session session;
  session.set_id(std::string(session_id));
  session.set_model_fingerprint(row.model_fingerprint());
  session.set_token_count(row.length());
  *session.mutable_create_time() = ToTimestamp(row.create_unix_nanos());
  *session.mutable_update_time() = ToTimestamp(row.update_unix_nanos());
  session.set_forked_from(row.forked_from());
  session.set_fork_position(row.fork_position());
  session.set_open_request_id(row.open_turn().request_id());
  session.set_initial_state(row.initial_state());
  if (row.has_base_position()) session.set_base_position(row.base_position());
  session.set_log_begin(row.log_begin());
  return session;
}

absl::Status AddSnapshotPositions(const View& view, const SessionRow& row, v1::Session* session) {
  RWKV_ASSIGN_OR_RETURN(const std::vector<Link> chain, view.Chain(row));
  if (row.has_base_position()) session->add_snapshot_positions(row.base_position());
  for (auto link = chain.rbegin(); link != chain.rend(); ++link) {
    RWKV_ASSIGN_OR_RETURN(const std::vector<SnapshotAt> snapshots,
                          view.Snapshots(link->branch, link->begin, link->end));
    for (const SnapshotAt& snapshot : snapshots) session->add_snapshot_positions(snapshot.position);
  }
  return absl::OkStatus();
}

absl::StatusOr<v1::Session> ToSessionWithSnapshots(const View& view, absl::string_view session_id,
                                                   const SessionRow& row) {
  v1::Session session = ToSession(session_id, row);
  RWKV_RETURN_IF_ERROR(AddSnapshotPositions(view, row, &session));
  return session;
}

std::string LogBranch(const SessionRow& row) { return absl::StrCat(row.branch()); }

absl::Status CheckLease(const v1::Lease& lease, const SessionRow& row) {
  const LeaseRow& current = row.lease();
  if (lease.fencing_token() == current.fencing_token() && !current.holder().empty()) return absl::OkStatus();
  const std::string held = current.holder().empty() ? "which was released" : absl::StrCat("held by ", current.holder());
  return common::WithErrorInfo(
      absl::AbortedError(absl::StrCat("session ", lease.session_id(), ": fencing token ", lease.fencing_token(),
                                      " is not the current one, ", current.fencing_token(), ", ", held)),
      "LEASE_LOST");
}

absl::Status CheckModel(const std::string& session_id, const SessionRow& row, absl::string_view model_fingerprint) {
  if (row.model_fingerprint().empty() || row.model_fingerprint() == model_fingerprint) return absl::OkStatus();
  return common::WithErrorInfo(
      absl::FailedPreconditionError(absl::StrCat("session ", session_id, " belongs to model ", row.model_fingerprint(),
                                                 ", not to ", model_fingerprint)),
      "OTHER_MODEL");
}

// Whether a session can be forked at, or rewound to, a position.
absl::Status CheckPosition(const std::string& session_id, const SessionRow& row, uint64_t position,
                           absl::string_view verb) {
  if (position > row.length()) {
    return absl::OutOfRangeError(
        absl::StrCat("session ", session_id, " has ", row.length(), " tokens; it cannot be ", verb, " ", position));
  }
  if (!row.has_base_position() || position >= row.base_position()) return absl::OkStatus();
  return absl::OutOfRangeError(absl::StrCat("session ", session_id, " began with an imported state at position ",
                                            row.base_position(), "; it cannot be ", verb, " ", position,
                                            ", which is before it"));
}

void PutTokens(Edit& edit, uint64_t branch, uint64_t begin, absl::Span<const uint32_t> token_ids,
               absl::Span<const float> logprobs) {
  while (!token_ids.empty()) {
    const size_t count = std::min(token_ids.size(), kMaxChunkTokens);
    edit.Put(LogKey(branch, begin),
             EncodeChunk(token_ids.first(count), logprobs.first(std::min(count, logprobs.size()))));
    begin += count;
    token_ids.remove_prefix(count);
    logprobs.remove_prefix(std::min(count, logprobs.size()));
  }
}

uint64_t TurnEnd(const TurnRow& turn, const SessionRow& row) {
  return turn.finished() ? turn.begin() + turn.prompt_count() + turn.token_count() : row.length();
}

absl::StatusOr<v1::Turn> ToTurn(const View& view, const SessionRow& row, const TurnRow& stored) {
  v1::Turn turn;
  turn.set_request_id(stored.request_id());
  turn.set_begin(stored.begin());
  turn.set_prompt_count(stored.prompt_count());
  const uint64_t begin = stored.begin() + stored.prompt_count();
  const uint64_t end = TurnEnd(stored, row);
  turn.set_token_count(end - begin);
  turn.set_state(stored.finished() ? v1::TURN_STATE_FINISHED : v1::TURN_STATE_OPEN);
  turn.set_finish_reason(static_cast<v1::FinishReason>(stored.finish_reason()));
  turn.set_spec(stored.spec());
  if (stored.has_stop_token_id()) turn.set_stop_token_id(stored.stop_token_id());
  turn.set_stop_string(stored.stop_string());
  if (stored.error_code() != 0) {
    turn.mutable_error()->set_code(stored.error_code());
    turn.mutable_error()->set_message(stored.error_message());
  }
  RWKV_ASSIGN_OR_RETURN(const std::vector<Link> chain, view.Chain(row));
  RWKV_ASSIGN_OR_RETURN(const LogChunk log, view.ReadLog(chain, begin, std::min(end, begin + kMaxTurnLogprobs), true));
  turn.mutable_logprobs()->Add(log.logprobs.begin(), log.logprobs.end());
  return turn;
}

// The turns of a session, oldest first.
absl::Status ForEachTurn(const View& view, const std::string& session_id,
                         absl::FunctionRef<void(absl::string_view key, const TurnRow& turn)> visit) {
  return view.Scan(TurnKey(session_id, 0), TurnKey(session_id, UINT64_MAX),
                   [&](absl::string_view key, absl::string_view value) -> absl::StatusOr<bool> {
                     TurnRow turn;
                     if (!turn.ParseFromArray(value.data(), static_cast<int>(value.size()))) {
                       return absl::DataLossError(absl::StrCat("session ", session_id, ": a turn's row is corrupt"));
                     }
                     visit(key, turn);
                     return true;
                   });
}

}  // namespace

RocksdbCatalog::RocksdbCatalog(const Options& options, Database* database, common::Clock* clock,
                               common::Metrics* metrics)
    : options_(options),
      database_(database),
      clock_(clock),
      sessions_gauge_(metrics->Gauge("rwkv_state_store_sessions", "Sessions in the catalog.")),
      snapshots_gauge_(metrics->Gauge("rwkv_state_store_snapshots", "Snapshots that are committed.")),
      leases_gauge_(metrics->Gauge("rwkv_state_store_leases", "Leases granted and not released, expired or not.")),
      tokens_gauge_(metrics->Gauge("rwkv_state_store_log_tokens", "Tokens of all logs, shared ones once.")),
      tokens_total_(metrics->Counter("rwkv_state_store_appended_tokens_total", "Tokens appended, input included.")),
      fenced_total_(metrics->Counter("rwkv_state_store_fenced_total", "Changes refused for an old fencing token.")) {}

absl::StatusOr<std::unique_ptr<RocksdbCatalog>> RocksdbCatalog::Create(const Options& options, Database* database,
                                                                       common::Clock* clock, common::Metrics* metrics) {
  if (options.snapshots_per_branch < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("snapshots_per_branch is ", options.snapshots_per_branch, ", want at least 1"));
  }
  std::unique_ptr<RocksdbCatalog> catalog(new RocksdbCatalog(options, database, clock, metrics));
  RWKV_RETURN_IF_ERROR(catalog->Load());
  return catalog;
}

absl::Status RocksdbCatalog::Load() {
  RWKV_ASSIGN_OR_RETURN(const int64_t session_tokens, LoadSessions());
  RWKV_ASSIGN_OR_RETURN(const int64_t branch_tokens, LoadBranches());
  RWKV_ASSIGN_OR_RETURN(View view, View::Open(*database_, View::At::kOnce));
  int snapshots = 0;
  RWKV_RETURN_IF_ERROR(view.Scan("i", "j", [&](absl::string_view, absl::string_view) -> absl::StatusOr<bool> {
    ++snapshots;
    return true;
  }));
  Count(0, snapshots, 0, session_tokens + branch_tokens);

  RWKV_ASSIGN_OR_RETURN(const absl::optional<std::string> next, view.Get(kNextIdKey));
  if (next.has_value() && next->size() != 8) return absl::DataLossError("catalog: the row of the next id is corrupt");
  std::move(view).Close();
  absl::MutexLock lock(&id_mu_);
  next_id_ = reserved_ids_end_ = next.has_value() ? NumberAt(*next, 0) : 1;
  return absl::OkStatus();
}

absl::StatusOr<int64_t> RocksdbCatalog::LoadSessions() {
  constexpr int kPage = 4096;  // Of an old store every row is written anew.
  int64_t tokens = 0;
  std::string begin = "s";
  for (bool more = true; more;) {
    more = false;
    int sessions = 0, leases = 0;
    RWKV_ASSIGN_OR_RETURN(View view, View::Open(*database_, View::At::kLatest));
    Edit edit(view);
    RWKV_RETURN_IF_ERROR(
        view.Scan(begin, "t", [&](absl::string_view key, absl::string_view value) -> absl::StatusOr<bool> {
          if (sessions == kPage) {
            begin = std::string(key);
            more = true;
            return false;
          }
          SessionRow row;
          if (!row.ParseFromArray(value.data(), static_cast<int>(value.size()))) {
            return absl::DataLossError(absl::StrCat("catalog: the row of session ", key.substr(1), " is corrupt"));
          }
          ++sessions;
          if (!row.lease().holder().empty()) ++leases;
          tokens += static_cast<int64_t>(row.length());
          if (!IsIndexed(row)) PutSession(edit, key.substr(1), row);
          return true;
        }));
    if (!edit.empty()) {
      RWKV_RETURN_IF_ERROR(database_->Write(std::move(view).Close(), edit.batch(), Durability::kSynced));
    }
    Count(sessions, 0, leases, 0);
  }
  return tokens;
}

absl::StatusOr<int64_t> RocksdbCatalog::LoadBranches() {
  // A branch has the tokens from its fork position to its end: for a head its session's length, for the others the last
  // fork below it, which is the last of its edges.
  RWKV_ASSIGN_OR_RETURN(const View view, View::Open(*database_, View::At::kOnce));
  int64_t tokens = 0;
  RWKV_RETURN_IF_ERROR(view.Scan("b", "c", [&](absl::string_view key, absl::string_view) -> absl::StatusOr<bool> {
    RWKV_ASSIGN_OR_RETURN(const BranchRow row, view.Branch(FirstNumber(key)));
    tokens -= static_cast<int64_t>(row.fork_position());
    if (row.is_head()) return true;
    Edit none(view);
    RWKV_ASSIGN_OR_RETURN(const absl::optional<uint64_t> end,
                          BranchTree(options_.snapshots_per_branch, &view, &none).LastFork(FirstNumber(key)));
    tokens += static_cast<int64_t>(end.value_or(row.fork_position()));
    return true;
  }));
  return tokens;
}

void RocksdbCatalog::Count(int sessions, int snapshots, int leases, int64_t tokens) {
  sessions_gauge_.Set(static_cast<double>(sessions_ += sessions));
  snapshots_gauge_.Set(static_cast<double>(snapshots_ += snapshots));
  leases_gauge_.Set(static_cast<double>(leases_ += leases));
  tokens_gauge_.Set(static_cast<double>(tokens_ += tokens));
}

CatalogCounts RocksdbCatalog::counts() const {
  return {sessions_.load(), snapshots_.load(), leases_.load(), tokens_.load()};
}

absl::StatusOr<SessionRow> RocksdbCatalog::Find(const View& view, const std::string& session_id) const {
  absl::StatusOr<SessionRow> row = view.Session(session_id);
  if (!absl::IsNotFound(row.status()) || options_.how_sessions_end.empty()) return row;
  return absl::NotFoundError(absl::StrCat(row.status().message(), "; ", options_.how_sessions_end));
}

absl::StatusOr<uint64_t> RocksdbCatalog::NextId() {
  absl::MutexLock lock(&id_mu_);
  if (next_id_ == reserved_ids_end_) {
    RWKV_ASSIGN_OR_RETURN(View view, View::Open(*database_, View::At::kLatest));
    Edit edit(view);
    std::string value;
    AppendNumber(value, next_id_ + kIdsReserved);
    edit.Put(kNextIdKey, value);
    RWKV_RETURN_IF_ERROR(database_->Write(std::move(view).Close(), edit.batch(), Durability::kSynced));
    reserved_ids_end_ = next_id_ + kIdsReserved;
  }
  return next_id_++;
}

absl::StatusOr<KeyLocks::Guard> RocksdbCatalog::LockSession(const std::string& session_id) {
  return session_locks_.Lock({absl::StrCat("session ", session_id)});
}

absl::StatusOr<KeyLocks::Guard> RocksdbCatalog::LockFamily(uint64_t family) {
  return family_locks_.Lock({FamilyLock(family)});
}

absl::StatusOr<v1::Session> RocksdbCatalog::CreateSession(const std::string& session_id,
                                                          const std::string& initial_state) {
  RWKV_ASSIGN_OR_RETURN(const KeyLocks::Guard guard, LockSession(session_id));
  RWKV_ASSIGN_OR_RETURN(const uint64_t branch, NextId());
  RWKV_ASSIGN_OR_RETURN(View view, View::Open(*database_, View::At::kLatest));
  SessionRow row;
  RWKV_ASSIGN_OR_RETURN(const bool exists, view.Get(SessionKey(session_id), &row));
  if (exists) return absl::AlreadyExistsError(absl::StrCat("session ", session_id, " exists already"));
  const int64_t now = absl::ToUnixNanos(clock_->Now());
  row.set_create_unix_nanos(now);
  row.set_update_unix_nanos(now);
  row.set_family(branch);
  row.set_branch(branch);
  row.set_next_turn(1);
  row.set_initial_state(initial_state);
  Edit edit(view);
  BranchTree tree(options_.snapshots_per_branch, &view, &edit);
  tree.AddRoot(branch, 0, nullptr);
  PutSession(edit, session_id, row);
  RWKV_RETURN_IF_ERROR(database_->Write(std::move(view).Close(), edit.batch(), Durability::kSynced));
  Count(1, 0, 0, 0);
  return ToSession(session_id, row);
}

absl::StatusOr<v1::Session> RocksdbCatalog::ImportSession(const std::string& session_id, const NewImport& import) {
  RWKV_ASSIGN_OR_RETURN(const KeyLocks::Guard guard, LockSession(session_id));
  RWKV_ASSIGN_OR_RETURN(const uint64_t branch, NextId());
  RWKV_ASSIGN_OR_RETURN(View view, View::Open(*database_, View::At::kLatest));
  SessionRow row;
  RWKV_ASSIGN_OR_RETURN(const bool exists, view.Get(SessionKey(session_id), &row));
  if (exists) return absl::AlreadyExistsError(absl::StrCat("session ", session_id, " exists already"));
  const v1::SnapshotManifest& manifest = import.manifest;
  RWKV_ASSIGN_OR_RETURN(const absl::optional<std::string> taken, view.Get(SnapshotIdKey(manifest.snapshot_id())));
  if (taken.has_value()) {
    return absl::AlreadyExistsError(absl::StrCat("snapshot ", manifest.snapshot_id(), " exists already"));
  }
  const uint64_t log_begin = manifest.position() - import.token_ids.size();
  const int64_t now = absl::ToUnixNanos(clock_->Now());
  row.set_model_fingerprint(manifest.model_fingerprint());
  row.set_create_unix_nanos(now);
  row.set_update_unix_nanos(now);
  row.set_family(branch);
  row.set_branch(branch);
  row.set_length(manifest.position());
  row.set_next_turn(1);
  row.set_initial_state(import.initial_state);
  row.set_log_begin(log_begin);
  if (import.base) row.set_base_position(manifest.position());
  Edit edit(view);
  BranchTree tree(options_.snapshots_per_branch, &view, &edit);
  tree.AddRoot(branch, log_begin, import.base ? &manifest : nullptr);
  if (!import.base) RWKV_RETURN_IF_ERROR(tree.AddSnapshot({branch, log_begin, row.length()}, manifest));
  PutTokens(edit, branch, log_begin, import.token_ids, {});
  PutSession(edit, session_id, row);
  RWKV_RETURN_IF_ERROR(database_->Write(std::move(view).Close(), edit.batch(), Durability::kSynced));
  Count(1, tree.snapshots_delta(), 0, static_cast<int64_t>(import.token_ids.size()));
  tokens_total_.Increment(static_cast<double>(import.token_ids.size()));
  v1::Session session = ToSession(session_id, row);
  session.add_snapshot_positions(manifest.position());
  return session;
}

absl::StatusOr<v1::Session> RocksdbCatalog::GetSession(const std::string& session_id) {
  RWKV_ASSIGN_OR_RETURN(const View view, View::Open(*database_, View::At::kOnce));
  RWKV_ASSIGN_OR_RETURN(const SessionRow row, Find(view, session_id));
  return ToSessionWithSnapshots(view, session_id, row);
}

absl::StatusOr<SessionPage> RocksdbCatalog::ListSessions(int page_size, const std::string& page_token) {
  RWKV_ASSIGN_OR_RETURN(const View view, View::Open(*database_, View::At::kOnce));
  SessionPage page;
  const std::string begin = page_token.empty() ? "s" : SessionKey(page_token) + '\0';
  RWKV_RETURN_IF_ERROR(
      view.Scan(begin, "t", [&](absl::string_view key, absl::string_view value) -> absl::StatusOr<bool> {
        if (page.sessions.size() == static_cast<size_t>(page_size)) {
          page.next_page_token = page.sessions.back().id();
          return false;
        }
        SessionRow row;
        if (!row.ParseFromArray(value.data(), static_cast<int>(value.size()))) {
          return absl::DataLossError(absl::StrCat("catalog: the row of session ", key.substr(1), " is corrupt"));
        }
        page.sessions.push_back(ToSession(key.substr(1), row));
        return true;
      }));
  return page;
}

absl::StatusOr<v1::Session> RocksdbCatalog::ForkSession(const std::string& session_id,
                                                        absl::optional<uint64_t> position,
                                                        const std::string& new_session_id) {
  RWKV_ASSIGN_OR_RETURN(const KeyLocks::Guard guard, session_locks_.Lock({absl::StrCat("session ", session_id),
                                                                          absl::StrCat("session ", new_session_id)}));
  RWKV_ASSIGN_OR_RETURN(const uint64_t branch, NextId());
  SessionRow source;
  uint64_t opening;
  {
    RWKV_ASSIGN_OR_RETURN(const View view, View::Open(*database_, View::At::kLatest));
    opening = view.opening();
    RWKV_ASSIGN_OR_RETURN(source, Find(view, session_id));
    SessionRow taken;
    RWKV_ASSIGN_OR_RETURN(const bool exists, view.Get(SessionKey(new_session_id), &taken));
    if (exists) return absl::AlreadyExistsError(absl::StrCat("session ", new_session_id, " exists already"));
  }
  const uint64_t at = position.value_or(source.length());
  RWKV_RETURN_IF_ERROR(CheckPosition(session_id, source, at, "forked at"));
  RWKV_ASSIGN_OR_RETURN(const KeyLocks::Guard family_guard, LockFamily(source.family()));
  RWKV_ASSIGN_OR_RETURN(View view, View::Reopen(*database_, opening));
  RWKV_ASSIGN_OR_RETURN(const std::vector<Link> chain, view.Chain(source));
  SessionRow row;
  const int64_t now = absl::ToUnixNanos(clock_->Now());
  // With nothing shared it is of no model yet, and no relative.
  const bool has_base = source.has_base_position();
  const bool shares = at > 0 || has_base;
  if (shares) row.set_model_fingerprint(source.model_fingerprint());
  row.set_family(shares ? source.family() : branch);
  row.set_initial_state(source.initial_state());
  if (has_base) row.set_base_position(source.base_position());
  row.set_log_begin(source.log_begin());
  row.set_create_unix_nanos(now);
  row.set_update_unix_nanos(now);
  row.set_forked_from(session_id);
  row.set_fork_position(at);
  row.set_branch(branch);
  row.set_length(at);
  row.set_next_turn(1);
  Edit edit(view);
  BranchTree tree(options_.snapshots_per_branch, &view, &edit);
  tree.Fork(chain, has_base, at, branch);
  PutSession(edit, new_session_id, row);
  RWKV_RETURN_IF_ERROR(database_->Write(std::move(view).Close(), edit.batch(), Durability::kSynced));
  Count(1, 0, 0, 0);
  RWKV_ASSIGN_OR_RETURN(const View after, View::Open(*database_, View::At::kLatest));
  return ToSessionWithSnapshots(after, new_session_id, row);
}

absl::StatusOr<v1::Session> RocksdbCatalog::RewindSession(const v1::Lease& lease, uint64_t position,
                                                          std::vector<std::string>* freed) {
  const std::string& session_id = lease.session_id();
  RWKV_ASSIGN_OR_RETURN(const KeyLocks::Guard guard, LockSession(session_id));
  RWKV_ASSIGN_OR_RETURN(const uint64_t branch, NextId());
  SessionRow row;
  uint64_t opening;
  {
    RWKV_ASSIGN_OR_RETURN(const View view, View::Open(*database_, View::At::kLatest));
    opening = view.opening();
    RWKV_ASSIGN_OR_RETURN(row, Find(view, session_id));
    if (absl::Status status = CheckLease(lease, row); !status.ok()) {
      fenced_total_.Increment();
      return status;
    }
    RWKV_RETURN_IF_ERROR(CheckPosition(session_id, row, position, "rewound to"));
    if (position == row.length()) return ToSessionWithSnapshots(view, session_id, row);
  }
  RWKV_ASSIGN_OR_RETURN(const KeyLocks::Guard family_guard, LockFamily(row.family()));
  RWKV_ASSIGN_OR_RETURN(View view, View::Reopen(*database_, opening));
  RWKV_ASSIGN_OR_RETURN(const std::vector<Link> chain, view.Chain(row));
  Edit edit(view);
  BranchTree tree(options_.snapshots_per_branch, &view, &edit);
  tree.Fork(chain, row.has_base_position(), position, branch);
  RWKV_RETURN_IF_ERROR(tree.Release(row.branch(), row.length()));
  RWKV_RETURN_IF_ERROR(ForEachTurn(view, session_id, [&](absl::string_view key, const TurnRow& turn) {
    if (TurnEnd(turn, row) > position) edit.Delete(key);
  }));
  row.clear_open_turn();  // An open turn ends at the log's end, which is beyond the position.
  row.set_branch(branch);
  row.set_length(position);
  row.set_update_unix_nanos(absl::ToUnixNanos(clock_->Now()));
  PutSession(edit, session_id, row);
  RWKV_RETURN_IF_ERROR(database_->Write(std::move(view).Close(), edit.batch(), Durability::kSynced));
  Count(0, tree.snapshots_delta(), 0, -tree.freed_tokens());
  freed->insert(freed->end(), tree.freed().begin(), tree.freed().end());
  RWKV_ASSIGN_OR_RETURN(const View after, View::Open(*database_, View::At::kLatest));
  return ToSessionWithSnapshots(after, session_id, row);
}

absl::Status RocksdbCatalog::DeleteSession(const v1::Lease& lease, std::vector<std::string>* freed) {
  const std::string& session_id = lease.session_id();
  RWKV_ASSIGN_OR_RETURN(const KeyLocks::Guard guard, LockSession(session_id));
  SessionRow row;
  uint64_t opening;
  {
    RWKV_ASSIGN_OR_RETURN(const View view, View::Open(*database_, View::At::kLatest));
    opening = view.opening();
    RWKV_ASSIGN_OR_RETURN(row, Find(view, session_id));
  }
  if (absl::Status status = CheckLease(lease, row); !status.ok()) {
    fenced_total_.Increment();
    return status;
  }
  return Erase(session_id, row, opening, freed);
}

absl::Status RocksdbCatalog::Erase(const std::string& session_id, const SessionRow& row, uint64_t opening,
                                   std::vector<std::string>* freed) {
  RWKV_ASSIGN_OR_RETURN(const KeyLocks::Guard family_guard, LockFamily(row.family()));
  RWKV_ASSIGN_OR_RETURN(View view, View::Reopen(*database_, opening));
  Edit edit(view);
  BranchTree tree(options_.snapshots_per_branch, &view, &edit);
  RWKV_RETURN_IF_ERROR(tree.Release(row.branch(), row.length()));
  edit.DeleteRange(TurnKey(session_id, 0), TurnKey(session_id, UINT64_MAX));
  state_store::DeleteSession(edit, session_id, row);
  RWKV_RETURN_IF_ERROR(database_->Write(std::move(view).Close(), edit.batch(), Durability::kSynced));
  Count(-1, tree.snapshots_delta(), row.lease().holder().empty() ? 0 : -1, -tree.freed_tokens());
  freed->insert(freed->end(), tree.freed().begin(), tree.freed().end());
  return absl::OkStatus();
}

absl::StatusOr<LeaseGrant> RocksdbCatalog::AcquireLease(const std::string& session_id, const std::string& holder,
                                                        const std::string& incarnation, absl::Duration ttl) {
  RWKV_ASSIGN_OR_RETURN(const KeyLocks::Guard guard, LockSession(session_id));
  SessionRow row;
  uint64_t opening;
  {
    RWKV_ASSIGN_OR_RETURN(const View view, View::Open(*database_, View::At::kLatest));
    opening = view.opening();
    RWKV_ASSIGN_OR_RETURN(row, Find(view, session_id));
  }
  LeaseRow& current = *row.mutable_lease();
  const bool was_held = !current.holder().empty();
  const absl::Time now = clock_->Now();
  const absl::Time expiry = absl::FromUnixNanos(current.expiry_unix_nanos());
  const bool alive = was_held && now < expiry;
  if (alive && current.holder() != holder) {
    return common::WithRetryInfo(
        common::WithErrorInfo(absl::AbortedError(absl::StrCat("session ", session_id, " is held by ", current.holder(),
                                                              " for another ", absl::FormatDuration(expiry - now))),
                              "LEASE_HELD", {{"holder", current.holder()}}),
        expiry - now);
  }
  if (!alive || current.incarnation() != incarnation) {
    RWKV_ASSIGN_OR_RETURN(const uint64_t token, NextId());
    current.set_fencing_token(token);
    current.set_holder(holder);
    current.set_incarnation(incarnation);
  }
  current.set_expiry_unix_nanos(absl::ToUnixNanos(now + ttl));
  row.set_use_unix_nanos(absl::ToUnixNanos(now));
  RWKV_ASSIGN_OR_RETURN(View view, View::Reopen(*database_, opening));
  Edit edit(view);
  PutSession(edit, session_id, row);
  RWKV_RETURN_IF_ERROR(database_->Write(std::move(view).Close(), edit.batch(), Durability::kSynced));
  Count(0, 0, was_held ? 0 : 1, 0);
  LeaseGrant grant;
  grant.lease.set_session_id(session_id);
  grant.lease.set_fencing_token(current.fencing_token());
  grant.log_branch = LogBranch(row);
  RWKV_ASSIGN_OR_RETURN(const View after, View::Open(*database_, View::At::kOnce));
  RWKV_ASSIGN_OR_RETURN(grant.session, ToSessionWithSnapshots(after, session_id, row));
  return grant;
}

absl::StatusOr<std::vector<v1::Lease>> RocksdbCatalog::RenewLeases(absl::Span<const v1::Lease> leases,
                                                                   absl::Duration ttl) {
  std::vector<std::string> keys;
  for (const v1::Lease& lease : leases) keys.push_back(absl::StrCat("session ", lease.session_id()));
  RWKV_ASSIGN_OR_RETURN(const KeyLocks::Guard guard, session_locks_.Lock(std::move(keys)));
  RWKV_ASSIGN_OR_RETURN(View view, View::Open(*database_, View::At::kLatest));
  Edit edit(view);
  std::vector<v1::Lease> lost;
  const absl::Time now = clock_->Now();
  for (const v1::Lease& lease : leases) {
    SessionRow row;
    RWKV_ASSIGN_OR_RETURN(const bool found, view.Get(SessionKey(lease.session_id()), &row));
    if (!found || !CheckLease(lease, row).ok()) {
      lost.push_back(lease);
      continue;
    }
    row.mutable_lease()->set_expiry_unix_nanos(absl::ToUnixNanos(now + ttl));
    row.set_use_unix_nanos(absl::ToUnixNanos(now));
    PutSession(edit, lease.session_id(), row);
  }
  if (!edit.empty()) {
    RWKV_RETURN_IF_ERROR(database_->Write(std::move(view).Close(), edit.batch(), Durability::kSynced));
  }
  return lost;
}

absl::Status RocksdbCatalog::ReleaseLease(const v1::Lease& lease) {
  RWKV_ASSIGN_OR_RETURN(const KeyLocks::Guard guard, LockSession(lease.session_id()));
  RWKV_ASSIGN_OR_RETURN(View view, View::Open(*database_, View::At::kLatest));
  RWKV_ASSIGN_OR_RETURN(SessionRow row, Find(view, lease.session_id()));
  if (row.lease().holder().empty() && row.lease().fencing_token() == lease.fencing_token()) return absl::OkStatus();
  if (absl::Status status = CheckLease(lease, row); !status.ok()) {
    fenced_total_.Increment();
    return status;
  }
  row.mutable_lease()->clear_holder();
  row.mutable_lease()->clear_incarnation();
  row.mutable_lease()->clear_expiry_unix_nanos();
  row.set_use_unix_nanos(absl::ToUnixNanos(clock_->Now()));
  Edit edit(view);
  PutSession(edit, lease.session_id(), row);
  RWKV_RETURN_IF_ERROR(database_->Write(std::move(view).Close(), edit.batch(), Durability::kSynced));
  Count(0, 0, -1, 0);
  return absl::OkStatus();
}

absl::StatusOr<TurnStart> RocksdbCatalog::BeginTurn(const v1::Lease& lease, const NewTurn& turn) {
  const std::string& session_id = lease.session_id();
  RWKV_ASSIGN_OR_RETURN(const KeyLocks::Guard guard, LockSession(session_id));
  RWKV_ASSIGN_OR_RETURN(View view, View::Open(*database_, View::At::kLatest));
  RWKV_ASSIGN_OR_RETURN(SessionRow row, Find(view, session_id));
  if (absl::Status status = CheckLease(lease, row); !status.ok()) {
    fenced_total_.Increment();
    return status;
  }
  RWKV_RETURN_IF_ERROR(CheckModel(session_id, row, turn.model_fingerprint));

  absl::optional<TurnRow> existing;
  std::vector<std::string> turn_keys;
  RWKV_RETURN_IF_ERROR(ForEachTurn(view, session_id, [&](absl::string_view key, const TurnRow& stored) {
    turn_keys.emplace_back(key);
    if (stored.request_id() == turn.request_id) existing = stored;
  }));
  TurnStart start;
  if (existing.has_value()) {
    RWKV_ASSIGN_OR_RETURN(start.turn, ToTurn(view, row, *existing));
    start.existed = true;
    start.session_tokens = row.length();
    return start;
  }
  if (turn.token_ids.size() > kMaxLogTokens - row.length()) {
    return absl::OutOfRangeError(absl::StrCat("session ", session_id, " has ", row.length(), " tokens; ",
                                              turn.token_ids.size(), " more are over the limit of ", kMaxLogTokens));
  }

  Edit edit(view);
  if (row.has_open_turn()) {
    RWKV_RETURN_IF_ERROR(FinishOpenTurn(view, edit, session_id, row, v1::FINISH_REASON_CANCELLED, nullptr));
  }
  for (size_t i = 0; i + kTurnsKept <= turn_keys.size(); ++i) edit.Delete(turn_keys[i]);
  TurnRow stored;
  stored.set_request_id(std::string(turn.request_id));
  stored.set_begin(row.length());
  stored.set_prompt_count(turn.token_ids.size());
  stored.set_spec(std::string(turn.spec));
  OpenTurn& open = *row.mutable_open_turn();
  open.set_sequence(row.next_turn());
  open.set_request_id(stored.request_id());
  open.set_begin(stored.begin());
  open.set_prompt_count(stored.prompt_count());
  row.set_next_turn(row.next_turn() + 1);
  edit.Put(TurnKey(session_id, open.sequence()), stored);
  PutTokens(edit, row.branch(), row.length(), turn.token_ids, {});
  row.set_length(row.length() + turn.token_ids.size());
  row.set_model_fingerprint(std::string(turn.model_fingerprint));
  row.set_update_unix_nanos(absl::ToUnixNanos(clock_->Now()));
  PutSession(edit, session_id, row);
  RWKV_RETURN_IF_ERROR(database_->Write(std::move(view).Close(), edit.batch(), Durability::kSynced));
  tokens_total_.Increment(static_cast<double>(turn.token_ids.size()));
  Count(0, 0, 0, static_cast<int64_t>(turn.token_ids.size()));

  start.turn.set_request_id(stored.request_id());
  start.turn.set_begin(stored.begin());
  start.turn.set_prompt_count(stored.prompt_count());
  start.turn.set_state(v1::TURN_STATE_OPEN);
  start.turn.set_spec(stored.spec());
  start.session_tokens = row.length();
  return start;
}

std::vector<absl::Status> RocksdbCatalog::AppendTokens(absl::Span<const v1::AppendItem* const> items) {
  std::vector<absl::Status> statuses(items.size());
  const auto all_fail = [&](const absl::Status& status) {
    for (absl::Status& item_status : statuses) {
      if (item_status.ok()) item_status = status;
    }
    return statuses;
  };
  std::vector<std::string> keys;
  for (const v1::AppendItem* item : items) keys.push_back(absl::StrCat("session ", item->lease().session_id()));
  const absl::StatusOr<KeyLocks::Guard> guard = session_locks_.Lock(std::move(keys));
  if (!guard.ok()) return all_fail(guard.status());
  absl::StatusOr<View> view = View::Open(*database_, View::At::kLatest);
  if (!view.ok()) return all_fail(view.status());

  Edit edit(*view);
  const int64_t now = absl::ToUnixNanos(clock_->Now());
  size_t tokens = 0;
  const auto append = [&](const v1::AppendItem& item) -> absl::Status {
    const std::string& session_id = item.lease().session_id();
    RWKV_ASSIGN_OR_RETURN(SessionRow row, Find(*view, session_id));
    if (absl::Status status = CheckLease(item.lease(), row); !status.ok()) {
      fenced_total_.Increment();
      return status;
    }
    if (!row.has_open_turn() || row.open_turn().request_id() != item.request_id()) {
      return common::WithErrorInfo(
          absl::AbortedError(absl::StrCat("session ", session_id, ": turn ", item.request_id(), " is not open",
                                          row.has_open_turn() ? "; open is " : "", row.open_turn().request_id())),
          "TURN_NOT_OPEN");
    }
    if (row.length() != item.expected_length()) {
      return common::WithErrorInfo(absl::AbortedError(absl::StrCat("session ", session_id, " has ", row.length(),
                                                                   " tokens, not ", item.expected_length())),
                                   "WRONG_LENGTH");
    }
    if (item.token_ids_size() > static_cast<int64_t>(kMaxLogTokens - row.length())) {
      return absl::OutOfRangeError(
          absl::StrCat("session ", session_id, " has ", row.length(), " tokens; the limit is ", kMaxLogTokens));
    }
    if (item.token_ids().empty() && item.finish_reason() == v1::FINISH_REASON_UNSPECIFIED) return absl::OkStatus();
    const uint64_t begin = row.length();
    row.set_length(begin + item.token_ids_size());
    row.set_update_unix_nanos(now);
    if (item.finish_reason() != v1::FINISH_REASON_UNSPECIFIED) {
      RWKV_RETURN_IF_ERROR(FinishOpenTurn(*view, edit, session_id, row, item.finish_reason(), &item));
    }
    PutTokens(edit, row.branch(), begin, item.token_ids(), item.logprobs());
    PutSession(edit, session_id, row);
    tokens += item.token_ids_size();
    return absl::OkStatus();
  };
  for (size_t i = 0; i < items.size(); ++i) statuses[i] = append(*items[i]);
  if (edit.empty()) return statuses;
  const absl::Status written = database_->Write((*std::move(view)).Close(), edit.batch(), Durability::kSynced);
  if (!written.ok()) return all_fail(written);
  tokens_total_.Increment(static_cast<double>(tokens));
  Count(0, 0, 0, static_cast<int64_t>(tokens));
  return statuses;
}

absl::StatusOr<absl::optional<v1::Turn>> RocksdbCatalog::FindTurn(const std::string& session_id,
                                                                  absl::string_view request_id) {
  RWKV_ASSIGN_OR_RETURN(const View view, View::Open(*database_, View::At::kOnce));
  RWKV_ASSIGN_OR_RETURN(const SessionRow row, Find(view, session_id));
  absl::optional<TurnRow> found;
  RWKV_RETURN_IF_ERROR(ForEachTurn(view, session_id, [&](absl::string_view key, const TurnRow& stored) {
    if (request_id.empty() || stored.request_id() == request_id) found = stored;
  }));
  if (!found.has_value()) return absl::optional<v1::Turn>();
  RWKV_ASSIGN_OR_RETURN(v1::Turn turn, ToTurn(view, row, *found));
  return absl::make_optional(std::move(turn));
}

absl::StatusOr<TokenPage> RocksdbCatalog::ReadTokens(const std::string& session_id, uint64_t begin, uint64_t end) {
  RWKV_ASSIGN_OR_RETURN(const View view, View::Open(*database_, View::At::kOnce));
  RWKV_ASSIGN_OR_RETURN(const SessionRow row, Find(view, session_id));
  if (end > row.length()) {
    return absl::OutOfRangeError(absl::StrCat("session ", session_id, " has ", row.length(), " tokens; [", begin, ", ",
                                              end, ") is beyond them"));
  }
  if (begin < end && begin < row.log_begin()) {
    return absl::OutOfRangeError(absl::StrCat("session ", session_id, " was imported without its first ",
                                              row.log_begin(), " tokens; [", begin, ", ", end, ") has some of them"));
  }
  RWKV_ASSIGN_OR_RETURN(const std::vector<Link> chain, view.Chain(row));
  RWKV_ASSIGN_OR_RETURN(LogChunk log, view.ReadLog(chain, begin, end, false));
  return TokenPage{std::move(log.token_ids), LogBranch(row)};
}

absl::Status RocksdbCatalog::CommitSnapshot(const v1::Lease& lease, const std::string& log_branch,
                                            const v1::SnapshotManifest& manifest, std::vector<std::string>* freed) {
  const std::string& session_id = lease.session_id();
  RWKV_ASSIGN_OR_RETURN(const KeyLocks::Guard guard, LockSession(session_id));
  SessionRow row;
  uint64_t opening;
  {
    RWKV_ASSIGN_OR_RETURN(const View view, View::Open(*database_, View::At::kLatest));
    opening = view.opening();
    RWKV_ASSIGN_OR_RETURN(row, Find(view, session_id));
  }
  if (absl::Status status = CheckLease(lease, row); !status.ok()) {
    fenced_total_.Increment();
    return status;
  }
  if (log_branch != LogBranch(row)) {
    return common::WithErrorInfo(absl::AbortedError(absl::StrCat("session ", session_id, " is on log branch ",
                                                                 row.branch(), ", not ", log_branch)),
                                 "OTHER_BRANCH");
  }
  RWKV_RETURN_IF_ERROR(CheckModel(session_id, row, manifest.model_fingerprint()));
  if (manifest.position() <= row.base_position() || manifest.position() > row.length()) {
    return absl::OutOfRangeError(absl::StrCat("session ", session_id, " has ", row.length(),
                                              " tokens; a snapshot at position ", manifest.position(),
                                              " is not of it"));
  }
  RWKV_ASSIGN_OR_RETURN(const KeyLocks::Guard family_guard, LockFamily(row.family()));
  RWKV_ASSIGN_OR_RETURN(View view, View::Reopen(*database_, opening));
  RWKV_ASSIGN_OR_RETURN(const absl::optional<std::string> at, view.Get(SnapshotIdKey(manifest.snapshot_id())));
  if (at.has_value()) {
    v1::SnapshotManifest committed;
    if (at->size() != 16) return absl::DataLossError("catalog: the row of a snapshot's id is corrupt");
    RWKV_ASSIGN_OR_RETURN(const bool found, view.Get(SnapshotKey(NumberAt(*at, 0), NumberAt(*at, 8)), &committed));
    if (found && committed.SerializeAsString() == manifest.SerializeAsString()) return absl::OkStatus();
    return absl::AlreadyExistsError(
        absl::StrCat("snapshot ", manifest.snapshot_id(), " exists already, at position ", NumberAt(*at, 8)));
  }
  RWKV_ASSIGN_OR_RETURN(const std::vector<Link> chain, view.Chain(row));
  const auto link =
      std::find_if(chain.begin(), chain.end(), [&](const Link& link) { return link.begin < manifest.position(); });
  if (link == chain.end()) return absl::DataLossError("catalog: a log does not begin where its base is");
  Edit edit(view);
  BranchTree tree(options_.snapshots_per_branch, &view, &edit);
  RWKV_RETURN_IF_ERROR(tree.AddSnapshot(*link, manifest));
  RWKV_RETURN_IF_ERROR(database_->Write(std::move(view).Close(), edit.batch(), Durability::kSynced));
  Count(0, tree.snapshots_delta(), 0, 0);
  freed->insert(freed->end(), tree.freed().begin(), tree.freed().end());
  return absl::OkStatus();
}

absl::StatusOr<absl::optional<v1::SnapshotManifest>> RocksdbCatalog::FindSnapshot(
    const std::string& session_id, uint64_t at_or_before, const std::string& model_fingerprint) {
  RWKV_ASSIGN_OR_RETURN(const View view, View::Open(*database_, View::At::kOnce));
  RWKV_ASSIGN_OR_RETURN(const SessionRow row, Find(view, session_id));
  RWKV_ASSIGN_OR_RETURN(const std::vector<Link> chain, view.Chain(row));
  for (const Link& link : chain) {
    RWKV_ASSIGN_OR_RETURN(const std::vector<SnapshotAt> snapshots,
                          view.Snapshots(link.branch, link.begin, std::min(link.end, at_or_before)));
    for (auto snapshot = snapshots.rbegin(); snapshot != snapshots.rend(); ++snapshot) {
      if (snapshot->manifest.model_fingerprint() == model_fingerprint) {
        return absl::optional<v1::SnapshotManifest>(snapshot->manifest);
      }
    }
  }
  if (row.has_base_position() && row.base_position() <= at_or_before && row.model_fingerprint() == model_fingerprint) {
    RWKV_ASSIGN_OR_RETURN(v1::SnapshotManifest base, view.Base(chain));
    return absl::make_optional(std::move(base));
  }
  return absl::optional<v1::SnapshotManifest>();
}

absl::StatusOr<bool> RocksdbCatalog::DropSnapshot(const std::string& session_id, const std::string& snapshot_id,
                                                  std::vector<std::string>* freed) {
  RWKV_ASSIGN_OR_RETURN(const KeyLocks::Guard guard, LockSession(session_id));
  SessionRow row;
  uint64_t opening;
  {
    RWKV_ASSIGN_OR_RETURN(const View view, View::Open(*database_, View::At::kLatest));
    opening = view.opening();
    RWKV_ASSIGN_OR_RETURN(row, Find(view, session_id));
  }
  RWKV_ASSIGN_OR_RETURN(const KeyLocks::Guard family_guard, LockFamily(row.family()));
  RWKV_ASSIGN_OR_RETURN(View view, View::Reopen(*database_, opening));
  RWKV_ASSIGN_OR_RETURN(const absl::optional<std::string> at, view.Get(SnapshotIdKey(snapshot_id)));
  if (!at.has_value()) return false;
  if (at->size() != 16) return absl::DataLossError("catalog: the row of a snapshot's id is corrupt");
  const uint64_t branch = NumberAt(*at, 0), position = NumberAt(*at, 8);
  RWKV_ASSIGN_OR_RETURN(const std::vector<Link> chain, view.Chain(row));
  if (row.has_base_position()) {
    RWKV_ASSIGN_OR_RETURN(const v1::SnapshotManifest base, view.Base(chain));
    if (base.snapshot_id() == snapshot_id) {
      return absl::FailedPreconditionError(absl::StrCat("snapshot ", snapshot_id, " is what session ", session_id,
                                                        " was imported with; nothing could take its place"));
    }
  }
  const bool reachable = std::any_of(chain.begin(), chain.end(), [&](const Link& link) {
    return link.branch == branch && link.begin < position && position <= link.end;
  });
  if (!reachable) {
    return absl::NotFoundError(absl::StrCat("session ", session_id, " has no snapshot ", snapshot_id));
  }
  SnapshotAt snapshot;
  snapshot.position = position;
  snapshot.manifest.set_snapshot_id(snapshot_id);
  Edit edit(view);
  BranchTree tree(options_.snapshots_per_branch, &view, &edit);
  tree.RemoveSnapshot(branch, snapshot);
  RWKV_RETURN_IF_ERROR(database_->Write(std::move(view).Close(), edit.batch(), Durability::kSynced));
  Count(0, tree.snapshots_delta(), 0, 0);
  freed->insert(freed->end(), tree.freed().begin(), tree.freed().end());
  return true;
}

absl::StatusOr<bool> RocksdbCatalog::HasSnapshot(const std::string& snapshot_id) {
  RWKV_ASSIGN_OR_RETURN(const View view, View::Open(*database_, View::At::kLatest));
  RWKV_ASSIGN_OR_RETURN(const absl::optional<std::string> at, view.Get(SnapshotIdKey(snapshot_id)));
  return at.has_value();
}

}  // namespace rwkv::state_store
