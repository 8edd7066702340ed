// What devices share whose memory is the host's and whose streams run everything at once.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/base/buffer.h"
#include "kernels/base/device.h"
#include "kernels/base/matrix.h"
#include "kernels/base/stream.h"
#include "kernels/base/weight.h"

namespace rwkv::kernels {

// As Device::Allocate: zeros.
absl::StatusOr<Buffer> AllocateOnHost(int64_t bytes);

// Runs every operation before the call that enqueues it returns.
class HostStream : public Stream {
 public:
  absl::Status Copy(void* to, const void* from, int64_t bytes) override;
  absl::Status Zero(void* memory, int64_t bytes) override;
  absl::Status Record(Event& event) override { return absl::OkStatus(); }
  absl::StatusOr<void*> Scratch(int64_t bytes) override;
  absl::Status Synchronize() override { return absl::OkStatus(); }

 private:
  Buffer scratch_;
};

// A subclass names itself and brings its operations.
class HostDevice : public Device {
 public:
  absl::StatusOr<Buffer> Allocate(int64_t bytes, MemoryKind kind) override { return AllocateOnHost(bytes); }
  absl::StatusOr<std::unique_ptr<Stream>> NewStream() override;
  absl::StatusOr<std::unique_ptr<Event>> NewEvent() override;
  // The matrix as it is.
  absl::StatusOr<Weight> Load(const MatrixView& matrix, WeightUse use) override;
};

}  // namespace rwkv::kernels
