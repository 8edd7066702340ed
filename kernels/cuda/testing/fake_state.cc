#include "kernels/cuda/testing/fake_state.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace rwkv::kernels::cuda::fake {
namespace {

constexpr size_t kKeptLaunches = 100'000;

}  // namespace

Fake& TheFake() {
  static auto* const fake = new Fake;
  return *fake;
}

void Violate(Fake& fake, std::string what) { fake.violations.push_back(std::move(what)); }

void CountWait(Fake& fake, const char* what) {
  ++fake.counts.waits;
  if (fake.watched_steps > 0) Violate(fake, absl::StrCat(what, " in a step"));
}

char* PagesOf(const char* memory) {
  return const_cast<char*>(memory) - reinterpret_cast<uintptr_t>(memory) % kPageBytes;
}

void Protect(Fake& fake, int access) {
  if (!fake.out_of_reach) return;
  for (const auto& [memory, bytes] : fake.device_memory) {
    char* const pages = PagesOf(memory);
    if (mprotect(pages, static_cast<size_t>(memory + RoundUp(bytes, kAlignment) - pages), access) != 0) std::abort();
  }
}

void Advance(Fake& fake, CUstream_st& stream, size_t tasks) {
  tasks = std::min(tasks, stream.queue.size());
  if (tasks == 0 || fake.fault != cudaSuccess) return;
  Protect(fake, PROT_READ | PROT_WRITE);
  for (; tasks > 0 && fake.fault == cudaSuccess; --tasks) {
    if (!stream.queue.front()()) break;
    stream.queue.pop_front();
  }
  Protect(fake, PROT_NONE);
}

namespace {

// What runs on without a host that waits.
void Run(Fake& fake, CUstream_st& stream) { Advance(fake, stream, stream.queue.size()); }

bool IsNever(bool*) { return false; }

}  // namespace

void Drain(Fake& fake, CUstream_st* stream) {
  bool never = false;
  const absl::Time limit = absl::Now() + kPatience;
  while (fake.streams.count(stream) > 0 && !stream->queue.empty() && fake.fault == cudaSuccess) {
    Run(fake, *stream);
    if (stream->queue.empty()) return;
    if (absl::Now() > limit) {
      std::fprintf(stderr, "fake runtime: a wait without a limit, for work that never ends\n");
      std::abort();
    }
    fake.mu.AwaitWithTimeout(absl::Condition(IsNever, &never), absl::Microseconds(50));
  }
}

void DrainAll(Fake& fake) {
  std::vector<CUstream_st*> streams;
  for (const auto& [handle, stream] : fake.streams) streams.push_back(handle);
  for (CUstream_st* const stream : streams) Drain(fake, stream);
}

namespace {

cudaError_t Give(Fake& fake, CUstream_st* stream, Work work) {
  if (stream == nullptr) {
    Violate(fake, "the default stream is used");
    return cudaErrorInvalidResourceHandle;
  }
  if (fake.streams.count(stream) == 0) {
    Violate(fake, "a stream that is none is used");
    return cudaErrorInvalidResourceHandle;
  }
  if (stream->captured != nullptr) {
    stream->captured->nodes.push_back(std::move(work));
    return cudaSuccess;
  }
  stream->queue.push_back(std::move(work.task));
  if (fake.eager) Run(fake, *stream);
  return fake.fault;
}

// What a kernel's arguments point to in the device's memory, or may: words that look so. Null: to memory that is there.
const char* FindGone(const Fake& fake, const emulation::Kernel& kernel) {
  const char* const begin = static_cast<const char*>(kernel.body.arguments.get());
  for (int64_t at = 0; at + 8 <= kernel.body.argument_bytes; at += 8) {
    const char* pointer;
    std::memcpy(&pointer, begin + at, sizeof(pointer));
    if (fake.arena == nullptr || pointer < fake.arena || pointer >= fake.arena + fake.used) continue;
    auto after = fake.device_memory.upper_bound(pointer);
    if (after == fake.device_memory.begin()) return pointer;
    const auto& [first, size] = *std::prev(after);
    if (pointer > first + size) return pointer;
  }
  return nullptr;
}

cudaError_t Launch(Fake& fake, CUstream_st* stream, SharedKernel kernel, bool from_graph) {
  if (stream != nullptr && stream->captured != nullptr) return Give(fake, stream, {nullptr, std::move(kernel)});
  const int64_t launch = fake.counts.launches++;
  fake.launches.push_back({kernel->name, kernel->shape});
  if (fake.launches.size() > kKeptLaunches) fake.launches.pop_front();
  const bool faults = launch == fake.faults.fail_launch;
  const bool hangs = launch == fake.faults.hang_launch;
  const auto run = [kernel = std::move(kernel), faults, hangs, from_graph] {
    Fake& fake = TheFake();
    if (hangs) return false;
    if (faults) {
      fake.fault = cudaErrorIllegalAddress;
    } else if (from_graph && FindGone(fake, *kernel) != nullptr) {
      Violate(fake, absl::StrCat("a graph's ", kernel->name, " has a pointer to memory that was freed"));
      fake.fault = cudaErrorIllegalAddress;
    } else if (const absl::Status status = emulation::Run(*kernel); !status.ok()) {
      Violate(fake, std::string(status.message()));
      fake.fault = cudaErrorLaunchFailure;
    }
    return true;
  };
  return Give(fake, stream, {run, nullptr});
}

}  // namespace

cudaError_t Enqueue(Fake& fake, CUstream_st* stream, Task task) {
  return Give(fake, stream, {std::move(task), nullptr});
}

cudaError_t Launch(Fake& fake, CUstream_st* stream, SharedKernel kernel) {
  return Launch(fake, stream, std::move(kernel), false);
}

cudaError_t LaunchFromGraph(Fake& fake, CUstream_st* stream, SharedKernel kernel) {
  return Launch(fake, stream, std::move(kernel), true);
}

namespace {

bool Holds(const std::map<const char*, int64_t>& memory, const char* begin, int64_t bytes) {
  auto after = memory.upper_bound(begin);
  if (after == memory.begin()) return false;
  const auto& [first, size] = *std::prev(after);
  return begin + bytes <= first + size;
}

}  // namespace

Where WhereIs(const Fake& fake, const void* memory, int64_t bytes) {
  const char* const begin = static_cast<const char*>(memory);
  if (Holds(fake.device_memory, begin, bytes)) return Where::kDevice;
  if (Holds(fake.pinned_memory, begin, bytes)) return Where::kPinned;
  return Where::kNowhere;
}

bool AllocationFails(Fake& fake) {
  if (fake.watched_steps > 0) Violate(fake, "memory is allocated in a step");
  return fake.counts.allocations++ == fake.faults.fail_allocation;
}

bool IsForbiddenInCapture(Fake& fake, const char* what) {
  for (const auto& [handle, stream] : fake.streams) {
    if (stream->captured == nullptr || stream->capturing_thread != std::this_thread::get_id()) continue;
    stream->captured->is_broken = true;
    Violate(fake, absl::StrCat(what, " while a stream is captured"));
    return true;
  }
  return false;
}

}  // namespace rwkv::kernels::cuda::fake
