#include "kernels/base/host_device.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"

namespace rwkv::kernels {
namespace {

// What calloc gave is kept before the aligned place: it aligns to 16, so there is room for a pointer.
void FreeAligned(void* memory, int64_t) { std::free(static_cast<void**>(memory)[-1]); }

// Nothing on a HostStream is ever still to be done.
class HostEvent final : public Event {
 public:
  bool Done() const override { return true; }
  absl::Status WaitOnHost() const override { return absl::OkStatus(); }
};

}  // namespace

absl::StatusOr<Buffer> AllocateOnHost(int64_t bytes) {
  if (bytes < 0) return absl::InvalidArgumentError(absl::StrCat("buffer of ", bytes, " bytes"));
  if (bytes == 0) return Buffer();
  void* memory = nullptr;
  // calloc leaves a large buffer to the kernel, whose zeros cost memory only where somebody writes.
  if (bytes <= std::numeric_limits<int64_t>::max() - kBufferAlignment) {
    memory = std::calloc(1, static_cast<size_t>(bytes + kBufferAlignment));
  }
  if (memory == nullptr) return absl::ResourceExhaustedError(absl::StrCat("no memory for ", bytes, " bytes"));
  const auto address = reinterpret_cast<uintptr_t>(memory);
  void** const aligned = reinterpret_cast<void**>((address / kBufferAlignment + 1) * kBufferAlignment);
  aligned[-1] = memory;
  return Buffer(aligned, bytes, FreeAligned);
}

absl::Status HostStream::Copy(void* to, const void* from, int64_t bytes) {
  if (bytes > 0) std::memcpy(to, from, static_cast<size_t>(bytes));
  return absl::OkStatus();
}

absl::Status HostStream::Zero(void* memory, int64_t bytes) {
  if (bytes > 0) std::memset(memory, 0, static_cast<size_t>(bytes));
  return absl::OkStatus();
}

absl::StatusOr<void*> HostStream::Scratch(int64_t bytes) {
  if (bytes > scratch_.size_in_bytes()) {
    // A power of two, so that what grows by a token a step is seldom made anew. The old one goes first: its contents
    // are nobody's.
    int64_t larger = kBufferAlignment;
    while (larger < bytes && larger < int64_t{1} << 62) larger *= 2;
    scratch_ = Buffer();
    RWKV_ASSIGN_OR_RETURN(scratch_, AllocateOnHost(std::max(larger, bytes)));
  }
  return scratch_.data();
}

absl::StatusOr<std::unique_ptr<Stream>> HostDevice::NewStream() { return std::make_unique<HostStream>(); }

absl::StatusOr<std::unique_ptr<Event>> HostDevice::NewEvent() { return std::make_unique<HostEvent>(); }

absl::StatusOr<Weight> HostDevice::Load(const MatrixView& matrix, WeightUse) {
  RWKV_RETURN_IF_ERROR(CheckMatrix("weight", matrix));
  Weight weight;
  weight.matrix = matrix;
  return weight;
}

}  // namespace rwkv::kernels
