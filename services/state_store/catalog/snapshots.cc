// What RowCatalog does with snapshots.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "services/common/grpc_status.h"
#include "services/state_store/catalog/branch_tree.h"
#include "services/state_store/catalog/catalog_rows.h"
#include "services/state_store/catalog/keys.h"
#include "services/state_store/catalog/row_catalog.h"
#include "services/state_store/catalog/rows.pb.h"
#include "services/state_store/catalog/view.h"

namespace rwkv::state_store {

absl::Status RowCatalog::CommitSnapshot(const v1::Lease& lease, const std::string& log_branch,
                                        const v1::SnapshotManifest& manifest, std::vector<std::string>* freed) {
  const std::string& session_id = lease.session_id();
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<RowTransaction> rows, Begin({session_id}));
  const View view(rows.get());
  SessionRow row;
  RWKV_ASSIGN_OR_RETURN(row, Find(view, session_id));
  if (absl::Status status = CheckLease(lease, row); !status.ok()) {
    fenced_total_.Increment();
    return status;
  }
  if (log_branch != LogBranch(row)) return OtherBranch(session_id, row, log_branch);
  RWKV_RETURN_IF_ERROR(CheckModel(session_id, row, manifest.model_fingerprint()));
  if (manifest.position() <= row.base_position() || manifest.position() > row.length()) {
    return absl::OutOfRangeError(absl::StrCat("session ", session_id, " has ", row.length(),
                                              " tokens; a snapshot at position ", manifest.position(),
                                              " is not of it"));
  }
  RWKV_RETURN_IF_ERROR(rows->Extend({FamilyLock(row.family()), SnapshotLock(manifest.snapshot_id())}));
  RWKV_RETURN_IF_ERROR(CheckNotCondemned(view, manifest.snapshot_id()));
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
  Edit edit(rows.get());
  BranchTree tree(options_.snapshots_per_branch, &view, &edit);
  RWKV_RETURN_IF_ERROR(tree.AddSnapshot(*link, manifest));
  RWKV_RETURN_IF_ERROR(rows->Commit());
  Count(0, tree.snapshots_delta(), 0, 0);
  freed->insert(freed->end(), tree.freed().begin(), tree.freed().end());
  return absl::OkStatus();
}

absl::StatusOr<absl::optional<v1::SnapshotManifest>> RowCatalog::FindSnapshot(const std::string& session_id,
                                                                              uint64_t at_or_before,
                                                                              const std::string& model_fingerprint) {
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<RowReader> rows, rows_->Read());
  const View view(rows.get());
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

absl::StatusOr<bool> RowCatalog::DropSnapshot(const std::string& session_id, const std::string& snapshot_id,
                                              std::vector<std::string>* freed) {
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<RowTransaction> rows, Begin({session_id}));
  const View view(rows.get());
  SessionRow row;
  RWKV_ASSIGN_OR_RETURN(row, Find(view, session_id));
  RWKV_RETURN_IF_ERROR(rows->Extend({FamilyLock(row.family())}));
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
  Edit edit(rows.get());
  BranchTree tree(options_.snapshots_per_branch, &view, &edit);
  tree.RemoveSnapshot(branch, snapshot);
  RWKV_RETURN_IF_ERROR(rows->Commit());
  Count(0, tree.snapshots_delta(), 0, 0);
  freed->insert(freed->end(), tree.freed().begin(), tree.freed().end());
  return true;
}

absl::StatusOr<bool> RowCatalog::HasSnapshot(const std::string& snapshot_id) {
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<RowReader> rows, rows_->Read());
  const View view(rows.get());
  RWKV_ASSIGN_OR_RETURN(const absl::optional<std::string> at, view.Get(SnapshotIdKey(snapshot_id)));
  if (at.has_value()) return true;
  return HasPrefix(*rows, snapshot_id);
}

absl::StatusOr<std::set<std::string>> RowCatalog::BaseSnapshots() {
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<RowReader> rows, rows_->Read());
  std::set<std::string> ids;
  RWKV_RETURN_IF_ERROR(
      rows->Scan("m", "n", [&](absl::string_view key, absl::string_view value) -> absl::StatusOr<bool> {
        v1::SnapshotManifest manifest;
        if (!manifest.ParseFromArray(value.data(), static_cast<int>(value.size()))) {
          return absl::DataLossError("catalog: the row of an imported log's state is corrupt");
        }
        ids.insert(manifest.snapshot_id());
        return true;
      }));
  return ids;
}

absl::StatusOr<absl::optional<v1::SnapshotManifest>> RowCatalog::FindManifest(const std::string& snapshot_id) {
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<RowReader> rows, rows_->Read());
  const View view(rows.get());
  v1::SnapshotManifest manifest;
  RWKV_ASSIGN_OR_RETURN(const absl::optional<std::string> at, view.Get(SnapshotIdKey(snapshot_id)));
  if (at.has_value()) {
    if (at->size() != 16) return absl::DataLossError("catalog: the row of a snapshot's id is corrupt");
    for (const std::string& key : {SnapshotKey(NumberAt(*at, 0), NumberAt(*at, 8)), BaseKey(NumberAt(*at, 0))}) {
      RWKV_ASSIGN_OR_RETURN(const bool found, view.Get(key, &manifest));
      if (found && manifest.snapshot_id() == snapshot_id) return absl::make_optional(std::move(manifest));
    }
    return absl::DataLossError(absl::StrCat("catalog: the manifest of snapshot ", snapshot_id, " is gone"));
  }
  PrefixRow prefix;
  RWKV_ASSIGN_OR_RETURN(const bool found, view.Get(PrefixKey(snapshot_id), &prefix));
  if (!found || !manifest.ParseFromString(prefix.manifest())) return absl::optional<v1::SnapshotManifest>();
  return absl::make_optional(std::move(manifest));
}

absl::StatusOr<bool> RowCatalog::CondemnSnapshot(const std::string& snapshot_id) {
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<RowTransaction> rows, rows_->Begin({SnapshotLock(snapshot_id)}));
  RWKV_ASSIGN_OR_RETURN(const absl::optional<std::string> at, rows->Get(SnapshotIdKey(snapshot_id)));
  if (at.has_value()) return false;
  RWKV_ASSIGN_OR_RETURN(const bool is_prefix, HasPrefix(*rows, snapshot_id));
  if (is_prefix) return false;
  std::string now;
  AppendNumber(now, static_cast<uint64_t>(absl::ToUnixNanos(clock_->Now())));
  rows->Put(CondemnedKey(snapshot_id), now);
  RWKV_RETURN_IF_ERROR(rows->Commit());
  return true;
}

absl::Status RowCatalog::ForgetCondemned(absl::Time before) {
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<RowTransaction> rows, rows_->Begin({}));
  RWKV_RETURN_IF_ERROR(
      rows->Scan("d", "e", [&](absl::string_view key, absl::string_view value) -> absl::StatusOr<bool> {
        const auto condemned = value.size() == 8 ? static_cast<int64_t>(NumberAt(value, 0)) : 0;
        if (absl::FromUnixNanos(condemned) <= before) rows->Delete(key);
        return true;
      }));
  return rows->empty() ? absl::OkStatus() : rows->Commit();
}

}  // namespace rwkv::state_store
