// What the turn manager is told at its start, and what it says of itself.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "rwkv/v1/state_store.pb.h"
#include "rwkv/v1/worker.pb.h"
#include "services/router/core/turn_input.h"
#include "services/router/pipeline/lane_load.h"
#include "services/router/pipeline/stage_plan.h"
#include "services/router/prefix_cache/prefix_ends.h"

namespace rwkv::router {

// Names a call from TurnManager::NewCall() on.
using CallId = uint64_t;

// Tokens at which a worker waits for its router; with more of them a turn is asked for each token.
inline constexpr size_t kMaxPauseTokens = 8192;

// Done while this router holds the lease; the session is as it was when the lease was taken for it.
using ExclusiveJob = std::function<absl::Status(const v1::AcquireLeaseResponse& held)>;

struct TurnOptions {
  std::string router;                              // --name: the leases' holder.
  std::string incarnation;                         // Unique per start of this router.
  int max_running = 64;                            // Calls that hold or are about to take a slot.
  int max_waiting = 256;                           // Calls that wait to be started, or to go on.
  absl::Duration max_wait = absl::Seconds(60);     // A call that waits to be started for longer is refused.
  absl::Duration slot_quantum = absl::Seconds(5);  // Who has had a slot for so long gives it to one that waits. > 0.
  // Of a turn that is over the slot waits so long for the tenant's next one while others would take it.
  absl::Duration slot_kept = absl::Milliseconds(50);
  InputLimits limits;
  std::vector<std::string> unusable_tokenizers;  // Why each is; said to who sends text when no other fits.
  bool allow_logits = false;
  int64_t snapshot_interval_tokens = 1024;  // A running turn is saved about this often. > 0.
  int64_t max_uncommitted_tokens = 256;     // A turn decodes at most this far ahead of its commits.
  size_t max_stream_messages = 64;          // Waiting in a client's stream; beyond it the turn pauses.
  absl::Duration lease_ttl = absl::Seconds(15);
  absl::Duration store_timeout = absl::Seconds(15);        // Of any store call of a turn, retries included.
  absl::Duration progress_timeout = absl::Seconds(30);     // Steps in flight and none comes back: the epoch ends.
  absl::Duration attach_timeout = absl::Seconds(60);       // The same for a slot's attach.
  absl::Duration save_timeout = absl::Seconds(60);         // A snapshot that is not there by then is given up.
  absl::Duration outage_timeout = absl::Seconds(60);       // A started turn waits this long for a pipeline,
  absl::Duration handover_after = absl::Seconds(1);        // but only so long if another router has one for it.
  absl::Duration slow_client_timeout = absl::Seconds(30);  // A client that takes nothing for this long is dropped.
  absl::Duration retry_delay = absl::Milliseconds(200);    // Between two attempts to attach; also told to clients.
  PrefixCacheOptions prefix_cache;
  int executor_threads = 8;  // For the store's answers to turns, and as many for what becomes of snapshots.
  absl::Duration tick = absl::Milliseconds(20);
  // Called when the first pipeline has come up, and when the last one is lost. May be empty.
  std::function<void(bool serving)> on_serving;
  // A tenant's share beside others where slots or rows are short, > 0. Never waits. Empty: all are alike.
  std::function<double(const std::string& tenant)> tenant_weight;
};

struct TurnCounts {
  int running = 0;
  int waiting = 0;
  double tokens_per_second = 0;  // Drawn, lately.
};

struct ExportedState {
  v1::SnapshotManifest manifest;  // At the end of the session's log.
  std::vector<v1::StateTensor> layout;
};

// One pipeline that this router drives.
struct LaneState {
  uint64_t epoch = 0;
  StagePlan plan;
  bool closing = false;
  LaneLoad load;
};

}  // namespace rwkv::router
