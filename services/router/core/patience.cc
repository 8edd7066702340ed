#include "services/router/core/patience.h"

namespace rwkv::router {

void Patience::Came(uint64_t position) {
  if (position <= furthest_) return;
  *this = Patience();
  furthest_ = position;
}

Patience::Verdict Patience::Failed() { return ++failures_ >= kAttempts ? Verdict::kGiveUp : Verdict::kTryAgain; }

Patience::Verdict Patience::EntryFailed(absl::StatusCode code) {
  if (code != absl::StatusCode::kAborted) {
    same_refusals_ = code == last_refusal_ ? same_refusals_ + 1 : 1;
    last_refusal_ = code;
    if (same_refusals_ >= kSameRefusals) return Verdict::kRefused;
  }
  return Failed();
}

void Patience::AttachBegan(absl::Time now) {
  if (attaching_since_ == absl::InfiniteFuture()) attaching_since_ = now;
}

bool Patience::LeavesSnapshots(absl::Time now) const {
  return failures_ >= kAttemptsWithSnapshot || (failures_ > 0 && now - attaching_since_ >= kTimeWithSnapshot);
}

Patience::Verdict Patience::AttachFailed() { return Failed(); }

Patience::Verdict Patience::AttachTimedOut() {
  return ++attach_timeouts_ >= kAttachTimeouts ? Verdict::kGiveUp : Verdict::kTryAgain;
}

Patience::Verdict Patience::EpochLost() {
  return ++lost_epochs_ >= kLostEpochs ? Verdict::kGiveUp : Verdict::kTryAgain;
}

}  // namespace rwkv::router
