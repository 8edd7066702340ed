// Where operations run, and in which order.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/base/aligned_buffer.h"

namespace rwkv::kernels {

enum class Device { kCpu };

// An ordered queue of operations on one device, owned by one thread at a time. An operation is enqueued and may still
// run when the call returns: its buffers must live until Synchronize(). Operations of one stream never overlap each
// other.
class Stream {
 public:
  virtual ~Stream() = default;

  virtual Device device() const = 0;

  // Scratch memory of at least `bytes` (>= 0), 64-byte aligned, contents undefined, for the operation being enqueued;
  // the next caller gets the same memory. It is kept and only grows. kResourceExhausted: no memory.
  virtual absl::StatusOr<void*> Workspace(int64_t bytes) = 0;

  // Waits until everything enqueued so far has run; the first fault of the device, if any.
  virtual absl::Status Synchronize() = 0;
};

// Runs every operation before the call that enqueues it returns.
class CpuStream final : public Stream {
 public:
  CpuStream() = default;
  CpuStream(const CpuStream&) = delete;
  CpuStream& operator=(const CpuStream&) = delete;

  Device device() const override { return Device::kCpu; }
  absl::StatusOr<void*> Workspace(int64_t bytes) override;
  absl::Status Synchronize() override { return absl::OkStatus(); }

 private:
  AlignedBuffer<char> workspace_;
};

}  // namespace rwkv::kernels
