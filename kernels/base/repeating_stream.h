// A stream that can make ready what it will be asked to repeat.
#pragma once

#include <cstdint>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/base/stream.h"

namespace rwkv::kernels {

class RepeatingStream : public Stream {
 public:
  // What the stream keeps for Repeat().
  struct Repeated {
    int64_t ready = 0;         // Keys that are enqueued at once.
    int64_t device_bytes = 0;  // What they took of the device's memory, as far as the device tells.
    int64_t failures = 0;      // Times that a key could not be made ready: Repeat() calls, as the plain twin does.
    absl::Status last_failure;
  };

  // Makes ready what Repeat() enqueues under the key, and enqueues nothing. Of no use twice; repeated() tells whether it
  // failed.
  virtual void Prepare(absl::Span<const int64_t> key, absl::FunctionRef<absl::Status()> enqueue) = 0;
  virtual const Repeated& repeated() const = 0;
};

}  // namespace rwkv::kernels
