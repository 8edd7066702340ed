// What a test puts into a device's memory and gets out of it: by pinned memory and copies alone.
#pragma once

#include <cmath>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "absl/types/span.h"
#include "kernels/base/buffer.h"
#include "kernels/base/device.h"
#include "kernels/base/matrix.h"
#include "kernels/base/stream.h"
#include "kernels/base/weight.h"

namespace rwkv::kernels::conformance {

// Everything lives as long as this does. Fails the test where the device fails.
class DeviceMemory {
 public:
  explicit DeviceMemory(Device& device);

  Device& device() { return device_; }
  Stream& stream() { return *stream_; }

  template <typename T>
  T* Put(absl::Span<const T> values) {
    return static_cast<T*>(PutBytes(values.data(), static_cast<int64_t>(values.size() * sizeof(T))));
  }
  float* Put(const std::vector<float>& values) { return Put(absl::MakeConstSpan(values)); }
  float* Zeros(int64_t count) { return Put(std::vector<float>(static_cast<size_t>(count))); }
  // For outputs: NaN, which whoever forgets to write leaves.
  float* Unwritten(int64_t count) { return Put(std::vector<float>(static_cast<size_t>(count), std::nanf(""))); }

  std::vector<float> Get(const float* from, int64_t count);

  const Weight* Load(const MatrixView& matrix, WeightUse use = WeightUse::kProduct);

 private:
  void* PutBytes(const void* data, int64_t bytes);
  Buffer Allocate(int64_t bytes, MemoryKind kind);

  Device& device_;
  const std::unique_ptr<Stream> stream_;
  std::vector<Buffer> buffers_;
  std::deque<Weight> weights_;
};

}  // namespace rwkv::kernels::conformance
