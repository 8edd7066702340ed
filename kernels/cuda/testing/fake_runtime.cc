#include "kernels/cuda/testing/fake_runtime.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "kernels/cuda/testing/emulation.h"
#include "kernels/cuda/testing/fake_state.h"

namespace rwkv::kernels::cuda {
using namespace fake;  // NOLINT: its other half.
namespace {

bool IsNever(bool*) { return false; }

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

thread_local int current_device = 0;

cudaError_t SetDevice(int device) {
  RWKV_FAKE_CALL;
  if (device < 0 || device >= fake.faults.devices) return cudaErrorInvalidDevice;
  current_device = device;
  return cudaSuccess;
}

int LaunchOnFake(StreamHandle stream, emulation::Kernel kernel) {
  RWKV_FAKE_CALL;
  if (const absl::Status status = emulation::CheckShape(kernel.shape); !status.ok()) {
    Violate(fake, absl::StrCat(kernel.name, ": ", status.message()));
    return cudaErrorInvalidConfiguration;
  }
  if (kernel.overlaps && fake.faults.major < 9) Violate(fake, absl::StrCat(kernel.name, ": overlaps, which needs 9.0"));
  return Launch(fake, stream, std::make_shared<emulation::Kernel>(std::move(kernel)));
}

cudaError_t StreamCreateWithFlags(cudaStream_t* stream, unsigned int flags) {
  RWKV_FAKE_CALL;
  if (flags != cudaStreamNonBlocking) Violate(fake, "a stream that the default stream waits for");
  emulation::SetLauncher(LaunchOnFake);
  auto made = std::make_unique<CUstream_st>();
  made->device = current_device;
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
  if (IsForbiddenInCapture(fake, "the host waits for a stream")) return cudaErrorStreamCaptureUnsupported;
  CountWait(fake, "the host waits for a stream");
  if (fake.streams.count(stream) == 0) return cudaErrorInvalidResourceHandle;
  Drain(fake, stream);
  return fake.fault;
}

cudaError_t EventCreateWithFlags(cudaEvent_t* event, unsigned int flags) {
  RWKV_FAKE_CALL;
  if ((flags & cudaEventDisableTiming) == 0) Violate(fake, "an event that takes times, which slows the stream");
  *event = new CUevent_st;
  (*event)->device = current_device;
  return cudaSuccess;
}

bool IsPending(const Fake& fake, const CUevent_st& event) {
  return event.passed < event.recorded && event.resets == fake.resets;
}

cudaError_t EventDestroy(cudaEvent_t event) {
  Fake& fake = TheFake();
  absl::MutexLock lock(&fake.mu);
  if (IsPending(fake, *event)) return fake.fault;  // The stream still counts in it, as CUDA's does.
  delete event;
  return fake.fault;
}

cudaError_t EventRecord(cudaEvent_t event, cudaStream_t stream) {
  RWKV_FAKE_CALL;
  if (IsForbiddenInCapture(fake, "an event is recorded")) return cudaErrorStreamCaptureUnsupported;
  const auto of = fake.streams.find(stream);
  if (of != fake.streams.end() && of->second->device != event->device) {
    Violate(fake, "an event is recorded on a stream of another device");
    return cudaErrorInvalidResourceHandle;
  }
  if (event->resets != fake.resets) event->passed = event->recorded;
  event->resets = fake.resets;
  ++event->recorded;
  event->stream = stream;
  return Enqueue(fake, stream, Once([event] { ++event->passed; }));
}

// A question moves the stream by one task.
cudaError_t EventQuery(cudaEvent_t event) {
  RWKV_FAKE_CALL;
  if (IsPending(fake, *event) && fake.streams.count(event->stream) > 0) Advance(fake, *event->stream, 1);
  if (fake.fault != cudaSuccess) return fake.fault;
  return IsPending(fake, *event) ? cudaErrorNotReady : cudaSuccess;
}

cudaError_t EventSynchronize(cudaEvent_t event) {
  RWKV_FAKE_CALL;
  if (IsForbiddenInCapture(fake, "the host waits for an event")) return cudaErrorStreamCaptureUnsupported;
  CountWait(fake, "the host waits for an event");
  bool never = false;
  const absl::Time limit = absl::Now() + kPatience;
  while (IsPending(fake, *event) && fake.fault == cudaSuccess && fake.streams.count(event->stream) > 0 &&
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
    case cudaErrorECCUncorrectable:
      return "cudaErrorECCUncorrectable";
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
    StreamBeginCapture,
    StreamEndCapture,
    GraphInstantiate,
    GraphLaunch,
    GraphDestroy,
    GraphExecDestroy,
    GetErrorName,
    GetErrorString,
    Free,
    FreeHost,
};

void BreakMemory(Moment moment) { ArmMemory(moment, true); }

void ResetFake(const FakeFaults& faults) {
  ArmMemory(Moment::kNextCall, false);
  ArmMemory(Moment::kNextCopy, false);
  Fake& fake = TheFake();
  absl::MutexLock lock(&fake.mu);
  fake.faults = faults;
  fake.fault = cudaSuccess;
  fake.copied = 0;
  ++fake.resets;
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
  if (IsForbiddenInCapture(fake, "another library works")) return cudaErrorStreamCaptureUnsupported;
  return Enqueue(fake, static_cast<CUstream_st*>(stream), std::move(task));
}

bool IsDeviceMemoryOfFake(const void* memory, int64_t bytes) {
  Fake& fake = TheFake();
  absl::MutexLock lock(&fake.mu);
  return WhereIs(fake, memory, bytes) == Where::kDevice;
}

void TellFake(std::string violation) {
  Fake& fake = TheFake();
  absl::MutexLock lock(&fake.mu);
  Violate(fake, std::move(violation));
}

void ForbidInStepOfFake(const char* what) {
  Fake& fake = TheFake();
  absl::MutexLock lock(&fake.mu);
  if (!IsForbiddenInCapture(fake, what) && fake.watched_steps > 0) Violate(fake, absl::StrCat(what, " in a step"));
}

FakeCounts CountsOfFake() {
  Fake& fake = TheFake();
  absl::MutexLock lock(&fake.mu);
  FakeCounts counts = fake.counts;
  counts.handles = static_cast<int64_t>(fake.streams.size() + fake.graphs.size() + fake.executables.size());
  return counts;
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
