#include "tests/testing/wait_until.h"

#include "absl/time/clock.h"

namespace rwkv::testing {

bool WaitUntil(const std::function<bool()>& condition, absl::Duration limit) {
  constexpr absl::Duration kBetween = absl::Milliseconds(2);
  for (const absl::Time end = absl::Now() + limit; !condition(); absl::SleepFor(kBetween)) {
    if (absl::Now() > end) return false;
  }
  return true;
}

}  // namespace rwkv::testing
