// Changes to the tree of branches: adding one, letting go of one, and freeing what nobody can reach any more.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/optional.h"
#include "services/state_store/catalog/view.h"

namespace rwkv::state_store {

// One change. Everything it reads and writes belongs to one family, whose lock the caller holds. Its writes go to
// `edit`, its own later reads see them. After an error the edit is to be thrown away. What it costs depends on what it
// frees, and not on how many forks or tokens a branch has.
class BranchTree {
 public:
  // `view` (latest) and `edit` outlive it.
  BranchTree(int snapshots_per_branch, const View* view, Edit* edit)
      : snapshots_per_branch_(snapshots_per_branch), view_(view), edit_(edit) {}

  // A head without parent, whose log begins at `log_begin`. `base`: what it stands on; null: nothing, log_begin is 0.
  void AddRoot(uint64_t branch, uint64_t log_begin, const v1::SnapshotManifest* base);

  // A head that shares the first `position` tokens of `chain` (a session's, newest part first) under a new id. Its
  // parent is the branch that holds the last of those tokens, so that no branch lies between that adds nothing.
  // `has_base`: even with no token in between, it shares what the root stands on.
  void Fork(const std::vector<Link>& chain, bool has_base, uint64_t position, uint64_t new_branch);

  // The session on this head, whose log has `length` tokens, goes. Frees all of its branch that no fork below uses, and
  // upwards from there.
  absl::Status Release(uint64_t branch, uint64_t length);

  // Replaces the snapshot at that branch and position, if any, then applies retention.
  absl::Status AddSnapshot(const Link& link, const v1::SnapshotManifest& manifest);
  void RemoveSnapshot(uint64_t branch, const SnapshotAt& snapshot);

  // The highest position at which another branch forks off, if one does.
  absl::StatusOr<absl::optional<uint64_t>> LastFork(uint64_t branch) const;

  // Snapshots removed, and how many were added less removed.
  const std::vector<std::string>& freed() const { return freed_; }
  int snapshots_delta() const { return snapshots_delta_; }
  int64_t freed_tokens() const { return freed_tokens_; }

 private:
  // Ends the branch, which is no head and begins at `begin`, at `end` >= begin.
  absl::Status Trim(uint64_t branch, uint64_t begin, uint64_t end);
  // Of a branch that goes; it may have none.
  absl::Status RemoveBase(uint64_t branch);
  void PutSnapshotId(const std::string& snapshot_id, uint64_t branch, uint64_t position);
  // Whether one does in [begin, end).
  absl::StatusOr<bool> HasForkIn(uint64_t branch, uint64_t begin, uint64_t end) const;
  // Keeps the newest `snapshots_per_branch_` of `snapshots` (ascending, all of the branch) and the newest at or before
  // each fork.
  absl::Status Retain(uint64_t branch, const std::vector<SnapshotAt>& snapshots);

  const int snapshots_per_branch_;
  const View* const view_;
  Edit* const edit_;
  // Edges that the edit adds and removes, by key.
  std::set<std::string> added_edges_;
  std::set<std::string> removed_edges_;
  std::vector<std::string> freed_;
  int snapshots_delta_ = 0;
  int64_t freed_tokens_ = 0;
};

}  // namespace rwkv::state_store
