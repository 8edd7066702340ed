// Where time comes from, so that tests can turn it by hand (tests/testing/fake_clock.h).
#pragma once

#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace rwkv::common {

// Thread-safe.
class Clock {
 public:
  virtual ~Clock() = default;
  virtual absl::Time Now() = 0;
};

// The machine's wall clock. It may jump; use it for deadlines and time stamps, not to measure what must not be
// negative.
class SystemClock : public Clock {
 public:
  absl::Time Now() override { return absl::Now(); }
};

}  // namespace rwkv::common
