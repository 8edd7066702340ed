#include "kernels/cuda/testing/fake_runtime.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "kernels/cuda/testing/emulation.h"

// What CUDA's handles point to here.
struct CUstream_st {
  std::deque<std::function<bool()>> queue;  // Each says whether it is done; if not, it is called again.
};
struct CUevent_st {
  int64_t recorded = 0;  // Times; it is done when as many have been passed.
  int64_t passed = 0;
  CUstream_st* stream = nullptr;
};

namespace rwkv::kernels::cuda {
namespace {

constexpr int64_t kArenaBytes = int64_t{1} << 38;  // Of addresses; memory only where it is touched.
constexpr int64_t kPageBytes = 4096;
constexpr int64_t kAlignment = 256;  // CUDA's own.
constexpr size_t kKeptLaunches = 100'000;
constexpr absl::Duration kPatience = absl::Seconds(60);

int64_t RoundUp(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// All of it under `mu`.
struct Fake {
  absl::Mutex mu;
  FakeFaults faults;
  FakeCounts counts;
  std::deque<FakeLaunch> launches;
  std::vector<std::string> violations;
  bool eager = false;
  bool out_of_reach = false;
  int watched_steps = 0;
  cudaError_t fault = cudaSuccess;  // Sticky.
  std::map<CUstream_st*, std::unique_ptr<CUstream_st>> streams;
  char* arena = nullptr;
  int64_t used = 0;
  std::map<const char*, int64_t> device_memory;  // first byte, bytes
  std::map<const char*, int64_t> pinned_memory;
};

Fake& TheFake() {
  static auto* const fake = new Fake;
  return *fake;
}

#define RWKV_FAKE_CALL            \
  Fake& fake = TheFake();         \
  absl::MutexLock lock(&fake.mu); \
  if (fake.fault != cudaSuccess) return fake.fault

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

// At most `tasks` of a stream; fewer once one is not done, or the device has faulted.
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

// What runs on without a host that waits.
void Run(Fake& fake, CUstream_st& stream) { Advance(fake, stream, stream.queue.size()); }

bool IsNever(bool*) { return false; }

// Waits as CUDA does: until all of it is done. Lets go of the lock in between, so that others get on. A wait that the
// product should not have begun ends the process with words, not by somebody's patience.
void Drain(Fake& fake, CUstream_st* stream) ABSL_EXCLUSIVE_LOCKS_REQUIRED(fake.mu) {
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

void DrainAll(Fake& fake) ABSL_EXCLUSIVE_LOCKS_REQUIRED(fake.mu) {
  std::vector<CUstream_st*> streams;
  for (const auto& [handle, stream] : fake.streams) streams.push_back(handle);
  for (CUstream_st* const stream : streams) Drain(fake, stream);
}

cudaError_t Enqueue(Fake& fake, CUstream_st* stream, std::function<bool()> task) {
  if (stream == nullptr) {
    Violate(fake, "the default stream is used");
    return cudaErrorInvalidResourceHandle;
  }
  if (fake.streams.count(stream) == 0) {
    Violate(fake, "a stream that is none is used");
    return cudaErrorInvalidResourceHandle;
  }
  stream->queue.push_back(std::move(task));
  if (fake.eager) Run(fake, *stream);
  return fake.fault;
}

// A task that is done when it has run.
template <typename Task>
std::function<bool()> Once(Task task) {
  return [task = std::move(task)]() mutable {
    task();
    return true;
  };
}

enum class Where { kDevice, kPinned, kNowhere };

bool Holds(const std::map<const char*, int64_t>& memory, const char* begin, int64_t bytes) {
  auto after = memory.upper_bound(begin);
  if (after == memory.begin()) return false;
  const auto& [first, size] = *std::prev(after);
  return begin + bytes <= first + size;
}

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

cudaError_t GetDeviceCount(int* count) {
  RWKV_FAKE_CALL;
  if (fake.faults.devices < 0) return cudaErrorInsufficientDriver;  // And leaves the count as it is.
  *count = fake.faults.devices;
  return fake.faults.devices == 0 ? cudaErrorNoDevice : cudaSuccess;
}

cudaError_t GetDeviceProperties(cudaDeviceProp* properties, int device) {
  RWKV_FAKE_CALL;
  if (device < 0 || device >= fake.faults.devices) return cudaErrorInvalidDevice;
  std::strcpy(properties->name, "Emulated");
  properties->major = fake.faults.major;
  properties->minor = 0;
  properties->totalGlobalMem = static_cast<size_t>(fake.faults.memory_bytes);
  properties->multiProcessorCount = 132;
  // Every process has a GPU of its own.
  const pid_t process = getpid();
  std::memcpy(properties->uuid.bytes, &process, sizeof(process));
  return cudaSuccess;
}

cudaError_t SetDevice(int device) {
  RWKV_FAKE_CALL;
  return device < 0 || device >= fake.faults.devices ? cudaErrorInvalidDevice : cudaSuccess;
}

cudaError_t Malloc(void** memory, size_t size) {
  RWKV_FAKE_CALL;
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
  *free = static_cast<size_t>(fake.faults.memory_bytes - fake.counts.allocated_bytes);
  return cudaSuccess;
}

// CUDA waits for the device.
void Free(void* memory, int64_t) {
  Fake& fake = TheFake();
  absl::MutexLock lock(&fake.mu);
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
  return Enqueue(fake, stream, Once([=] { std::memcpy(to, from, size); }));
}

cudaError_t MemsetAsync(void* memory, int value, size_t size, cudaStream_t stream) {
  RWKV_FAKE_CALL;
  if (WhereIs(fake, memory, static_cast<int64_t>(size)) != Where::kDevice) {
    Violate(fake, absl::StrCat("memset of ", size, " bytes that are not the device's"));
    return cudaErrorInvalidValue;
  }
  return Enqueue(fake, stream, Once([=] { std::memset(memory, value, size); }));
}

int LaunchOnFake(StreamHandle stream, emulation::Kernel kernel) {
  RWKV_FAKE_CALL;
  if (const absl::Status status = emulation::CheckShape(kernel.shape); !status.ok()) {
    Violate(fake, absl::StrCat(kernel.name, ": ", status.message()));
    return cudaErrorInvalidConfiguration;
  }
  const int64_t launch = fake.counts.launches++;
  fake.launches.push_back({kernel.name, kernel.shape});
  if (fake.launches.size() > kKeptLaunches) fake.launches.pop_front();
  const bool faults = launch == fake.faults.fail_launch;
  const bool hangs = launch == fake.faults.hang_launch;
  return Enqueue(fake, stream, [kernel = std::move(kernel), faults, hangs] {
    Fake& fake = TheFake();
    if (hangs) return false;
    if (faults) {
      fake.fault = cudaErrorIllegalAddress;
    } else if (const absl::Status status = emulation::Run(kernel); !status.ok()) {
      Violate(fake, std::string(status.message()));
      fake.fault = cudaErrorLaunchFailure;
    }
    return true;
  });
}

cudaError_t StreamCreateWithFlags(cudaStream_t* stream, unsigned int flags) {
  RWKV_FAKE_CALL;
  if (flags != cudaStreamNonBlocking) Violate(fake, "a stream that the default stream waits for");
  emulation::SetLauncher(LaunchOnFake);
  auto made = std::make_unique<CUstream_st>();
  *stream = made.get();
  fake.streams[made.get()] = std::move(made);
  return cudaSuccess;
}

cudaError_t StreamDestroy(cudaStream_t stream) {
  Fake& fake = TheFake();
  absl::MutexLock lock(&fake.mu);
  const auto it = fake.streams.find(stream);
  if (it == fake.streams.end()) return cudaErrorInvalidResourceHandle;
  Drain(fake, stream);
  fake.streams.erase(stream);
  return fake.fault;
}

cudaError_t StreamSynchronize(cudaStream_t stream) {
  RWKV_FAKE_CALL;
  CountWait(fake, "the host waits for a stream");
  if (fake.streams.count(stream) == 0) return cudaErrorInvalidResourceHandle;
  Drain(fake, stream);
  return fake.fault;
}

cudaError_t EventCreateWithFlags(cudaEvent_t* event, unsigned int flags) {
  RWKV_FAKE_CALL;
  if ((flags & cudaEventDisableTiming) == 0) Violate(fake, "an event that takes times, which slows the stream");
  *event = new CUevent_st;
  return cudaSuccess;
}

cudaError_t EventDestroy(cudaEvent_t event) {
  Fake& fake = TheFake();
  absl::MutexLock lock(&fake.mu);
  if (event->passed < event->recorded) return fake.fault;  // The stream still counts in it, as CUDA's does.
  delete event;
  return fake.fault;
}

cudaError_t EventRecord(cudaEvent_t event, cudaStream_t stream) {
  RWKV_FAKE_CALL;
  ++event->recorded;
  event->stream = stream;
  return Enqueue(fake, stream, Once([event] { ++event->passed; }));
}

// A question moves the stream by one task.
cudaError_t EventQuery(cudaEvent_t event) {
  RWKV_FAKE_CALL;
  if (event->passed < event->recorded && fake.streams.count(event->stream) > 0) Advance(fake, *event->stream, 1);
  if (fake.fault != cudaSuccess) return fake.fault;
  return event->passed < event->recorded ? cudaErrorNotReady : cudaSuccess;
}

cudaError_t EventSynchronize(cudaEvent_t event) {
  RWKV_FAKE_CALL;
  CountWait(fake, "the host waits for an event");
  bool never = false;
  const absl::Time limit = absl::Now() + kPatience;
  while (event->passed < event->recorded && fake.fault == cudaSuccess && fake.streams.count(event->stream) > 0 &&
         !event->stream->queue.empty()) {
    const size_t before = event->stream->queue.size();
    Advance(fake, *event->stream, 1);
    if (event->stream->queue.size() < before) continue;
    if (absl::Now() > limit) {
      std::fprintf(stderr, "fake runtime: a wait without a limit, for work that never ends\n");
      std::abort();
    }
    fake.mu.AwaitWithTimeout(absl::Condition(IsNever, &never), absl::Microseconds(50));
  }
  return fake.fault;
}

const char* GetErrorName(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorIllegalAddress:
      return "cudaErrorIllegalAddress";
    case cudaErrorInsufficientDriver:
      return "cudaErrorInsufficientDriver";
    case cudaErrorNoDevice:
      return "cudaErrorNoDevice";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
    default:
      return "cudaError";
  }
}

const char* GetErrorString(cudaError_t) { return "said by the fake runtime"; }

}  // namespace

const Runtime kFakeRuntime = {
    GetDeviceCount,
    GetDeviceProperties,
    SetDevice,
    Malloc,
    MemGetInfo,
    HostAlloc,
    MemcpyAsync,
    MemsetAsync,
    StreamCreateWithFlags,
    StreamDestroy,
    StreamSynchronize,
    EventCreateWithFlags,
    EventDestroy,
    EventRecord,
    EventQuery,
    EventSynchronize,
    GetErrorName,
    GetErrorString,
    Free,
    FreeHost,
};

void ResetFake(const FakeFaults& faults) {
  Fake& fake = TheFake();
  absl::MutexLock lock(&fake.mu);
  fake.faults = faults;
  fake.fault = cudaSuccess;
  fake.violations.clear();
  fake.launches.clear();
  const int64_t allocated = fake.counts.allocated_bytes;
  fake.counts = {};
  fake.counts.allocated_bytes = allocated;
  for (const auto& [handle, stream] : fake.streams) stream->queue.clear();
}

void SetEager(bool eager) {
  Fake& fake = TheFake();
  absl::MutexLock lock(&fake.mu);
  fake.eager = eager;
}

void SetOutOfReach(bool out_of_reach) {
  Fake& fake = TheFake();
  absl::MutexLock lock(&fake.mu);
  fake.out_of_reach = true;
  Protect(fake, out_of_reach ? PROT_NONE : PROT_READ | PROT_WRITE);
  fake.out_of_reach = out_of_reach;
}

int EnqueueOnFake(void* stream, std::function<bool()> task) {
  RWKV_FAKE_CALL;
  return Enqueue(fake, static_cast<CUstream_st*>(stream), std::move(task));
}

bool IsDeviceMemoryOfFake(const void* memory, int64_t bytes) {
  Fake& fake = TheFake();
  absl::MutexLock lock(&fake.mu);
  return WhereIs(fake, memory, bytes) == Where::kDevice;
}

FakeCounts CountsOfFake() {
  Fake& fake = TheFake();
  absl::MutexLock lock(&fake.mu);
  return fake.counts;
}

std::vector<FakeLaunch> TakeLaunchesOfFake() {
  Fake& fake = TheFake();
  absl::MutexLock lock(&fake.mu);
  std::vector<FakeLaunch> launches(fake.launches.begin(), fake.launches.end());
  fake.launches.clear();
  return launches;
}

std::vector<std::string> ViolationsOfFake() {
  Fake& fake = TheFake();
  absl::MutexLock lock(&fake.mu);
  return fake.violations;
}

StepWatch::StepWatch() {
  Fake& fake = TheFake();
  absl::MutexLock lock(&fake.mu);
  ++fake.watched_steps;
}

StepWatch::~StepWatch() {
  Fake& fake = TheFake();
  absl::MutexLock lock(&fake.mu);
  --fake.watched_steps;
}

}  // namespace rwkv::kernels::cuda
