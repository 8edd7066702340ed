// The clock of a load: steady, and turned by hand in tests.
#pragma once

#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace rwkv::rwkvctl {

// Thread-safe.
class LoadClock {
 public:
  virtual ~LoadClock() = default;

  // Since some moment that does not change. Never goes back.
  virtual absl::Duration Now() = 0;

  // Until `condition` holds, or it is `time` (which may be infinite). Returns whether the condition holds. The caller
  // holds `mutex`, which is free while this waits.
  virtual bool AwaitUntil(absl::Mutex& mutex, const absl::Condition& condition, absl::Duration time) = 0;
};

class SteadyLoadClock : public LoadClock {
 public:
  absl::Duration Now() override;
  bool AwaitUntil(absl::Mutex& mutex, const absl::Condition& condition, absl::Duration time) override;
};

}  // namespace rwkv::rwkvctl
