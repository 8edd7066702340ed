// A GPU that is not there: CUDA's runtime, as far as the device uses it, over the emulation. It is an adversary.
// Streams are lazy: nothing on one runs before somebody waits for it or asks, and then no more than needed, so that
// whoever reads too early reads 0xFF, and whoever reuses memory too early hurts himself. Device memory is 0xFF and ends
// at an unmapped page. What CUDA allows but this repository does not is a violation.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "kernels/cuda/launch_shape.h"
#include "kernels/cuda/runtime.h"

namespace rwkv::kernels::cuda {

// One for the process, as CUDA's is. Thread-safe.
extern const Runtime kFakeRuntime;

struct FakeFaults {
  int64_t memory_bytes = int64_t{1} << 37;  // of the device
  int64_t fail_launch = -1;      // The n-th kernel from now on (0: the next) faults as an illegal address does.
  int64_t hang_launch = -1;      // The n-th kernel from now on never ends, and says nothing.
  int64_t fail_allocation = -1;  // The n-th allocation from now on finds no memory.
  int64_t fail_graph = -1;       // The n-th graph from now on finds none.
  int64_t break_call = -1;       // At the n-th call from now on the device's memory breaks: an uncorrectable error.
  int64_t break_copy = -1;       // So it does in the n-th copy that runs from now on, half of which has come then.
  int devices = 1;               // -1: no driver.
  int major = 9;                 // of the compute capability
};

struct FakeCounts {
  int64_t calls = 0;  // Of functions that tell of the device's faults.
  int64_t launches = 0;
  int64_t copies = 0;
  int64_t allocations = 0;
  int64_t allocated_bytes = 0;  // now, of the device's memory
  int64_t waits = 0;            // of the host for a stream or an event
  int64_t graphs = 0;           // made; each takes kGraphBytesOfFake
  int64_t graph_copies = 0;     // what is no kernel in them
  int64_t graph_launches = 0;
  int64_t handles = 0;  // now: streams, graphs and what was made of graphs
};

// Forgets a fault that has happened, violations and counts; memory and streams stay.
void ResetFake(const FakeFaults& faults = {});

// The device's memory breaks at the next call, or in the next copy that runs. A signal's handler may say so.
enum class Moment : uint8_t { kNextCall, kNextCopy };
void BreakMemory(Moment moment);

// Everything runs when it is enqueued. Must change nothing that anybody can see.
void SetEager(bool eager);

// From now on device memory faults when the host touches it: only what a stream runs may. Slow, so not the default;
// conformance's protected device sees to it elsewhere.
void SetOutOfReach(bool out_of_reach);

FakeCounts CountsOfFake();
constexpr int64_t kGraphBytesOfFake = 1 << 16;

struct FakeLaunch {
  std::string name;
  LaunchShape shape;
};
// Those that were enqueued since the last call of this, or of ResetFake(); the newest 100,000.
std::vector<FakeLaunch> TakeLaunchesOfFake();

// What was done that must not be, in words: default or blocking stream, pageable memory in an asynchronous copy, memory
// that is nobody's, allocations and waits in a step or a capture, graphs with pointers to memory that is gone, kernels
// that do what CUDA forbids.
std::vector<std::string> ViolationsOfFake();

// For fakes of other libraries of the device: work of a stream, called until it says that it is done; a code of CUDA's.
// It must not call this fake.
int EnqueueOnFake(void* stream, std::function<bool()> task);
bool IsDeviceMemoryOfFake(const void* memory, int64_t bytes);
// What was done with them that must not be.
void TellFake(std::string violation);
// A violation while a StepWatch lives, or this thread captures a stream.
void ForbidInStepOfFake(const char* what);

// While one lives, allocating and waiting are violations.
class StepWatch {
 public:
  StepWatch();
  ~StepWatch();
};

}  // namespace rwkv::kernels::cuda
