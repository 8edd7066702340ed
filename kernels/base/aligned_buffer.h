// Owned memory for activations, states and copied weights: zeroed, aligned to a cache line and an AVX-512 vector. Pages
// of a large one are no memory before they are written.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/buffer.h"

namespace rwkv::kernels {

namespace internal {
// Zeroed; null when there is no memory. `bytes` > 0.
void* AllocateAligned(int64_t bytes);
struct FreeAligned {
  void operator()(void* memory) const;
};
}  // namespace internal

// A fixed number of elements of a plain type T; movable, not copyable. An empty one (also one moved from) has data() ==
// nullptr.
template <typename T>
class AlignedBuffer {
 public:
  static_assert(std::is_trivially_copyable_v<T> && alignof(T) <= kBufferAlignment, "plain elements only");

  AlignedBuffer() = default;
  AlignedBuffer(AlignedBuffer&& other) noexcept : data_(std::move(other.data_)), size_(other.size_) { other.size_ = 0; }
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept {
    data_ = std::move(other.data_);
    size_ = other.size_;
    other.size_ = 0;
    return *this;
  }

  // kInvalidArgument: size < 0. kResourceExhausted: no memory for it.
  static absl::StatusOr<AlignedBuffer> Create(int64_t size) {
    if (size < 0) return absl::InvalidArgumentError(absl::StrCat("buffer of ", size, " elements"));
    AlignedBuffer buffer;
    if (size == 0) return buffer;
    constexpr int64_t kLimit = std::numeric_limits<int64_t>::max() / static_cast<int64_t>(sizeof(T)) - kBufferAlignment;
    if (size <= kLimit) buffer.data_.reset(internal::AllocateAligned(size * static_cast<int64_t>(sizeof(T))));
    if (buffer.data_ == nullptr) {
      return absl::ResourceExhaustedError(absl::StrCat("no memory for ", size, " elements of ", sizeof(T), " bytes"));
    }
    buffer.size_ = size;
    return buffer;
  }

  T* data() { return static_cast<T*>(data_.get()); }
  const T* data() const { return static_cast<const T*>(data_.get()); }
  int64_t size() const { return size_; }  // elements
  int64_t size_in_bytes() const { return size_ * static_cast<int64_t>(sizeof(T)); }
  T& operator[](int64_t index) { return data()[index]; }
  const T& operator[](int64_t index) const { return data()[index]; }
  T* begin() { return data(); }
  T* end() { return data() + size_; }
  const T* begin() const { return data(); }
  const T* end() const { return data() + size_; }

 private:
  std::unique_ptr<void, internal::FreeAligned> data_;
  int64_t size_ = 0;
};

}  // namespace rwkv::kernels
