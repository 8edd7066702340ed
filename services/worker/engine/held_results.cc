#include "services/worker/engine/held_results.h"

#include <utility>

namespace rwkv::worker {

HeldResults::Results HeldResults::Add(v1::StepResult result, bool more, absl::Time now) {
  const bool is_fast = now - std::exchange(last_, now) < kHold;
  const absl::Time due = due_ == absl::InfiniteFuture() ? now + kHold : due_;
  Results results = Take();
  if (!results.empty() && result.step_id() == 0) {
    for (v1::EntryResult& entry : *result.mutable_entries()) results.back().add_entries()->Swap(&entry);
  } else {
    results.push_back(std::move(result));
  }
  if (!more || !is_fast || now >= due) return results;
  held_ = std::move(results.back());
  due_ = due;
  results.pop_back();
  return results;
}

HeldResults::Results HeldResults::Take() {
  if (due_ == absl::InfiniteFuture()) return {};
  due_ = absl::InfiniteFuture();
  Results results(1);
  results[0].Swap(&held_);
  held_.Clear();
  return results;
}

}  // namespace rwkv::worker
