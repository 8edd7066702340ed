#include "kernels/cuda/testing/fake_state.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace rwkv::kernels::cuda::fake {
namespace {

constexpr size_t kKeptLaunches = 100'000;

// Set by signals' handlers, so not under the lock.
std::atomic<bool> breaks_next_call{false};
std::atomic<bool> breaks_next_copy{false};

}  // namespace

void ArmMemory(Moment moment, bool breaks) {
  (moment == Moment::kNextCall ? breaks_next_call : breaks_next_copy).store(breaks);
}

cudaError_t BeginCall(Fake& fake) {
  const bool breaks = breaks_next_call.exchange(false) || fake.counts.calls == fake.faults.break_call;
  ++fake.counts.calls;
  if (breaks && fake.fault == cudaSuccess) fake.fault = cudaErrorECCUncorrectable;
  return fake.fault;
}

size_t BeginCopy(Fake& fake, size_t bytes) {
  const bool breaks = breaks_next_copy.exchange(false) || fake.copied == fake.faults.break_copy;
  ++fake.copied;
  if (!breaks) return bytes;
  fake.fault = cudaErrorECCUncorrectable;
  return bytes / 2;
}

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

const char* WordOf(const emulation::Kernel& kernel, int64_t at) {
  const char* word;
  std::memcpy(&word, static_cast<const char*>(kernel.body.arguments.get()) + at, sizeof(word));
  return word;
}

// Whether it points into memory of the device, or to its end.
bool IsThere(const Fake& fake, const char* pointer) {
  auto after = fake.device_memory.upper_bound(pointer);
  if (after == fake.device_memory.begin()) return false;
  const auto& [first, size] = *std::prev(after);
  return pointer <= first + size;
}

// Places of words that look like pointers to what is there: what looks like one to what is not may be a rest of
// something else between two members.
std::vector<int64_t> PointersOf(const Fake& fake, const emulation::Kernel& kernel) {
  std::vector<int64_t> pointers;
  for (int64_t at = 0; at + 8 <= kernel.body.argument_bytes; at += 8) {
    if (IsThere(fake, WordOf(kernel, at))) pointers.push_back(at);
  }
  return pointers;
}

cudaError_t Launch(Fake& fake, CUstream_st* stream, SharedKernel kernel, std::vector<int64_t> pointers) {
  const int64_t launch = fake.counts.launches++;
  fake.launches.push_back({kernel->name, kernel->shape});
  if (fake.launches.size() > kKeptLaunches) fake.launches.pop_front();
  const bool faults = launch == fake.faults.fail_launch;
  const bool hangs = launch == fake.faults.hang_launch;
  const auto run = [kernel = std::move(kernel), pointers = std::move(pointers), faults, hangs] {
    Fake& fake = TheFake();
    if (hangs) return false;
    const auto is_gone = [&](int64_t at) { return !IsThere(fake, WordOf(*kernel, at)); };
    if (faults) {
      fake.fault = cudaErrorIllegalAddress;
    } else if (std::any_of(pointers.begin(), pointers.end(), is_gone)) {
      Violate(fake, absl::StrCat("a graph's ", kernel->name, " has a pointer to memory that was freed"));
      fake.fault = cudaErrorIllegalAddress;
    } else if (const absl::Status status = emulation::Run(*kernel); !status.ok()) {
      Violate(fake, std::string(status.message()));
      fake.fault = cudaErrorLaunchFailure;
    }
    return true;
  };
  return Give(fake, stream, {run, nullptr, {}});
}

}  // namespace

cudaError_t Enqueue(Fake& fake, CUstream_st* stream, Task task) {
  return Give(fake, stream, {std::move(task), nullptr, {}});
}

cudaError_t Launch(Fake& fake, CUstream_st* stream, SharedKernel kernel) {
  if (stream == nullptr || stream->captured == nullptr) return Launch(fake, stream, std::move(kernel), {});
  std::vector<int64_t> pointers = PointersOf(fake, *kernel);
  return Give(fake, stream, {nullptr, std::move(kernel), std::move(pointers)});
}

cudaError_t LaunchFromGraph(Fake& fake, CUstream_st* stream, const Work& work) {
  return Launch(fake, stream, work.kernel, work.pointers);
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
