// Memory of the fake runtime, and copies.
#include <stdlib.h>
#include <sys/mman.h>

#include <cstring>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/testing/fake_state.h"

namespace rwkv::kernels::cuda::fake {
namespace {

constexpr int64_t kArenaBytes = int64_t{1} << 38;  // Of addresses; memory only where it is touched.

}  // namespace

cudaError_t Malloc(void** memory, size_t size) {
  RWKV_FAKE_CALL;
  if (IsForbiddenInCapture(fake, "memory is allocated")) return cudaErrorStreamCaptureUnsupported;
  const auto bytes = static_cast<int64_t>(size);
  if (AllocationFails(fake) || bytes > fake.faults.memory_bytes - fake.counts.allocated_bytes) {
    return cudaErrorMemoryAllocation;
  }
  if (fake.arena == nullptr) {
    void* const arena = mmap(nullptr, kArenaBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (arena == MAP_FAILED) std::abort();
    fake.arena = static_cast<char*>(arena);
  }
  const int64_t page_bytes = RoundUp(RoundUp(bytes, kAlignment), kPageBytes);
  // No address is given twice, so that a pointer that outlived its memory faults.
  if (page_bytes > kArenaBytes - fake.used - 2 * kPageBytes) return cudaErrorMemoryAllocation;
  char* const pages = fake.arena + fake.used + kPageBytes;
  fake.used += kPageBytes + page_bytes;
  mprotect(pages, static_cast<size_t>(page_bytes), PROT_READ | PROT_WRITE);
  std::memset(pages, 0xff, static_cast<size_t>(page_bytes));
  if (fake.out_of_reach) mprotect(pages, static_cast<size_t>(page_bytes), PROT_NONE);
  char* const first = pages + page_bytes - RoundUp(bytes, kAlignment);
  fake.device_memory[first] = bytes;
  fake.counts.allocated_bytes += bytes;
  *memory = first;
  return cudaSuccess;
}

cudaError_t MemGetInfo(size_t* free, size_t* total) {
  RWKV_FAKE_CALL;
  *total = static_cast<size_t>(fake.faults.memory_bytes);
  const auto graphs = static_cast<int64_t>(fake.executables.size());
  *free = static_cast<size_t>(fake.faults.memory_bytes - fake.counts.allocated_bytes - graphs * kGraphBytesOfFake);
  return cudaSuccess;
}

// CUDA waits for the device.
void Free(void* memory, int64_t) {
  Fake& fake = TheFake();
  absl::MutexLock lock(&fake.mu);
  (void)IsForbiddenInCapture(fake, "memory is freed");
  DrainAll(fake);
  const auto it = fake.device_memory.find(static_cast<char*>(memory));
  if (it == fake.device_memory.end()) {
    Violate(fake, "memory is freed that is not the device's");
    return;
  }
  fake.counts.allocated_bytes -= it->second;
  char* const pages = PagesOf(it->first);
  const auto bytes = static_cast<size_t>(it->first + RoundUp(it->second, kAlignment) - pages);
  madvise(pages, bytes, MADV_DONTNEED);
  mprotect(pages, bytes, PROT_NONE);
  fake.device_memory.erase(it);
}

cudaError_t HostAlloc(void** memory, size_t size, unsigned int) {
  RWKV_FAKE_CALL;
  if (IsForbiddenInCapture(fake, "memory is allocated")) return cudaErrorStreamCaptureUnsupported;
  if (AllocationFails(fake)) return cudaErrorMemoryAllocation;
  if (posix_memalign(memory, kPageBytes, size) != 0) return cudaErrorMemoryAllocation;
  std::memset(*memory, 0xff, size);
  fake.pinned_memory[static_cast<char*>(*memory)] = static_cast<int64_t>(size);
  return cudaSuccess;
}

void FreeHost(void* memory, int64_t) {
  Fake& fake = TheFake();
  absl::MutexLock lock(&fake.mu);
  DrainAll(fake);
  if (fake.pinned_memory.erase(static_cast<char*>(memory)) == 0) {
    Violate(fake, "pinned memory is freed that is none");
    return;
  }
  std::free(memory);
}

cudaError_t MemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind kind, cudaStream_t stream) {
  RWKV_FAKE_CALL;
  const auto bytes = static_cast<int64_t>(size);
  ++fake.counts.copies;
  const Where target = WhereIs(fake, to, bytes);
  if (target == Where::kNowhere || WhereIs(fake, from, bytes) == Where::kNowhere) {
    Violate(fake, absl::StrCat("an asynchronous copy of ", bytes,
                               " bytes with memory that is neither the device's nor pinned"));
    return cudaErrorInvalidValue;
  }
  if (kind != cudaMemcpyDefault) Violate(fake, "a copy that says where memory is, which can only be wrong");
  // Whoever reads it before the copy has run shall not find what he hopes for.
  if (target == Where::kPinned) std::memset(to, 0xff, size);
  return Enqueue(fake, stream, Once([=] { std::memcpy(to, from, BeginCopy(TheFake(), size)); }));
}

cudaError_t MemsetAsync(void* memory, int value, size_t size, cudaStream_t stream) {
  RWKV_FAKE_CALL;
  if (WhereIs(fake, memory, static_cast<int64_t>(size)) != Where::kDevice) {
    Violate(fake, absl::StrCat("memset of ", size, " bytes that are not the device's"));
    return cudaErrorInvalidValue;
  }
  return Enqueue(fake, stream, Once([=] { std::memset(memory, value, size); }));
}

}  // namespace rwkv::kernels::cuda::fake
