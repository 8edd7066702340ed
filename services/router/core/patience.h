// How often a turn is tried again before it is given up. Pure: told what happened, says what follows.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace rwkv::router {

// Progress is a result further than any before it. To feed again what a lost slot had seen is none: it sets no count
// back, so that what fails at the same place each time comes to an end. Not thread-safe.
class Patience {
 public:
  enum class Verdict {
    kTryAgain,
    kGiveUp,   // The pipeline's doing: the call fails, and may go on later.
    kRefused,  // The turn's doing: it would fail again.
  };

  // Attaches that may fail without progress before the snapshot is left alone, and in all (refused entries count too).
  static constexpr int kAttemptsWithSnapshot = 10;
  // The same in time, from when the first of them was asked for: an attach from records that hang takes long to fail.
  static constexpr absl::Duration kTimeWithSnapshot = absl::Seconds(8);
  static constexpr int kAttempts = 14;
  // An entry that is refused so often with the same code, without progress, is refused for what it is. kAborted is not
  // among these: it says that slot and router differ about the position.
  static constexpr int kSameRefusals = 2;
  static constexpr int kAttachTimeouts = 3;
  static constexpr int kLostEpochs = 20;

  // A result came back; `position` tokens have been seen.
  void Came(uint64_t position);
  // Nothing further came back since.
  uint64_t furthest() const { return furthest_; }

  // A slot was asked for, and is there.
  void AttachBegan(absl::Time now);
  void Attached() { attaching_since_ = absl::InfiniteFuture(); }

  Verdict EntryFailed(absl::StatusCode code);
  Verdict AttachFailed();
  Verdict AttachTimedOut();
  // The epoch ended while the turn was being computed.
  Verdict EpochLost();

  int failures() const { return failures_; }
  bool LeavesSnapshots(absl::Time now) const;

 private:
  Verdict Failed();

  uint64_t furthest_ = 0;
  absl::Time attaching_since_ = absl::InfiniteFuture();
  int failures_ = 0;  // Since the last progress, as the next ones.
  int same_refusals_ = 0;
  absl::StatusCode last_refusal_ = absl::StatusCode::kOk;
  int attach_timeouts_ = 0;
  int lost_epochs_ = 0;
};

}  // namespace rwkv::router
