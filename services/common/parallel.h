// Several jobs at a time.
#pragma once

#include <cstddef>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"

namespace rwkv::common {

// Calls job(0) .. job(count - 1), started in this order, at most `at_once` (>= 1) at a time, each on a thread of a few
// (of fewer where the operating system gives no more).
// `on_done`, one call at a time, hears how many have ended well. After an error no job starts any more, and the error
// of the first job, by number, that has one is returned: the same one whatever `at_once` is.
absl::Status RunInParallel(size_t count, size_t at_once, absl::FunctionRef<absl::Status(size_t)> job,
                           absl::FunctionRef<void(size_t)> on_done);

}  // namespace rwkv::common
