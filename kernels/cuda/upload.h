// Brings a file's matrices into device memory.
#pragma once

#include <cstdint>
#include <functional>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "kernels/base/buffer.h"
#include "kernels/base/device.h"
#include "kernels/base/matrix.h"
#include "kernels/base/stream.h"
#include "kernels/base/weight.h"

namespace rwkv::kernels::cuda {

// Of one device, which outlives it. Thread-safe; one matrix at a time, through pinned memory that it keeps.
class Uploader {
 public:
  explicit Uploader(Device& device) : device_(device) {}

  // As Device::Load(); done when it returns. Rows are laid out as device_weight.h says. ggml's blocks become int8
  // codes of groups where products with them are computed in fixed point, else floats.
  absl::StatusOr<Weight> Load(const MatrixView& matrix) ABSL_LOCKS_EXCLUDED(mu_);

 private:
  // `rows` rows of `pitch` bytes to device memory; fill(row, to) writes one, whose bytes are zeros.
  absl::Status CopyRows(int64_t rows, int64_t pitch, char* to, const std::function<void(int64_t, char*)>& fill)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  Device& device_;
  absl::Mutex mu_;
  std::unique_ptr<Stream> stream_ ABSL_GUARDED_BY(mu_);
  Buffer staging_ ABSL_GUARDED_BY(mu_);
};

}  // namespace rwkv::kernels::cuda
