#include "services/router/core/turn_marks.h"

namespace rwkv::router {

absl::optional<uint64_t> TurnMarks::Take(uint64_t after) {
  const auto next = marked_.upper_bound(after);
  if (next == marked_.end()) return absl::nullopt;
  const uint64_t turn = *next;
  marked_.erase(next);
  return turn;
}

void TurnMarks::WakeAt(uint64_t turn, absl::Time when) {
  if (const auto old = wake_of_.find(turn); old != wake_of_.end()) {
    if (old->second == when) return;
    wakes_.erase({old->second, turn});
    wake_of_.erase(old);
  }
  if (when == absl::InfiniteFuture()) return;
  wake_of_[turn] = when;
  wakes_.emplace(when, turn);
}

void TurnMarks::Poll(uint64_t turn, bool polled) {
  if (polled) {
    polled_.insert(turn);
  } else {
    polled_.erase(turn);
  }
}

void TurnMarks::MarkDue(absl::Time now, absl::Duration tick) {
  while (!wakes_.empty() && wakes_.begin()->first <= now) {
    const uint64_t turn = wakes_.begin()->second;
    Mark(turn);
    WakeAt(turn, absl::InfiniteFuture());
  }
  if (now >= ticked_at_ && now < ticked_at_ + tick) return;
  ticked_at_ = now;
  for (const uint64_t turn : polled_) Mark(turn);
}

void TurnMarks::Forget(uint64_t turn) {
  marked_.erase(turn);
  polled_.erase(turn);
  WakeAt(turn, absl::InfiniteFuture());
}

}  // namespace rwkv::router
