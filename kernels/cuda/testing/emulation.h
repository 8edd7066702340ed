// CUDA's way to run a kernel, on one CPU thread: a fiber for every CUDA thread, one block after the other. Device code
// reaches it through device.cuh. What a GPU would leave undefined is made bad on purpose: shared memory is fresh NaN
// for every block, every thread runs as far as it can before another does, in an order that tests choose; and what CUDA
// forbids ends the launch with words: a barrier that some threads do not reach or reach elsewhere, a collective without
// a lane, more shared memory than the launch gave, a misaligned wide access, a launch beyond the limits; where launches
// overlap, a thread that touches memory (wide; the checker sees all) or leaves without BeginKernel().
//
// It is stricter than hardware, and it shares its authors' reading of CUDA's rules: a wrong belief passes. There are no
// weak memory orders here, and nothing about time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <string>
#include <tuple>
#include <type_traits>

#include "absl/status/status.h"
#include "kernels/cuda/launch_shape.h"

namespace rwkv::kernels::cuda::emulation {

// Where in a kernel's source.
struct Site {
  static constexpr Site Here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  const char* file;
  int line;
};

// For device.cuh: of the CUDA thread that is running.
int ThreadIndex();
int BlockThreads();
int BlockIndexX();
int BlockIndexY();
void BeginKernel();
void CheckPrefetch(const void* line);
void SyncBlock(Site site);
void SyncWarp(Site site);
float ShuffleXor(float value, int mask, Site site);
float WarpSum(float value, int width, Site site);
// The lane's parts of `steps` products, [steps][4] and [steps][2]. Sums are float, by input.
void MmaBf16(float* c, const uint32_t* a, const uint32_t* b, int steps, Site site);
void MmaHalf(float* c, const uint32_t* a, const uint32_t* b, int steps, Site site);
// Of one product, [4] and [2].
void MmaInt8(int32_t* c, const uint32_t* a, const uint32_t* b, Site site);
void* BlockShared(size_t bytes);
void AtomicAdd(uint64_t* to, uint64_t value, const void* caller);
void CheckShift(int bits);  // Of a word by 32 or more: zero on a GPU, anything here.
// For who runs kernels otherwise (ptx.h): an access by as many bytes, aligned to them and behind BeginKernel(); and
// something else that is forbidden, which ends the launch.
void CheckAccess(const void* address, int bytes, const char* does);
[[noreturn]] void Forbid(const char* what);
void Read8(const void* from, void* to, const void* caller);
void Read16(const void* from, void* to, const void* caller);
void Write8(void* to, const void* from, const void* caller);
void Write16(void* to, const void* from, const void* caller);

// A kernel with copies of its arguments, which whoever runs it calls for every CUDA thread.
struct Body {
  std::function<void()> run;
  std::shared_ptr<void> arguments;
  int64_t argument_bytes = 0;
};

template <typename... Parameters, typename... Arguments>
Body Bind(void (*kernel)(Parameters...), Arguments&&... arguments) {
  using Copies = std::tuple<std::decay_t<Parameters>...>;
  // Zeros between the arguments, where a rest of something else may look like a pointer.
  auto memory = std::shared_ptr<void>(std::calloc(1, sizeof(Copies)), std::free);
  static_assert(std::is_trivially_destructible_v<Copies> && alignof(Copies) <= alignof(std::max_align_t));
  Copies* const from = new (memory.get()) Copies(std::forward<Arguments>(arguments)...);
  return {[kernel, from]() __attribute__((disable_sanitizer_instrumentation)){std::apply(kernel, *from);
}
, std::move(memory), static_cast<int64_t>(sizeof(Copies))
};  // namespace rwkv::kernels::cuda::emulation
}

// A launch that has not run yet.
struct Kernel {
  std::string name;
  LaunchShape shape;
  Body body;
  bool overlaps = false;  // With the kernel before.
};

// The order in which threads, and blocks, get their turn.
enum class Order : uint8_t { kForward, kReverse, kShuffled };

// Of this process from now on; kForward at its start.
void SetOrder(Order order, uint32_t seed = 0);

// kInvalidArgument: a shape that no device takes, in words.
absl::Status CheckShape(const LaunchShape& shape);

// Runs all of it. kInternal: what CUDA forbids; the rest of the kernel has not run then. One runs at a time in a
// process, others wait.
absl::Status Run(const Kernel& kernel);

// Launches of device.cuh go to the process's launcher, which at its start is one that runs them at once and says 0 or
// what cudart calls cudaErrorInvalidConfiguration or cudaErrorLaunchFailure.
int Submit(LaunchStream stream, const LaunchShape& shape, const char* name, Body body);
using Launcher = int (*)(StreamHandle stream, Kernel kernel);
void SetLauncher(Launcher launcher);  // Null: that one again.
// What the last launch that it ran came to.
const absl::Status& LastStatus();

// For the checker: what it wants to know of every access, and the thread that makes it.
struct Running {
  int thread = 0;
  int64_t block = 0;         // y * grid_x + x
  uint32_t block_epoch = 0;  // barriers of the block that this thread has passed
  uint32_t warp_epoch = 0;   // of the warp
  bool began = true;         // It may touch memory: the kernel before is done.
  const char* stack = nullptr;
  const char* stack_end = nullptr;
  const char* shared = nullptr;
  const char* shared_end = nullptr;
};
class Observer {
 public:
  virtual ~Observer() = default;
  virtual void OnLaunch(const Kernel& kernel) = 0;
  virtual void OnBlock(const Running& first) = 0;  // Its shared memory is fresh.
  virtual void OnEnd() = 0;
  virtual void OnAccess(const void* address, int bytes, bool writes, const void* caller) = 0;
  // Reads and writes; against others of its kind in any order.
  virtual void OnAtomic(const void* address, int bytes, const void* caller) { OnAccess(address, bytes, true, caller); }
};
void SetObserver(Observer* observer);  // Or null. Not while a kernel runs.
Observer* CurrentObserver();
const Running* CurrentThread();  // Null outside a kernel.

}  // namespace rwkv::kernels::cuda::emulation
