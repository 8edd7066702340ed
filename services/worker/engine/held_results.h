// Results of steps that sequences decode by themselves, on their way to the router: of steps that follow each other
// fast several go as one message, since to wake a process up for each costs it more than what it does with one. Pure.
#pragma once

#include <vector>

#include "absl/time/time.h"
#include "rwkv/v1/worker.pb.h"

namespace rwkv::worker {

// Not thread-safe.
class HeldResults {
 public:
  // So long a result is held at most, and never if the one before came longer ago: whose steps take longer notices
  // nothing of it.
  static constexpr absl::Duration kHold = absl::Microseconds(500);

  using Results = std::vector<v1::StepResult>;  // To be sent now, in this order.

  // `more`: a step of the worker's own (id 0), whose sequences all go on.
  Results Add(v1::StepResult result, bool more, absl::Time now);
  // What is held.
  Results Take();
  // When it is to be sent, whatever comes. InfiniteFuture: nothing is held.
  absl::Time due() const { return due_; }

 private:
  v1::StepResult held_;  // Entries of one step after those of another.
  absl::Time due_ = absl::InfiniteFuture();
  absl::Time last_ = absl::InfinitePast();  // When a result came.
};

}  // namespace rwkv::worker
