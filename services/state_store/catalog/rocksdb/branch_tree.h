// Changes to the tree of branches: adding one, letting go of one, and freeing what nobody can reach any more.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "services/state_store/catalog/rocksdb/view.h"

namespace rwkv::state_store {

// One change. Everything it reads and writes belongs to one family, whose lock the caller holds. Its writes go to
// `edit`, its own later reads see them. After an error the edit is to be thrown away.
class BranchTree {
 public:
  // `view` (latest) and `edit` outlive it.
  BranchTree(int snapshots_per_branch, const View* view, Edit* edit)
      : snapshots_per_branch_(snapshots_per_branch), view_(view), edit_(edit) {}

  // A head that shares the first `position` tokens of `chain` (a session's, newest part first) under a new id. Its
  // parent is the branch that holds the last of those tokens, so that no branch lies between that adds nothing.
  absl::Status Fork(const std::vector<Link>& chain, uint64_t position, uint64_t new_branch);

  // The session on this head goes. Frees all of its branch that no fork below uses, and upwards from there.
  absl::Status Release(uint64_t branch);

  // Replaces the snapshot at that branch and position, if any, then applies retention.
  absl::Status AddSnapshot(const Link& link, const v1::SnapshotManifest& manifest);
  void RemoveSnapshot(uint64_t branch, const SnapshotAt& snapshot);

  // Snapshots removed, and how many were added less removed.
  const std::vector<std::string>& freed() const { return freed_; }
  int snapshots_delta() const { return snapshots_delta_; }

 private:
  struct Node {
    BranchRow row;
    std::map<uint64_t, uint64_t> children;  // Branch to its fork position.
  };

  absl::StatusOr<Node*> Load(uint64_t branch);
  // Keeps the newest `snapshots_per_branch_` of `snapshots` (ascending) and the newest at or before each fork.
  void Retain(uint64_t branch, const Node& node, const std::vector<SnapshotAt>& snapshots);

  const int snapshots_per_branch_;
  const View* const view_;
  Edit* const edit_;
  std::map<uint64_t, Node> nodes_;
  std::vector<std::string> freed_;
  int snapshots_delta_ = 0;
};

}  // namespace rwkv::state_store
