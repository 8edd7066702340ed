#include "kernels/base/host_device.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"

namespace rwkv::kernels {
namespace {

// From here on memory comes from the kernel itself, so that pages cost nothing before they are written: what the C
// library has to give may have been used before, and calloc would write zeros all over it.
constexpr int64_t kMappedBytes = 64 * 1024;

void Unmap(void* memory, int64_t bytes) { munmap(memory, static_cast<size_t>(bytes)); }
void Free(void* memory, int64_t) { std::free(memory); }

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
  if (bytes >= kMappedBytes) {
    void* const memory =
        mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory != MAP_FAILED) return Buffer(memory, bytes, Unmap);
  } else if (void* memory = nullptr; posix_memalign(&memory, kBufferAlignment, static_cast<size_t>(bytes)) == 0) {
    std::memset(memory, 0, static_cast<size_t>(bytes));
    return Buffer(memory, bytes, Free);
  }
  return absl::ResourceExhaustedError(absl::StrCat("no memory for ", bytes, " bytes"));
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
