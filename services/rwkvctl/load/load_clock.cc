#include "services/rwkvctl/load/load_clock.h"

#include <chrono>

namespace rwkv::rwkvctl {

absl::Duration SteadyLoadClock::Now() { return absl::FromChrono(std::chrono::steady_clock::now().time_since_epoch()); }

bool SteadyLoadClock::AwaitUntil(absl::Mutex& mutex, const absl::Condition& condition, absl::Duration time) {
  mutex.AssertHeld();
  return mutex.AwaitWithTimeout(condition, time - Now());
}

}  // namespace rwkv::rwkvctl
