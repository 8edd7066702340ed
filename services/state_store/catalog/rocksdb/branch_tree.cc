#include "services/state_store/catalog/rocksdb/branch_tree.h"

#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "kernels/base/status_macros.h"
#include "services/state_store/rocksdb/numbers.h"

namespace rwkv::state_store {

absl::StatusOr<BranchTree::Node*> BranchTree::Load(uint64_t branch) {
  const auto [it, is_new] = nodes_.try_emplace(branch);
  Node& node = it->second;
  if (!is_new) return &node;
  RWKV_ASSIGN_OR_RETURN(node.row, view_->Branch(branch));
  RWKV_RETURN_IF_ERROR(view_->Scan(EdgeKey(branch, 0), EdgeKey(branch + 1, 0),
                                   [&](absl::string_view key, absl::string_view value) -> absl::StatusOr<bool> {
                                     if (value.size() != 8)
                                       return absl::DataLossError("catalog: a fork's row is corrupt");
                                     node.children[SecondNumber(key)] = NumberAt(value, 0);
                                     return true;
                                   }));
  return &node;
}

absl::Status BranchTree::Fork(const std::vector<Link>& chain, uint64_t position, uint64_t new_branch) {
  Node node;
  node.row.set_is_head(true);
  // Of a part [begin, end), the token before `position` is in it if begin < position. Position 0 shares nothing.
  const auto link = std::find_if(chain.begin(), chain.end(), [&](const Link& link) { return link.begin < position; });
  if (link != chain.end()) {
    node.row.set_parent(link->branch);
    node.row.set_fork_position(position);
    RWKV_ASSIGN_OR_RETURN(Node* const parent, Load(link->branch));
    parent->children[new_branch] = position;
    std::string value;
    AppendNumber(value, position);
    edit_->Put(EdgeKey(link->branch, new_branch), value);
  }
  edit_->Put(BranchKey(new_branch), node.row);
  nodes_[new_branch] = std::move(node);
  return absl::OkStatus();
}

absl::Status BranchTree::Release(uint64_t branch) {
  {
    RWKV_ASSIGN_OR_RETURN(Node* const node, Load(branch));
    node->row.set_is_head(false);
    edit_->Put(BranchKey(branch), node->row);
  }
  while (branch != 0) {
    RWKV_ASSIGN_OR_RETURN(Node* const node, Load(branch));
    if (node->row.is_head() || !node->children.empty()) {
      uint64_t end = UINT64_MAX - 1;  // A head keeps its tokens; only a fork that needed an old snapshot may be gone.
      if (!node->row.is_head()) {
        end = 0;
        for (const auto& [child, fork_position] : node->children) end = std::max(end, fork_position);
        // The chunk that the end falls into is cut.
        RWKV_ASSIGN_OR_RETURN(const auto last, view_->Last(LogKey(branch, 0), LogKey(branch, end - 1)));
        absl::optional<LogChunk> chunk;
        if (last.has_value()) chunk = DecodeChunk(last->second);
        if (!chunk.has_value() || SecondNumber(last->first) + chunk->token_ids.size() < end) {
          return absl::DataLossError(absl::StrCat("catalog: the log of branch ", branch, " ends before ", end));
        }
        const size_t kept = end - SecondNumber(last->first);
        if (kept < chunk->token_ids.size()) {
          edit_->Put(last->first,
                     EncodeChunk(absl::MakeConstSpan(chunk->token_ids).first(kept),
                                 absl::MakeConstSpan(chunk->logprobs).first(std::min(kept, chunk->logprobs.size()))));
        }
        edit_->DeleteRange(LogKey(branch, end), LogKey(branch + 1, 0));
      }
      RWKV_ASSIGN_OR_RETURN(std::vector<SnapshotAt> snapshots, view_->Snapshots(branch, 0, UINT64_MAX - 1));
      while (!snapshots.empty() && snapshots.back().position > end) {
        RemoveSnapshot(branch, snapshots.back());
        snapshots.pop_back();
      }
      Retain(branch, *node, snapshots);
      return absl::OkStatus();
    }
    RWKV_ASSIGN_OR_RETURN(const std::vector<SnapshotAt> snapshots, view_->Snapshots(branch, 0, UINT64_MAX - 1));
    for (const SnapshotAt& snapshot : snapshots) RemoveSnapshot(branch, snapshot);
    edit_->DeleteRange(LogKey(branch, 0), LogKey(branch + 1, 0));
    edit_->Delete(BranchKey(branch));
    const uint64_t parent = node->row.parent();
    nodes_.erase(branch);
    if (parent != 0) {
      edit_->Delete(EdgeKey(parent, branch));
      RWKV_ASSIGN_OR_RETURN(Node* const parent_node, Load(parent));
      parent_node->children.erase(branch);
    }
    branch = parent;
  }
  return absl::OkStatus();
}

absl::Status BranchTree::AddSnapshot(const Link& link, const v1::SnapshotManifest& manifest) {
  RWKV_ASSIGN_OR_RETURN(std::vector<SnapshotAt> snapshots, view_->Snapshots(link.branch, 0, UINT64_MAX - 1));
  const auto at = std::find_if(snapshots.begin(), snapshots.end(),
                               [&](const SnapshotAt& snapshot) { return snapshot.position >= manifest.position(); });
  if (at != snapshots.end() && at->position == manifest.position()) {
    RemoveSnapshot(link.branch, *at);
    at->manifest = manifest;
  } else {
    snapshots.insert(at, {manifest.position(), manifest});
  }
  edit_->Put(SnapshotKey(link.branch, manifest.position()), manifest);
  std::string value;
  AppendNumber(value, link.branch);
  AppendNumber(value, manifest.position());
  edit_->Put(SnapshotIdKey(manifest.snapshot_id()), value);
  ++snapshots_delta_;
  RWKV_ASSIGN_OR_RETURN(Node* const node, Load(link.branch));
  Retain(link.branch, *node, snapshots);
  return absl::OkStatus();
}

void BranchTree::RemoveSnapshot(uint64_t branch, const SnapshotAt& snapshot) {
  edit_->Delete(SnapshotKey(branch, snapshot.position));
  edit_->Delete(SnapshotIdKey(snapshot.manifest.snapshot_id()));
  freed_.push_back(snapshot.manifest.snapshot_id());
  --snapshots_delta_;
}

void BranchTree::Retain(uint64_t branch, const Node& node, const std::vector<SnapshotAt>& snapshots) {
  if (snapshots.size() <= static_cast<size_t>(snapshots_per_branch_)) return;
  std::set<uint64_t> for_forks;
  for (const auto& [child, fork_position] : node.children) {
    const auto after =
        std::upper_bound(snapshots.begin(), snapshots.end(), fork_position,
                         [](uint64_t position, const SnapshotAt& snapshot) { return position < snapshot.position; });
    if (after != snapshots.begin()) for_forks.insert(std::prev(after)->position);
  }
  for (size_t i = 0; i + snapshots_per_branch_ < snapshots.size(); ++i) {
    if (for_forks.count(snapshots[i].position) == 0) RemoveSnapshot(branch, snapshots[i]);
  }
}

}  // namespace rwkv::state_store
