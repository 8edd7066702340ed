#include "services/state_store/catalog/branch_tree.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "kernels/base/status_macros.h"
#include "services/state_store/rows/numbers.h"

namespace rwkv::state_store {
namespace {

constexpr uint64_t kNoEnd = UINT64_MAX - 1;  // Beyond any position; one more is still a number.

}  // namespace

void BranchTree::AddRoot(uint64_t branch, uint64_t log_begin, const v1::SnapshotManifest* base) {
  BranchRow row;
  row.set_is_head(true);
  row.set_fork_position(log_begin);
  edit_->Put(BranchKey(branch), row);
  if (base == nullptr) return;
  edit_->Put(BaseKey(branch), *base);
  PutSnapshotId(base->snapshot_id(), branch, base->position());
  ++snapshots_delta_;
}

void BranchTree::Fork(const std::vector<Link>& chain, bool has_base, uint64_t position, uint64_t new_branch) {
  BranchRow row;
  row.set_is_head(true);
  // Of a part [begin, end), the token before `position` is in it if begin < position. Position 0 shares nothing.
  auto link = std::find_if(chain.begin(), chain.end(), [&](const Link& link) { return link.begin < position; });
  if (link == chain.end() && has_base) --link;
  if (link != chain.end()) {
    row.set_parent(link->branch);
    row.set_fork_position(position);
    const std::string edge = EdgeKey(link->branch, position, new_branch);
    added_edges_.insert(edge);
    edit_->Put(edge, "");
  }
  edit_->Put(BranchKey(new_branch), row);
}

absl::StatusOr<absl::optional<uint64_t>> BranchTree::LastFork(uint64_t branch) const {
  absl::optional<uint64_t> last;
  RWKV_RETURN_IF_ERROR(view_->ScanBack(EdgeKey(branch, 0, 0), EdgeKey(branch + 1, 0, 0),
                                       [&](absl::string_view key, absl::string_view) -> absl::StatusOr<bool> {
                                         if (removed_edges_.count(std::string(key)) > 0) return true;
                                         last = SecondNumber(key);
                                         return false;
                                       }));
  for (const std::string& edge : added_edges_) {
    if (FirstNumber(edge) == branch) last = std::max(last.value_or(0), SecondNumber(edge));
  }
  return last;
}

absl::StatusOr<bool> BranchTree::HasForkIn(uint64_t branch, uint64_t begin, uint64_t end) const {
  for (const std::string& edge : added_edges_) {
    if (FirstNumber(edge) == branch && SecondNumber(edge) >= begin && SecondNumber(edge) < end) return true;
  }
  bool found = false;
  RWKV_RETURN_IF_ERROR(view_->Scan(EdgeKey(branch, begin, 0), EdgeKey(branch, end, 0),
                                   [&](absl::string_view key, absl::string_view) -> absl::StatusOr<bool> {
                                     found = removed_edges_.count(std::string(key)) == 0;
                                     return !found;
                                   }));
  return found;
}

absl::Status BranchTree::Release(uint64_t branch, uint64_t length) {
  uint64_t old_end = length;  // Of the branch's tokens.
  RWKV_ASSIGN_OR_RETURN(BranchRow row, view_->Branch(branch));
  row.set_is_head(false);
  edit_->Put(BranchKey(branch), row);
  for (;;) {
    RWKV_ASSIGN_OR_RETURN(std::vector<SnapshotAt> snapshots, view_->Snapshots(branch, 0, kNoEnd));
    // A head keeps its tokens; only a fork that needed an old snapshot may be gone.
    if (row.is_head()) return Retain(branch, snapshots);
    RWKV_ASSIGN_OR_RETURN(const absl::optional<uint64_t> end, LastFork(branch));
    while (!snapshots.empty() && snapshots.back().position > end.value_or(0)) {
      RemoveSnapshot(branch, snapshots.back());
      snapshots.pop_back();
    }
    freed_tokens_ += static_cast<int64_t>(old_end - end.value_or(row.fork_position()));
    if (end.has_value()) {
      RWKV_RETURN_IF_ERROR(Trim(branch, row.fork_position(), *end));
      return Retain(branch, snapshots);
    }
    edit_->DeleteRange(LogKey(branch, 0), LogKey(branch + 1, 0));
    edit_->Delete(BranchKey(branch));
    if (row.parent() == 0) return RemoveBase(branch);
    const std::string edge = EdgeKey(row.parent(), row.fork_position(), branch);
    removed_edges_.insert(edge);
    edit_->Delete(edge);
    const uint64_t removed_fork = row.fork_position();
    branch = row.parent();
    RWKV_ASSIGN_OR_RETURN(row, view_->Branch(branch));
    if (row.is_head()) continue;
    // What it kept, it kept for its last fork, the removed one included.
    RWKV_ASSIGN_OR_RETURN(const absl::optional<uint64_t> others, LastFork(branch));
    old_end = std::max(others.value_or(0), removed_fork);
  }
}

absl::Status BranchTree::RemoveBase(uint64_t branch) {
  v1::SnapshotManifest base;
  RWKV_ASSIGN_OR_RETURN(const bool found, view_->Get(BaseKey(branch), &base));
  if (!found) return absl::OkStatus();
  edit_->Delete(BaseKey(branch));
  edit_->Delete(SnapshotIdKey(base.snapshot_id()));
  freed_.push_back(base.snapshot_id());
  --snapshots_delta_;
  return absl::OkStatus();
}

absl::Status BranchTree::Trim(uint64_t branch, uint64_t begin, uint64_t end) {
  if (end == begin) {  // Forked at its base, and nowhere else.
    edit_->DeleteRange(LogKey(branch, 0), LogKey(branch + 1, 0));
    return absl::OkStatus();
  }
  // The chunk that the end falls into is cut.
  std::string last_key;
  absl::optional<LogChunk> last;
  RWKV_RETURN_IF_ERROR(view_->ScanBack(LogKey(branch, 0), LogKey(branch, end),
                                       [&](absl::string_view key, absl::string_view value) -> absl::StatusOr<bool> {
                                         last_key = std::string(key);
                                         last = DecodeChunk(value);
                                         return false;
                                       }));
  if (!last.has_value() || SecondNumber(last_key) + last->token_ids.size() < end) {
    return absl::DataLossError(absl::StrCat("catalog: the log of branch ", branch, " ends before ", end));
  }
  const size_t kept = end - SecondNumber(last_key);
  if (kept < last->token_ids.size()) {
    edit_->Put(last_key, EncodeChunk(absl::MakeConstSpan(last->token_ids).first(kept),
                                     absl::MakeConstSpan(last->logprobs).first(std::min(kept, last->logprobs.size()))));
  }
  edit_->DeleteRange(LogKey(branch, end), LogKey(branch + 1, 0));
  return absl::OkStatus();
}

absl::Status BranchTree::AddSnapshot(const Link& link, const v1::SnapshotManifest& manifest) {
  RWKV_ASSIGN_OR_RETURN(std::vector<SnapshotAt> snapshots, view_->Snapshots(link.branch, 0, kNoEnd));
  const auto at = std::find_if(snapshots.begin(), snapshots.end(),
                               [&](const SnapshotAt& snapshot) { return snapshot.position >= manifest.position(); });
  if (at != snapshots.end() && at->position == manifest.position()) {
    RemoveSnapshot(link.branch, *at);
    at->manifest = manifest;
  } else {
    snapshots.insert(at, {manifest.position(), manifest});
  }
  edit_->Put(SnapshotKey(link.branch, manifest.position()), manifest);
  PutSnapshotId(manifest.snapshot_id(), link.branch, manifest.position());
  ++snapshots_delta_;
  return Retain(link.branch, snapshots);
}

void BranchTree::PutSnapshotId(const std::string& snapshot_id, uint64_t branch, uint64_t position) {
  std::string value;
  AppendNumber(value, branch);
  AppendNumber(value, position);
  edit_->Put(SnapshotIdKey(snapshot_id), value);
}

void BranchTree::RemoveSnapshot(uint64_t branch, const SnapshotAt& snapshot) {
  edit_->Delete(SnapshotKey(branch, snapshot.position));
  edit_->Delete(SnapshotIdKey(snapshot.manifest.snapshot_id()));
  freed_.push_back(snapshot.manifest.snapshot_id());
  --snapshots_delta_;
}

absl::Status BranchTree::Retain(uint64_t branch, const std::vector<SnapshotAt>& snapshots) {
  for (size_t i = 0; i + snapshots_per_branch_ < snapshots.size(); ++i) {
    // Forks from here to before the next snapshot have none newer.
    RWKV_ASSIGN_OR_RETURN(const bool needed, HasForkIn(branch, snapshots[i].position, snapshots[i + 1].position));
    if (!needed) RemoveSnapshot(branch, snapshots[i]);
  }
  return absl::OkStatus();
}

}  // namespace rwkv::state_store
