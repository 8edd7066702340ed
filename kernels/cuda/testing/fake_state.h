// What the parts of the fake runtime share. Everything in it is called with the fake's lock held.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "kernels/cuda/testing/emulation.h"
#include "kernels/cuda/testing/fake_runtime.h"

namespace rwkv::kernels::cuda::fake {
using Task = std::function<bool()>;  // Says whether it is done; if not, it is called again.
using SharedKernel = std::shared_ptr<const emulation::Kernel>;

// What a stream is given: a kernel, or any other task.
struct Work {
  Task task;
  SharedKernel kernel;
  // Of a captured kernel: where in its arguments there were pointers to memory of the device then.
  std::vector<int64_t> pointers;
};
}  // namespace rwkv::kernels::cuda::fake

// What CUDA's handles point to here.
struct CUgraph_st {
  std::vector<rwkv::kernels::cuda::fake::Work> nodes;  // With copies of their arguments.
  bool is_broken = false;                              // Something happened that a capture does not survive.
};
struct CUgraphExec_st {
  std::vector<rwkv::kernels::cuda::fake::Work> nodes;
};
struct CUstream_st {
  int device = 0;  // The thread's when it was made.
  std::deque<rwkv::kernels::cuda::fake::Task> queue;
  std::unique_ptr<CUgraph_st> captured;  // While it is.
  std::thread::id capturing_thread;
};
struct CUevent_st {
  int device = 0;        // The thread's when it was made.
  int64_t recorded = 0;  // Times; it is done when as many have been passed.
  int64_t passed = 0;
  CUstream_st* stream = nullptr;
  int64_t resets = 0;  // Of the fake, when it was recorded: a reset forgets what streams were given.
};

namespace rwkv::kernels::cuda::fake {

constexpr int64_t kPageBytes = 4096;
constexpr int64_t kAlignment = 256;  // CUDA's own.
constexpr absl::Duration kPatience = absl::Seconds(60);

inline int64_t RoundUp(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

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
  int64_t copied = 0;  // Copies that have run, or begun to.
  int64_t resets = 0;
  cudaError_t fault = cudaSuccess;  // Sticky.
  std::map<CUstream_st*, std::unique_ptr<CUstream_st>> streams;
  char* arena = nullptr;
  int64_t used = 0;
  std::map<CUgraph_st*, std::unique_ptr<CUgraph_st>> graphs;
  std::map<CUgraphExec_st*, std::unique_ptr<CUgraphExec_st>> executables;
  std::map<const char*, int64_t> device_memory;  // first byte, bytes
  std::map<const char*, int64_t> pinned_memory;
};

Fake& TheFake();

#define RWKV_FAKE_CALL            \
  Fake& fake = TheFake();         \
  absl::MutexLock lock(&fake.mu); \
  if (const cudaError_t error = BeginCall(fake); error != cudaSuccess) return error

void ArmMemory(Moment moment, bool breaks);
// Counts it; the fault that it tells of.
cudaError_t BeginCall(Fake& fake);
// Of the copy that runs now: how much of it comes. Less than all: memory has broken.
size_t BeginCopy(Fake& fake, size_t bytes);

void Violate(Fake& fake, std::string what);
void CountWait(Fake& fake, const char* what);
bool AllocationFails(Fake& fake);
// Whether this thread captures a stream, which then is broken: `what` must not be done meanwhile.
bool IsForbiddenInCapture(Fake& fake, const char* what);

// The pages of device memory, where the host must not reach it.
char* PagesOf(const char* memory);
void Protect(Fake& fake, int access);

// At most `tasks` of a stream; fewer once one is not done, or the device has faulted.
void Advance(Fake& fake, CUstream_st& stream, size_t tasks);
// Waits as CUDA does: until all of it is done. Lets go of the lock in between, so that others get on. A wait that the
// product should not have begun ends the process with words, not by somebody's patience.
void Drain(Fake& fake, CUstream_st* stream) ABSL_EXCLUSIVE_LOCKS_REQUIRED(fake.mu);
void DrainAll(Fake& fake) ABSL_EXCLUSIVE_LOCKS_REQUIRED(fake.mu);

// Gives a stream work, or the graph as which it is captured.
cudaError_t Enqueue(Fake& fake, CUstream_st* stream, Task task);
cudaError_t Launch(Fake& fake, CUstream_st* stream, SharedKernel kernel);
// Those of a graph that runs now: it may hold what has gone since.
cudaError_t LaunchFromGraph(Fake& fake, CUstream_st* stream, const Work& work);

// A task that is done when it has run.
template <typename Function>
Task Once(Function function) {
  return [function = std::move(function)]() mutable {
    function();
    return true;
  };
}

enum class Where { kDevice, kPinned, kNowhere };
Where WhereIs(const Fake& fake, const void* memory, int64_t bytes);

// The parts of the table.
cudaError_t Malloc(void** memory, size_t size);
cudaError_t MemGetInfo(size_t* free, size_t* total);
void Free(void* memory, int64_t);
cudaError_t HostAlloc(void** memory, size_t size, unsigned int);
void FreeHost(void* memory, int64_t);
cudaError_t MemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t MemsetAsync(void* memory, int value, size_t size, cudaStream_t stream);
cudaError_t StreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t StreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
cudaError_t GraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags);
cudaError_t GraphLaunch(cudaGraphExec_t executable, cudaStream_t stream);
cudaError_t GraphDestroy(cudaGraph_t graph);
cudaError_t GraphExecDestroy(cudaGraphExec_t executable);

}  // namespace rwkv::kernels::cuda::fake
