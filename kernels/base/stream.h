// The order in which a device works.
#pragma once

#include <cstdint>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace rwkv::kernels {

// A point in a stream. Made by Device::NewEvent(), used by one stream at a time; any thread may ask or wait.
class Event {
 public:
  virtual ~Event() = default;

  // Whether the stream has passed the point it was last recorded at. True of one that was never recorded.
  virtual bool Done() const = 0;

  // Returns when that is so. The first fault of the device, if any. kDeadlineExceeded: the device hangs.
  virtual absl::Status WaitOnHost() const = 0;
};

// An ordered queue of work on one device, owned by one thread at a time. What is enqueued may still run when the call
// returns, and its memory must live until the stream has passed it; nothing on one stream overlaps. Operations
// (kernels/api) are enqueued by their own functions, which take the stream of the device that the operations are of.
class Stream {
 public:
  virtual ~Stream() = default;

  // `bytes` (>= 0) between memory of this device of any kind; the ranges do not overlap.
  virtual absl::Status Copy(void* to, const void* from, int64_t bytes) = 0;
  virtual absl::Status Zero(void* memory, int64_t bytes) = 0;

  // The event is done once all that was enqueued before has run.
  virtual absl::Status Record(Event& event) = 0;

  // Device memory of at least `bytes` (>= 0), 64-byte aligned, contents undefined, for the operation being enqueued;
  // the next caller gets the same memory. It is kept and only grows. kResourceExhausted: no memory.
  virtual absl::StatusOr<void*> Scratch(int64_t bytes) = 0;

  // Waits until everything enqueued so far has run; the first fault of the device, if any. kDeadlineExceeded: the
  // device hangs.
  virtual absl::Status Synchronize() = 0;

  // Enqueues what `enqueue` enqueues, which is the same operations with the same arguments whenever `key` is the same;
  // nothing else, no Scratch() that grows, and neither events nor waits. A device that Repeats() keeps what it has seen
  // twice and enqueues it at once from then on, without a call. The default is the plain twin: it calls.
  virtual absl::Status Repeat(absl::Span<const int64_t> key, absl::FunctionRef<absl::Status()> enqueue) {
    return enqueue();
  }
  // Whether it is worth while to make many steps alike.
  virtual bool Repeats() const { return false; }

  // Calls work(i, thread) once for each of [0, count), on the host and at once, `thread` in [0, host_threads()); returns
  // when all are done. A device that computes on the host lends the threads that have nothing else to do meanwhile.
  virtual void RunOnHost(int64_t count, absl::FunctionRef<void(int64_t, int)> work) {
    for (int64_t i = 0; i < count; ++i) work(i, 0);
  }
  virtual int host_threads() const { return 1; }

  // What other libraries of the same device call this stream (a cudaStream_t). Null: nothing.
  virtual void* handle() const { return nullptr; }
};

}  // namespace rwkv::kernels
