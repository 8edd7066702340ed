// Where a stage computes: memory, streams, and the operations that run on them. kernels/dispatch opens one by name.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "kernels/base/buffer.h"
#include "kernels/base/matrix.h"
#include "kernels/base/status_macros.h"
#include "kernels/base/stream.h"
#include "kernels/base/weight.h"

namespace rwkv::kernels {

struct OpTable;  // kernels/api/op_table.h

// Outlives its streams, buffers and weights. Thread-safe.
class Device {
 public:
  virtual ~Device() = default;

  virtual absl::string_view name() const = 0;  // "cpu/avx512", "reference"

  // Everything on which bits depend: devices of one family give the same, so sequences may move between them.
  virtual absl::string_view numeric_family() const = 0;

  // Which piece of hardware it is, the same for whoever opens it and no other; empty: it does not matter.
  virtual std::string identity() const { return ""; }

  // Makes it the calling thread's, for other libraries of the same device.
  virtual absl::Status MakeCurrent() { return absl::OkStatus(); }

  // Threads of this process that compute an operation of one stream, the caller's among them.
  virtual int threads() const { return 1; }

  // Rows of a step, at most, with which it is worth while to warm up: more need nothing that fewer do not need.
  virtual int64_t warm_up_rows() const { return 8; }

  // `bytes` >= 0, contents undefined; none gives an empty buffer. On a CPU pages cost memory only once they are
  // written. kInvalidArgument: fewer. kResourceExhausted: no memory; names the bytes.
  virtual absl::StatusOr<Buffer> Allocate(int64_t bytes, MemoryKind kind) = 0;

  virtual absl::StatusOr<std::unique_ptr<Stream>> NewStream() = 0;
  virtual absl::StatusOr<std::unique_ptr<Event>> NewEvent() = 0;

  // `matrix` is host memory that outlives the weight. kInvalidArgument: CheckMatrix() says so.
  // kResourceExhausted: no memory for what the device makes of it.
  virtual absl::StatusOr<Weight> Load(const MatrixView& matrix, WeightUse use) = 0;

  virtual const OpTable& ops() const = 0;
};

// A fixed number of elements of a plain type T in a device's memory; movable. An empty one has data() == nullptr.
template <typename T>
class DeviceArray {
 public:
  static_assert(std::is_trivially_copyable_v<T> && alignof(T) <= kBufferAlignment, "plain elements only");

  DeviceArray() = default;
  DeviceArray(DeviceArray&& other) noexcept : buffer_(std::move(other.buffer_)), size_(std::exchange(other.size_, 0)) {}
  DeviceArray& operator=(DeviceArray&& other) noexcept {
    buffer_ = std::move(other.buffer_);
    size_ = std::exchange(other.size_, 0);
    return *this;
  }

  // Errors are those of Allocate().
  static absl::StatusOr<DeviceArray> Create(Device& device, int64_t size, MemoryKind kind = MemoryKind::kDevice) {
    if (size > std::numeric_limits<int64_t>::max() / static_cast<int64_t>(sizeof(T))) {
      return absl::ResourceExhaustedError(absl::StrCat("no memory for ", size, " elements of ", sizeof(T), " bytes"));
    }
    DeviceArray array;
    RWKV_ASSIGN_OR_RETURN(array.buffer_, device.Allocate(size * static_cast<int64_t>(sizeof(T)), kind));
    array.size_ = size;
    return array;
  }

  T* data() const { return buffer_.template as<T>(); }
  int64_t size() const { return size_; }  // elements
  int64_t size_in_bytes() const { return size_ * static_cast<int64_t>(sizeof(T)); }
  bool empty() const { return size_ == 0; }

 private:
  Buffer buffer_;
  int64_t size_ = 0;
};

}  // namespace rwkv::kernels
