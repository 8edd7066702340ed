// Waiting for what tells nobody that it has come: another process, or a state without an event of its own.
#pragma once

#include <functional>

#include "absl/time/time.h"

namespace rwkv::testing {

// Asks every few milliseconds until `condition` holds; false: it did not within `limit`. What has an event of its own
// is waited for by that.
[[nodiscard]] bool WaitUntil(const std::function<bool()>& condition, absl::Duration limit = absl::Seconds(60));

}  // namespace rwkv::testing
