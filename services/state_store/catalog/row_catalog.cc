#include "services/state_store/catalog/row_catalog.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "services/common/grpc_status.h"
#include "services/common/logging.h"
#include "services/common/tenant_ids.h"
#include "services/state_store/catalog/branch_tree.h"
#include "services/state_store/catalog/catalog_rows.h"
#include "services/state_store/catalog/session_rows.h"
#include "services/state_store/catalog/view.h"
#include "services/state_store/rows/row_store.h"

namespace rwkv::state_store {
namespace {

constexpr int kLoadPage = 4096;  // Sessions looked at in one transaction.

// The first key behind all sessions of a tenant.
std::string BehindTenant(absl::string_view tenant) {
  std::string key = SessionKey(common::ScopedId(tenant, ""));
  ++key.back();
  return key;
}

}  // namespace

RowCatalog::RowCatalog(const Options& options, RowStore* rows, common::Clock* clock, common::Metrics* metrics)
    : options_(options),
      rows_(rows),
      clock_(clock),
      sessions_gauge_(metrics->Gauge("rwkv_state_store_sessions", "Sessions in the catalog.")),
      snapshots_gauge_(metrics->Gauge("rwkv_state_store_snapshots", "Snapshots that are committed.")),
      leases_gauge_(metrics->Gauge("rwkv_state_store_leases", "Leases granted and not released, expired or not.")),
      tokens_gauge_(metrics->Gauge("rwkv_state_store_log_tokens", "Tokens of all logs, shared ones once.")),
      tokens_total_(metrics->Counter("rwkv_state_store_appended_tokens_total", "Tokens appended, input included.")),
      fenced_total_(metrics->Counter("rwkv_state_store_fenced_total", "Changes refused for an old fencing token.")),
      prefixes_gauge_(metrics->Gauge("rwkv_state_store_prefixes", "States in the prefix cache.")),
      prefix_bytes_gauge_(metrics->Gauge("rwkv_state_store_prefix_bytes", "What --prefix_cache_bytes bounds.")) {}

absl::StatusOr<std::unique_ptr<RowCatalog>> RowCatalog::Create(const Options& options, RowStore* rows,
                                                               common::Clock* clock, common::Metrics* metrics) {
  if (options.snapshots_per_branch < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("snapshots_per_branch is ", options.snapshots_per_branch, ", want at least 1"));
  }
  std::unique_ptr<RowCatalog> catalog(new RowCatalog(options, rows, clock, metrics));
  RWKV_RETURN_IF_ERROR(catalog->Load());
  return catalog;
}

absl::Status RowCatalog::Load() {
  CatalogCounts counts;
  RWKV_RETURN_IF_ERROR(AcceptDamage(LoadSessions(&counts)));
  const absl::StatusOr<int64_t> branch_tokens = LoadBranches();
  RWKV_RETURN_IF_ERROR(AcceptDamage(branch_tokens.status()));
  counts.tokens += branch_tokens.value_or(0);
  {
    RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<RowReader> rows, rows_->Read());
    RWKV_RETURN_IF_ERROR(
        AcceptDamage(rows->Scan("i", "j", [&](absl::string_view, absl::string_view) -> absl::StatusOr<bool> {
          ++counts.snapshots;
          return true;
        })));
  }
  sessions_ = counts.sessions;
  snapshots_ = counts.snapshots;
  leases_ = counts.leases;
  tokens_ = counts.tokens;
  Count(0, 0, 0, 0);
  std::vector<std::string> freed;
  return EvictPrefixes(INT64_MAX, &freed);  // Counts them.
}

absl::Status RowCatalog::AcceptDamage(const absl::Status& status) const {
  if (!rows_->shared() || !absl::IsDataLoss(status)) return status;
  common::LogError("catalog_damaged",
                   {{"error", status}, {"then", "what does not need this row is served; counts are too low"}});
  return absl::OkStatus();
}

absl::Status RowCatalog::LoadSessions(CatalogCounts* counts) {
  std::string begin = "s";
  for (bool more = true; more;) {
    more = false;
    int sessions = 0;
    RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<RowTransaction> rows, rows_->Begin({}));
    const View view(rows.get());
    Edit edit(rows.get());
    RWKV_RETURN_IF_ERROR(
        view.Scan(begin, "t", [&](absl::string_view key, absl::string_view value) -> absl::StatusOr<bool> {
          if (sessions == kLoadPage) {
            begin = std::string(key);
            more = true;
            return false;
          }
          SessionRow row;
          if (!row.ParseFromArray(value.data(), static_cast<int>(value.size()))) {
            return absl::DataLossError(absl::StrCat("catalog: the row of session ", key.substr(1), " is corrupt"));
          }
          ++sessions;
          if (!row.lease().holder().empty()) ++counts->leases;
          counts->tokens += static_cast<int64_t>(row.length());
          // Of an older build. Of rows that others share there is none.
          if (!rows_->shared() && !IsIndexed(row)) PutSession(edit, key.substr(1), row);
          return true;
        }));
    if (!rows->empty()) RWKV_RETURN_IF_ERROR(rows->Commit());
    counts->sessions += sessions;
  }
  return absl::OkStatus();
}

absl::StatusOr<int64_t> RowCatalog::LoadBranches() {
  // A branch has the tokens from its fork position to its end: for a head its session's length, for the others the last
  // fork below it, which is the last of its edges.
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<RowReader> rows, rows_->Read());
  const View view(rows.get());
  int64_t tokens = 0;
  RWKV_RETURN_IF_ERROR(view.Scan("b", "c", [&](absl::string_view key, absl::string_view) -> absl::StatusOr<bool> {
    RWKV_ASSIGN_OR_RETURN(const BranchRow row, view.Branch(FirstNumber(key)));
    tokens -= static_cast<int64_t>(row.fork_position());
    if (row.is_head()) return true;
    Edit none(nullptr);
    RWKV_ASSIGN_OR_RETURN(const absl::optional<uint64_t> end,
                          BranchTree(options_.snapshots_per_branch, &view, &none).LastFork(FirstNumber(key)));
    tokens += static_cast<int64_t>(end.value_or(row.fork_position()));
    return true;
  }));
  return tokens;
}

void RowCatalog::Count(int sessions, int snapshots, int leases, int64_t tokens) {
  sessions_gauge_.Set(static_cast<double>(sessions_ += sessions));
  snapshots_gauge_.Set(static_cast<double>(snapshots_ += snapshots));
  leases_gauge_.Set(static_cast<double>(leases_ += leases));
  tokens_gauge_.Set(static_cast<double>(tokens_ += tokens));
}

CatalogCounts RowCatalog::counts() const {
  const int64_t prefix_record_bytes = prefix_record_bytes_.load();
  return {sessions_.load(),   snapshots_.load(), leases_.load(),
          tokens_.load(),     prefixes_.load(),  prefix_record_bytes + prefix_tokens_.load() * kPrefixTokenBytes,
          prefix_record_bytes};
}

absl::StatusOr<SessionRow> RowCatalog::Find(const View& view, const std::string& session_id) const {
  absl::StatusOr<SessionRow> row = view.Session(session_id);
  if (!absl::IsNotFound(row.status()) || options_.how_sessions_end.empty()) return row;
  return absl::NotFoundError(absl::StrCat(row.status().message(), "; ", options_.how_sessions_end));
}

absl::StatusOr<std::unique_ptr<RowTransaction>> RowCatalog::Begin(const std::vector<std::string>& session_ids) {
  std::vector<std::string> locks;
  locks.reserve(session_ids.size());
  for (const std::string& session_id : session_ids) locks.push_back(absl::StrCat("session ", session_id));
  return rows_->Begin(locks);
}

absl::StatusOr<v1::Session> RowCatalog::CreateSession(const std::string& session_id, const std::string& initial_state) {
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<RowTransaction> rows, Begin({session_id}));
  const View view(rows.get());
  RWKV_ASSIGN_OR_RETURN(const uint64_t branch, rows->NextId());
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
  Edit edit(rows.get());
  BranchTree tree(options_.snapshots_per_branch, &view, &edit);
  tree.AddRoot(branch, 0, nullptr);
  PutSession(edit, session_id, row);
  RWKV_RETURN_IF_ERROR(rows->Commit());
  Count(1, 0, 0, 0);
  return ToSession(session_id, row);
}

absl::StatusOr<v1::Session> RowCatalog::ImportSession(const std::string& session_id, const NewImport& import) {
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<RowTransaction> rows, Begin({session_id}));
  const View view(rows.get());
  RWKV_ASSIGN_OR_RETURN(const uint64_t branch, rows->NextId());
  SessionRow row;
  RWKV_ASSIGN_OR_RETURN(const bool exists, view.Get(SessionKey(session_id), &row));
  if (exists) return absl::AlreadyExistsError(absl::StrCat("session ", session_id, " exists already"));
  const v1::SnapshotManifest& manifest = import.manifest;
  RWKV_RETURN_IF_ERROR(rows->Extend({SnapshotLock(manifest.snapshot_id())}));
  RWKV_RETURN_IF_ERROR(CheckNotCondemned(view, manifest.snapshot_id()));
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
  Edit edit(rows.get());
  BranchTree tree(options_.snapshots_per_branch, &view, &edit);
  tree.AddRoot(branch, log_begin, import.base ? &manifest : nullptr);
  if (!import.base) RWKV_RETURN_IF_ERROR(tree.AddSnapshot({branch, log_begin, row.length()}, manifest));
  PutTokens(edit, branch, log_begin, import.token_ids, {});
  PutSession(edit, session_id, row);
  RWKV_RETURN_IF_ERROR(rows->Commit());
  Count(1, tree.snapshots_delta(), 0, static_cast<int64_t>(import.token_ids.size()));
  tokens_total_.Increment(static_cast<double>(import.token_ids.size()));
  v1::Session session = ToSession(session_id, row);
  session.add_snapshot_positions(manifest.position());
  return session;
}

absl::StatusOr<v1::Session> RowCatalog::GetSession(const std::string& session_id) {
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<RowReader> rows, rows_->Read());
  const View view(rows.get());
  RWKV_ASSIGN_OR_RETURN(const SessionRow row, Find(view, session_id));
  return ToSessionWithSnapshots(view, session_id, row);
}

absl::StatusOr<SessionPage> RowCatalog::ListSessions(int page_size, const std::string& page_token) {
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<RowReader> rows, rows_->Read());
  const View view(rows.get());
  SessionPage page;
  const absl::string_view tenant = common::SplitScopedId(page_token).tenant;
  std::string begin = page_token.empty() ? "s" : SessionKey(page_token) + '\0';
  const std::string end = tenant.empty() ? "t" : BehindTenant(tenant);
  for (bool more = true; more;) {
    more = false;
    RWKV_RETURN_IF_ERROR(
        view.Scan(begin, end, [&](absl::string_view key, absl::string_view value) -> absl::StatusOr<bool> {
          const absl::string_view other = common::SplitScopedId(key.substr(1)).tenant;
          if (tenant.empty() && !other.empty()) {  // On behind that tenant's.
            begin = BehindTenant(other);
            more = true;
            return false;
          }
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
  }
  return page;
}

absl::StatusOr<v1::Session> RowCatalog::ForkSession(const std::string& session_id, absl::optional<uint64_t> position,
                                                    const std::string& new_session_id) {
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<RowTransaction> rows, Begin({session_id, new_session_id}));
  const View view(rows.get());
  RWKV_ASSIGN_OR_RETURN(const uint64_t branch, rows->NextId());
  SessionRow source;
  RWKV_ASSIGN_OR_RETURN(source, Find(view, session_id));
  SessionRow taken;
  RWKV_ASSIGN_OR_RETURN(const bool exists, view.Get(SessionKey(new_session_id), &taken));
  if (exists) return absl::AlreadyExistsError(absl::StrCat("session ", new_session_id, " exists already"));
  const uint64_t at = position.value_or(source.length());
  RWKV_RETURN_IF_ERROR(CheckPosition(session_id, source, at, "forked at"));
  RWKV_RETURN_IF_ERROR(rows->Extend({FamilyLock(source.family())}));
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
  Edit edit(rows.get());
  BranchTree tree(options_.snapshots_per_branch, &view, &edit);
  tree.Fork(chain, has_base, at, branch);
  PutSession(edit, new_session_id, row);
  v1::Session session = ToSession(new_session_id, row);
  RWKV_RETURN_IF_ERROR(AddSnapshotPositions(view, row, chain, {}, &session));
  RWKV_RETURN_IF_ERROR(rows->Commit());
  Count(1, 0, 0, 0);
  return session;
}

absl::StatusOr<v1::Session> RowCatalog::RewindSession(const v1::Lease& lease, uint64_t position,
                                                      const std::string& log_branch, std::vector<std::string>* freed) {
  const std::string& session_id = lease.session_id();
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<RowTransaction> rows, Begin({session_id}));
  const View view(rows.get());
  RWKV_ASSIGN_OR_RETURN(const uint64_t branch, rows->NextId());
  SessionRow row;
  RWKV_ASSIGN_OR_RETURN(row, Find(view, session_id));
  if (absl::Status status = CheckLease(lease, row); !status.ok()) {
    fenced_total_.Increment();
    return status;
  }
  // First, since the position need not be one of this branch any more.
  if (!log_branch.empty() && log_branch != LogBranch(row) && position != row.length()) {
    return OtherBranch(session_id, row, log_branch);
  }
  RWKV_RETURN_IF_ERROR(CheckPosition(session_id, row, position, "rewound to"));
  if (position == row.length()) {
    if (!row.loss().empty()) {
      row.clear_loss();
      Edit edit(rows.get());
      PutSession(edit, session_id, row);
      RWKV_RETURN_IF_ERROR(rows->Commit());
      return ToSession(session_id, row);
    }
    return ToSessionWithSnapshots(view, session_id, row);
  }
  RWKV_RETURN_IF_ERROR(rows->Extend({FamilyLock(row.family())}));
  RWKV_ASSIGN_OR_RETURN(const std::vector<Link> chain, view.Chain(row));
  Edit edit(rows.get());
  BranchTree tree(options_.snapshots_per_branch, &view, &edit);
  tree.Fork(chain, row.has_base_position(), position, branch);
  RWKV_RETURN_IF_ERROR(tree.Release(row.branch(), row.length()));
  RWKV_RETURN_IF_ERROR(ForEachTurn(view, session_id, [&](absl::string_view key, const TurnRow& turn) {
    if (TurnEnd(turn, row) > position) edit.Delete(key);
  }));
  row.clear_loss();
  row.clear_open_turn();  // An open turn ends at the log's end, which is beyond the position.
  row.set_branch(branch);
  row.set_length(position);
  row.set_update_unix_nanos(absl::ToUnixNanos(clock_->Now()));
  PutSession(edit, session_id, row);
  v1::Session session = ToSession(session_id, row);
  RWKV_RETURN_IF_ERROR(AddSnapshotPositions(view, row, chain, tree.freed(), &session));
  RWKV_RETURN_IF_ERROR(rows->Commit());
  Count(0, tree.snapshots_delta(), 0, -tree.freed_tokens());
  freed->insert(freed->end(), tree.freed().begin(), tree.freed().end());
  return session;
}

absl::Status RowCatalog::DeleteSession(const v1::Lease& lease, std::vector<std::string>* freed) {
  const std::string& session_id = lease.session_id();
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<RowTransaction> rows, Begin({session_id}));
  const View view(rows.get());
  SessionRow row;
  RWKV_ASSIGN_OR_RETURN(row, Find(view, session_id));
  if (absl::Status status = CheckLease(lease, row); !status.ok()) {
    fenced_total_.Increment();
    return status;
  }
  return Erase(*rows, session_id, row, freed);
}

absl::Status RowCatalog::Erase(RowTransaction& rows, const std::string& session_id, const SessionRow& row,
                               std::vector<std::string>* freed) {
  const View view(&rows);
  RWKV_RETURN_IF_ERROR(rows.Extend({FamilyLock(row.family())}));
  Edit edit(&rows);
  BranchTree tree(options_.snapshots_per_branch, &view, &edit);
  RWKV_RETURN_IF_ERROR(tree.Release(row.branch(), row.length()));
  edit.DeleteRange(TurnKey(session_id, 0), TurnKey(session_id, UINT64_MAX));
  state_store::DeleteSession(edit, session_id, row);
  RWKV_RETURN_IF_ERROR(KeepUsage(rows, edit, session_id, row));
  RWKV_RETURN_IF_ERROR(rows.Commit());
  Count(-1, tree.snapshots_delta(), row.lease().holder().empty() ? 0 : -1, -tree.freed_tokens());
  freed->insert(freed->end(), tree.freed().begin(), tree.freed().end());
  return absl::OkStatus();
}

}  // namespace rwkv::state_store
