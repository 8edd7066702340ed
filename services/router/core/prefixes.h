// The prefix cache as turns meet it: one that begins with nothing looks for a state after the longest beginning of its
// input that somebody has read, and leaves states of its own where PrefixEnds() says. Whatever of it fails is a miss.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "rwkv/v1/state_store.pb.h"
#include "services/router/core/core_context.h"
#include "services/router/core/placement.h"
#include "services/router/core/turn.h"
#include "services/router/prefix_cache/recent_inputs.h"

namespace rwkv::router {

// What a turn begins from, as the store has it.
struct Located {
  absl::Status status;
  v1::SnapshotManifest manifest;  // snapshot_id empty: from nothing.
  std::vector<uint32_t> tail;     // The log's tokens from there on, up to the turn's own.
  bool asked_for_prefix = false;
  absl::Status prefix_status;
  bool is_prefix = false;  // The manifest is.
};

// Part of the core: one thread at a time, but for what says otherwise; no clock of its own.
class Prefixes {
 public:
  // All borrowed.
  Prefixes(const CoreContext& context, const Placement& placement) : context_(context), placement_(placement) {}

  // Says where the states of a turn's input will be kept, once.
  void Plan(Turn& turn);

  // What a turn is to ask for. Unset: nothing.
  absl::optional<v1::FindPrefixRequest> Lookup(const Turn& turn) const;
  // On any thread; waits. Takes what is found if it is further than what `located` has.
  void Find(const v1::FindPrefixRequest& find, Located* located) const;
  void OnFound(Turn& turn, const Located& located);

  // The input is fed so far and no further, until the state there is saved.
  static uint64_t FeedEnd(Turn& turn);

  // Keeping did not work out lately, so that it is not tried now.
  bool SavesPause() const { return Pauses(save_failed_); }
  // What keeps the state of the first `position` tokens, without its manifest.
  std::shared_ptr<const v1::PutPrefixRequest> Put(const Turn& turn, uint64_t position) const;
  // For any thread; waits.
  std::function<absl::Status()> CommitJob(const PendingSave& save, const v1::SnapshotManifest& manifest) const;
  // What is there of one that did not come to be kept is deleted.
  void OnSaveEnded(const std::string& snapshot_id, const absl::Status& status);

  // A slot could not be attached from what was found. False: it was from something else.
  bool OnAttachFailed(Turn& turn, const absl::Status& status, bool unusable);

 private:
  bool Uses(const Turn& turn) const;
  bool Pauses(absl::Time failed) const;
  v1::PrefixScope ScopeOf(const Turn& turn) const;

  const CoreContext& context_;
  const Placement& placement_;
  RecentInputs recent_inputs_;
  absl::Time lookup_failed_ = absl::InfinitePast();
  absl::Time save_failed_ = absl::InfinitePast();
};

}  // namespace rwkv::router
