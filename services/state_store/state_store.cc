#include "services/state_store/state_store.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "absl/types/optional.h"
#include "kernels/base/status_macros.h"
#include "services/common/logging.h"

namespace rwkv::state_store {
namespace {

constexpr char kLookupsName[] = "rwkv_state_store_prefix_lookups_total";
constexpr char kLookupsHelp[] = "Inputs looked up in the prefix cache, by result.";

}  // namespace

StateStore::StateStore(const Options& options, Catalog* catalog, RecordStore* records, common::Clock* clock,
                       common::Metrics* metrics)
    : options_(options),
      catalog_(catalog),
      records_(records),
      clock_(clock),
      committed_total_(metrics->Counter("rwkv_state_store_snapshots_committed_total", "Snapshots made visible.")),
      freed_total_(metrics->Counter("rwkv_state_store_snapshots_freed_total",
                                    "Snapshots that rewind, delete, retention or a drop freed.")),
      dropped_total_(
          metrics->Counter("rwkv_state_store_snapshots_dropped_total", "Snapshots reported unusable, and dropped.")),
      orphans_total_(metrics->Counter("rwkv_state_store_orphans_total",
                                      "Snapshots never committed, or freed before a crash, whose records a sweep "
                                      "deleted.")),
      deleted_total_(metrics->Counter("rwkv_state_store_sessions_ended_total", "", {{"reason", "deleted"}})),
      prefix_hits_total_(metrics->Counter(kLookupsName, kLookupsHelp, {{"result", "hit"}})),
      prefix_misses_total_(metrics->Counter(kLookupsName, kLookupsHelp, {{"result", "miss"}})),
      prefixes_evicted_total_(metrics->Counter("rwkv_state_store_prefixes_evicted_total",
                                               "States of the prefix cache that went to make room for others.")),
      limits_(
          options.limits, catalog, records,
          [this](const std::string& session_id, absl::Time idle_before) -> absl::StatusOr<bool> {
            std::vector<std::string> freed;
            RWKV_ASSIGN_OR_RETURN(const bool ended, catalog_->EndIdleSession(session_id, idle_before, &freed));
            DeleteRecords(freed);
            return ended;
          },
          clock, metrics) {}

absl::StatusOr<v1::Session> StateStore::CreateSession(const std::string& session_id, const std::string& initial_state) {
  RWKV_ASSIGN_OR_RETURN(const SessionLimits::Place place, limits_.AdmitSession(session_id));
  return catalog_->CreateSession(session_id, initial_state);
}

absl::StatusOr<v1::Session> StateStore::ForkSession(const std::string& session_id, absl::optional<uint64_t> position,
                                                    const std::string& new_session_id) {
  RWKV_ASSIGN_OR_RETURN(const SessionLimits::Place place, limits_.AdmitSession(session_id));
  return catalog_->ForkSession(session_id, position, new_session_id);
}

absl::StatusOr<TurnStart> StateStore::BeginTurn(const v1::Lease& lease, const NewTurn& turn) {
  if (absl::Status full = limits_.AdmitTurn(lease.session_id()); !full.ok()) {
    RWKV_ASSIGN_OR_RETURN(const auto known, catalog_->FindTurn(lease.session_id(), turn.request_id));
    if (!known.has_value()) return full;
  }
  return catalog_->BeginTurn(lease, turn);
}

void StateStore::DeleteRecords(const std::vector<std::string>& snapshot_ids) {
  for (const std::string& snapshot_id : snapshot_ids) {
    freed_total_.Increment();
    if (const absl::Status status = records_->Delete(snapshot_id); !status.ok()) {
      common::LogWarning("records_left_to_sweep", {{"snapshot", snapshot_id}, {"error", status}});
    }
  }
}

absl::StatusOr<v1::Session> StateStore::RewindSession(const v1::Lease& lease, uint64_t position,
                                                      const std::string& log_branch) {
  std::vector<std::string> freed;
  absl::StatusOr<v1::Session> session = catalog_->RewindSession(lease, position, log_branch, &freed);
  DeleteRecords(freed);
  return session;
}

absl::Status StateStore::DeleteSession(const v1::Lease& lease) {
  std::vector<std::string> freed;
  absl::Status status = catalog_->DeleteSession(lease, &freed);
  DeleteRecords(freed);
  if (status.ok()) deleted_total_.Increment();
  return status;
}

absl::StatusOr<bool> StateStore::DropSnapshot(const std::string& session_id, const std::string& snapshot_id,
                                              const std::string& reason) {
  std::vector<std::string> freed;
  RWKV_ASSIGN_OR_RETURN(const bool dropped, catalog_->DropSnapshot(session_id, snapshot_id, &freed));
  DeleteRecords(freed);
  if (dropped) {
    dropped_total_.Increment();
    common::LogWarning("snapshot_dropped", {{"session", session_id}, {"snapshot", snapshot_id}, {"reason", reason}});
  }
  return dropped;
}

absl::Status StateStore::DropUncommitted(const std::string& snapshot_id) {
  RWKV_ASSIGN_OR_RETURN(const KeyLocks::Guard guard, snapshot_locks_.Lock({snapshot_id}));
  // Not only that nobody has: another store may be about to, for a call whose caller has given up.
  RWKV_ASSIGN_OR_RETURN(const bool condemned, catalog_->CondemnSnapshot(snapshot_id));
  if (!condemned) return absl::FailedPreconditionError(absl::StrCat("snapshot ", snapshot_id, " is committed"));
  return records_->Delete(snapshot_id);
}

absl::Status StateStore::CommitSnapshot(const v1::Lease& lease, const std::string& log_branch,
                                        const v1::SnapshotManifest& manifest) {
  std::vector<std::string> freed;
  {
    RWKV_ASSIGN_OR_RETURN(const KeyLocks::Guard guard, snapshot_locks_.Lock({manifest.snapshot_id()}));
    RWKV_RETURN_IF_ERROR(MakeRecordsDurable(manifest));
    RWKV_RETURN_IF_ERROR(catalog_->CommitSnapshot(lease, log_branch, manifest, &freed));
  }
  committed_total_.Increment();
  DeleteRecords(freed);
  return absl::OkStatus();
}

absl::StatusOr<v1::Session> StateStore::ImportSession(const std::string& session_id, const NewImport& import) {
  RWKV_ASSIGN_OR_RETURN(const SessionLimits::Place place, limits_.AdmitSession(session_id));
  RWKV_ASSIGN_OR_RETURN(const KeyLocks::Guard guard, snapshot_locks_.Lock({import.manifest.snapshot_id()}));
  RWKV_RETURN_IF_ERROR(MakeRecordsDurable(import.manifest));
  RWKV_ASSIGN_OR_RETURN(v1::Session session, catalog_->ImportSession(session_id, import));
  committed_total_.Increment();
  return session;
}

absl::Status StateStore::CheckHasPrefixes() const {
  if (options_.prefix_cache_bytes > 0) return absl::OkStatus();
  return absl::FailedPreconditionError("there is no prefix cache: --prefix_cache_bytes=0");
}

absl::StatusOr<absl::optional<v1::SnapshotManifest>> StateStore::FindPrefix(const v1::PrefixScope& scope,
                                                                            absl::Span<const uint32_t> token_ids) {
  RWKV_RETURN_IF_ERROR(CheckHasPrefixes());
  RWKV_ASSIGN_OR_RETURN(absl::optional<v1::SnapshotManifest> found, catalog_->FindPrefix(scope, token_ids));
  (found.has_value() ? prefix_hits_total_ : prefix_misses_total_).Increment();
  return found;
}

absl::StatusOr<bool> StateStore::PutPrefix(const NewPrefix& prefix) {
  RWKV_RETURN_IF_ERROR(CheckHasPrefixes());
  int64_t bytes = static_cast<int64_t>(prefix.token_ids.size()) * kPrefixTokenBytes;
  for (const v1::RecordInfo& info : prefix.manifest.records()) bytes += static_cast<int64_t>(info.bytes());
  if (bytes > options_.prefix_cache_bytes) {
    return absl::ResourceExhaustedError(absl::StrCat("a state of ", bytes, " bytes is more than the prefix cache has (",
                                                     "--prefix_cache_bytes=", options_.prefix_cache_bytes, ")"));
  }
  std::vector<std::string> freed;
  bool added = false;
  {
    RWKV_ASSIGN_OR_RETURN(const KeyLocks::Guard guard, snapshot_locks_.Lock({prefix.manifest.snapshot_id()}));
    RWKV_RETURN_IF_ERROR(MakeRecordsDurable(prefix.manifest));
    RWKV_ASSIGN_OR_RETURN(added, catalog_->PutPrefix(prefix, &freed));
    if (!added) {
      RWKV_ASSIGN_OR_RETURN(const bool was_lost, DropLostPrefix(prefix));
      if (was_lost) {
        freed.clear();
        RWKV_ASSIGN_OR_RETURN(added, catalog_->PutPrefix(prefix, &freed));
      }
    }
  }
  DeleteRecords(freed);
  if (added && catalog_->counts().prefix_bytes > options_.prefix_cache_bytes) RWKV_RETURN_IF_ERROR(EvictPrefixes());
  return added;
}

absl::StatusOr<bool> StateStore::DropLostPrefix(const NewPrefix& prefix) {
  RWKV_ASSIGN_OR_RETURN(const auto found, catalog_->FindPrefix(prefix.scope, prefix.token_ids));
  if (!found.has_value() || found->position() != prefix.token_ids.size()) return false;
  if (found->snapshot_id() == prefix.manifest.snapshot_id()) return false;
  for (const v1::RecordInfo& info : found->records()) {
    const absl::Status status = records_->Check(info);
    if (status.ok()) continue;
    if (!absl::IsDataLoss(status)) return status;
    RWKV_RETURN_IF_ERROR(DropPrefix(found->snapshot_id(), status.ToString()));
    return true;
  }
  return false;
}

absl::Status StateStore::DropPrefix(const std::string& snapshot_id, const std::string& reason) {
  std::vector<std::string> freed;
  RWKV_ASSIGN_OR_RETURN(const bool dropped, catalog_->DropPrefix(snapshot_id, &freed));
  DeleteRecords(freed);
  if (!dropped) return absl::OkStatus();
  dropped_total_.Increment();
  common::LogWarning("prefix_dropped", {{"snapshot", snapshot_id}, {"reason", reason}});
  return absl::OkStatus();
}

absl::Status StateStore::EvictPrefixes() {
  std::vector<std::string> freed;
  const absl::Status status = catalog_->EvictPrefixes(options_.prefix_cache_bytes, &freed);
  prefixes_evicted_total_.Increment(static_cast<double>(freed.size()));
  DeleteRecords(freed);
  return status;
}

absl::Status StateStore::SweepSessions() {
  const absl::Status status = limits_.Sweep();
  RWKV_RETURN_IF_ERROR(EvictPrefixes());
  return status;
}

absl::Status StateStore::MakeRecordsDurable(const v1::SnapshotManifest& manifest) {
  RWKV_RETURN_IF_ERROR(records_->MakeDurable(manifest));
  // Behind it: an fsync that failed on another's behalf has made those of them forgotten that it may have been part of.
  for (const v1::RecordInfo& info : manifest.records()) RWKV_RETURN_IF_ERROR(records_->Check(info));
  return absl::OkStatus();
}

absl::Status StateStore::SweepOrphans() {
  std::vector<RecordStore::Stored> old;
  const absl::Time cutoff = clock_->Now() - options_.orphan_age;
  RWKV_RETURN_IF_ERROR(records_->ForEach([&](const RecordStore::Stored& stored) {
    if (stored.newest_put <= cutoff) old.push_back(stored);
  }));
  Bases bases;
  absl::Status first;
  for (const RecordStore::Stored& stored : old) {
    const absl::Status status = SweepOrphan(stored, &bases);
    if (absl::IsUnavailable(status)) return status;
    if (!status.ok()) common::LogError("orphan_not_swept", {{"snapshot", stored.snapshot_id}, {"error", status}});
    first.Update(status);  // One that cannot be swept is in no other's way.
  }
  first.Update(catalog_->ForgetCondemned(cutoff));
  return first;
}

absl::Status StateStore::SweepOrphan(const RecordStore::Stored& stored, Bases* bases) {
  RWKV_ASSIGN_OR_RETURN(const KeyLocks::Guard guard, snapshot_locks_.Lock({stored.snapshot_id}));
  RWKV_ASSIGN_OR_RETURN(const bool committed, catalog_->HasSnapshot(stored.snapshot_id));
  if (committed) return absl::OkStatus();  // Most are.
  if (!bases->has_value()) *bases = catalog_->BaseSnapshots();
  RWKV_RETURN_IF_ERROR((*bases)->status());
  if ((**bases)->count(stored.snapshot_id) > 0) {  // Its own row is lost.
    common::LogError("snapshot_row_lost", {{"snapshot", stored.snapshot_id}});
    return absl::OkStatus();
  }
  RWKV_ASSIGN_OR_RETURN(const bool condemned, catalog_->CondemnSnapshot(stored.snapshot_id));
  if (!condemned) return absl::OkStatus();
  RWKV_RETURN_IF_ERROR(records_->Delete(stored.snapshot_id));
  orphans_total_.Increment();
  common::LogInfo("orphan_swept", {{"snapshot", stored.snapshot_id}, {"bytes", stored.bytes}});
  return absl::OkStatus();
}

}  // namespace rwkv::state_store
