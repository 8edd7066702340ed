#include "kernels/cuda/testing/emulation.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "kernels/cuda/testing/emulated_mma.h"
#include "kernels/cuda/testing/fibers.h"

namespace rwkv::kernels::cuda::emulation {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr uint32_t kMaxShared = 48 * 1024;  // What every launch may have.
constexpr uint32_t kMaxGridY = 65535;
constexpr uint32_t kMaxGridX = 2147483647;
constexpr int64_t kRedzone = 256;
constexpr unsigned char kRedzoneByte = 0xa5;

enum class State : uint8_t { kReady, kAtBarrier, kInCollective, kLeft };
enum class Collective : uint8_t { kSync, kShuffle, kSum, kMmaBf16, kMmaHalf, kMmaInt8 };

struct Warp {
  int arrived = 0;
  int parity = 0;  // A lane can be one collective ahead, not two.
  Collective kind = Collective::kSync;
  int argument = 0;
  Site site = {};
  float values[2][kWarp];
  MmaLanes mma;  // Of the matrix product that is being met for: memory of lanes that wait in it.
};

struct Thread {
  State state = State::kReady;
  Site site = {};
  Running running;
};

std::string ToString(const Site& site) { return absl::StrCat(site.file, ":", site.line); }

bool Same(const Site& a, const Site& b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

// All of it under `mu`, but for what one launch's own thread reads.
struct Machine {
  absl::Mutex mu;
  Order order = Order::kForward;
  std::mt19937 random;
  Observer* observer = nullptr;
  Fibers* fibers = nullptr;  // One for each of `threads`, once anything runs.
  std::vector<Thread> threads{kMaxThreads};
  std::vector<Warp> warps{kMaxThreads / kWarp};
  std::vector<char> shared_memory = std::vector<char>(kMaxShared + kRedzone + 256);

  const Kernel* kernel = nullptr;
  char* shared = nullptr;
  int block_x = 0;
  int block_y = 0;
  int at_barrier = 0;
  Site barrier = {};
  Thread* current = nullptr;
  std::string violation;
};

Machine& TheMachine() {
  static auto* const machine = new Machine;
  return *machine;
}
// Without the guard of the function's static, which every call of a kernel would pay for.
Machine* machine = &TheMachine();

// Ends the launch: the scheduler resumes nobody any more. Words are literals and numbers, for nothing that is on the
// thread's stack is ever destroyed.
template <typename... Words>
[[noreturn]] void Forbidden(const Words&... words) {
  machine->violation = absl::StrCat(machine->kernel->name, ", block (", machine->block_x, ", ", machine->block_y,
                                    "), thread ", machine->current->running.thread, ": ", words...);
  while (true) machine->fibers->Suspend();
}

// What a CUDA thread's fiber does.
void RunThread() {
  machine->kernel->body.run();
  if (!machine->current->running.began) Forbidden("leaves without BeginKernel(), and its kernel may overlap");
  machine->current->state = State::kLeft;
}

void Resume(int t) {
  machine->current = &machine->threads[t];
  machine->fibers->Resume(t);
  machine->current = nullptr;
}

void MakeFibers() {
  if (machine->fibers != nullptr) return;
  machine->fibers = new Fibers(kMaxThreads);
  for (int t = 0; t < kMaxThreads; ++t) {
    Running& running = machine->threads[t].running;
    running.thread = t;
    running.stack = machine->fibers->stack(t).begin;
    running.stack_end = machine->fibers->stack(t).end;
  }
}

std::vector<int64_t> Turns(int64_t count) {
  std::vector<int64_t> turns(static_cast<size_t>(count));
  std::iota(turns.begin(), turns.end(), 0);
  if (machine->order == Order::kReverse) std::reverse(turns.begin(), turns.end());
  if (machine->order == Order::kShuffled) std::shuffle(turns.begin(), turns.end(), machine->random);
  return turns;
}

// Where those are that the others wait for.
std::string Standstill(int threads) {
  std::string words = "waits forever";
  const Thread* other = nullptr;
  const Thread* waiting = nullptr;
  int left = 0;
  for (int t = 0; t < threads; ++t) {
    const Thread& thread = machine->threads[t];
    if (thread.state == State::kLeft) {
      ++left;
    } else if (waiting == nullptr) {
      waiting = &thread;
    } else if (other == nullptr && !Same(thread.site, waiting->site)) {
      other = &thread;
    }
  }
  absl::StrAppend(&words, waiting->state == State::kAtBarrier ? " at the barrier " : " in the collective ",
                  ToString(waiting->site));
  if (left > 0) absl::StrAppend(&words, "; ", left, " threads have left the kernel");
  if (other != nullptr) {
    absl::StrAppend(&words, "; thread ", other->running.thread, " waits at ", ToString(other->site));
  }
  return absl::StrCat(machine->kernel->name, ", block (", machine->block_x, ", ", machine->block_y, "), thread ",
                      waiting->running.thread, ": ", words);
}

void RunBlock(const Kernel& kernel, int64_t block) {
  const auto threads = static_cast<int>(kernel.shape.threads);
  machine->block_x = static_cast<int>(block % kernel.shape.grid_x);
  machine->block_y = static_cast<int>(block / kernel.shape.grid_x);
  machine->at_barrier = 0;
  for (int w = 0; w < threads / kWarp; ++w) machine->warps[w].arrived = 0;
  // It ends where the memory that was asked for ends.
  char* const end = machine->shared_memory.data() + machine->shared_memory.size() - kRedzone;
  char* const aligned_end = end - reinterpret_cast<uintptr_t>(end) % 16;
  machine->shared = aligned_end - (kernel.shape.shared_bytes + 15) / 16 * 16;
  std::memset(machine->shared, 0xff, kernel.shape.shared_bytes);
  char* const redzone = machine->shared + kernel.shape.shared_bytes;
  std::memset(redzone, kRedzoneByte, kRedzone);
  for (int t = 0; t < threads; ++t) {
    Thread& thread = machine->threads[t];
    thread.state = State::kReady;
    thread.running.block = block;
    thread.running.block_epoch = thread.running.warp_epoch = 0;
    thread.running.began = !kernel.overlaps;
    thread.running.shared = machine->shared;
    thread.running.shared_end = redzone;
    machine->fibers->Start(t, RunThread);
  }
  if (machine->observer != nullptr) machine->observer->OnBlock(machine->threads[0].running);
  for (int left = 0; left < threads;) {
    bool moved = false;
    for (const int64_t t : Turns(threads)) {
      Thread& thread = machine->threads[t];
      if (thread.state != State::kReady) continue;
      moved = true;
      Resume(static_cast<int>(t));
      if (!machine->violation.empty()) return;
      if (thread.state == State::kLeft) ++left;
    }
    if (!moved) {
      machine->violation = Standstill(threads);
      return;
    }
  }
  for (int64_t i = 0; i < kRedzone; ++i) {
    if (static_cast<unsigned char>(redzone[i]) == kRedzoneByte) continue;
    machine->violation = absl::StrCat(kernel.name, ", block (", machine->block_x, ", ", machine->block_y, "): wrote ",
                                      i, " bytes behind its ", kernel.shape.shared_bytes, " bytes of shared memory");
    return;
  }
}

float Meet(Collective kind, int argument, float value, Site site) {
  Thread& thread = *machine->current;
  const int first = thread.running.thread / kWarp * kWarp;
  const int lane = thread.running.thread % kWarp;
  Warp& warp = machine->warps[first / kWarp];
  if (warp.arrived == 0) {
    warp.kind = kind;
    warp.argument = argument;
    warp.site = site;
  } else if (warp.kind != kind || warp.argument != argument || !Same(warp.site, site)) {
    Forbidden("its warp is split: it comes to the collective ", site.file, ":", site.line,
              " while others of the warp wait in ", warp.site.file, ":", warp.site.line);
  }
  float(&values)[kWarp] = warp.values[warp.parity];
  values[lane] = value;
  if (++warp.arrived < kWarp) {
    thread.state = State::kInCollective;
    thread.site = site;
    machine->fibers->Suspend();
    return values[lane];
  }
  if (kind == Collective::kShuffle) {
    float from[kWarp];
    std::copy(values, values + kWarp, from);
    for (int l = 0; l < kWarp; ++l) values[l] = from[l ^ argument];
  }
  for (int mask = argument / 2; kind == Collective::kSum && mask > 0; mask /= 2) {
    float from[kWarp];
    std::copy(values, values + kWarp, from);
    for (int l = 0; l < kWarp; ++l) values[l] = from[l] + from[l ^ mask];
  }
  if (kind == Collective::kMmaBf16) MultiplyBf16(warp.mma, argument);
  if (kind == Collective::kMmaHalf) MultiplyHalf(warp.mma, argument);
  if (kind == Collective::kMmaInt8) MultiplyInt8(warp.mma);
  warp.arrived = 0;
  warp.parity ^= 1;
  for (int l = 0; l < kWarp; ++l) {
    machine->threads[first + l].state = State::kReady;
    // A shuffle carries a value; it is no promise about memory.
    if (kind == Collective::kSync) ++machine->threads[first + l].running.warp_epoch;
  }
  return values[lane];
}

absl::Status last_status;

int RunAtOnce(StreamHandle, Kernel kernel) {
  last_status = CheckShape(kernel.shape);
  if (!last_status.ok()) return 9;
  last_status = Run(kernel);
  return last_status.ok() ? 0 : 719;
}

Launcher the_launcher = RunAtOnce;

}  // namespace

int ThreadIndex() { return machine->current->running.thread; }
int BlockThreads() { return static_cast<int>(machine->kernel->shape.threads); }
int BlockIndexX() { return machine->block_x; }
int BlockIndexY() { return machine->block_y; }

void BeginKernel() { machine->current->running.began = true; }

void CheckPrefetch(const void* line) {
  if (line == nullptr) Forbidden("fetches nothing");
}

void SyncBlock(Site site) {
  Thread& thread = *machine->current;
  const auto threads = static_cast<int>(machine->kernel->shape.threads);
  if (machine->at_barrier == 0) {
    machine->barrier = site;
  } else if (!Same(machine->barrier, site)) {
    Forbidden("the block is split: it comes to the barrier ", site.file, ":", site.line, " while others wait at ",
              machine->barrier.file, ":", machine->barrier.line);
  }
  if (++machine->at_barrier < threads) {
    thread.state = State::kAtBarrier;
    thread.site = site;
    machine->fibers->Suspend();
    return;
  }
  machine->at_barrier = 0;
  for (int t = 0; t < threads; ++t) {
    machine->threads[t].state = State::kReady;
    ++machine->threads[t].running.block_epoch;
  }
}

void SyncWarp(Site site) { Meet(Collective::kSync, 0, 0.0f, site); }
float ShuffleXor(float value, int mask, Site site) { return Meet(Collective::kShuffle, mask, value, site); }
float WarpSum(float value, int width, Site site) { return Meet(Collective::kSum, width, value, site); }

void MmaBf16(float* c, const uint32_t* a, const uint32_t* b, int steps, Site site) {
  const int thread = machine->current->running.thread;
  machine->warps[thread / kWarp].mma.lanes[thread % kWarp] = {c, a, b};
  Meet(Collective::kMmaBf16, steps, 0.0f, site);
}

void MmaHalf(float* c, const uint32_t* a, const uint32_t* b, int steps, Site site) {
  const int thread = machine->current->running.thread;
  machine->warps[thread / kWarp].mma.lanes[thread % kWarp] = {c, a, b};
  Meet(Collective::kMmaHalf, steps, 0.0f, site);
}

void MmaInt8(int32_t* c, const uint32_t* a, const uint32_t* b, Site site) {
  const int thread = machine->current->running.thread;
  machine->warps[thread / kWarp].mma.lanes[thread % kWarp] = {c, a, b};
  Meet(Collective::kMmaInt8, 0, 0.0f, site);
}

void* BlockShared(size_t bytes) {
  if (bytes > machine->kernel->shape.shared_bytes) {
    Forbidden("takes ", bytes, " bytes of shared memory; the launch gave ", machine->kernel->shape.shared_bytes);
  }
  return machine->shared;
}

void AtomicAdd(uint64_t* to, uint64_t value, const void* caller) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(value) != 0) Forbidden("adds to a number that is not aligned");
  if (machine->observer != nullptr) machine->observer->OnAtomic(to, sizeof(value), caller);
  *to += value;
}

void CheckShift(int bits) {
  if (bits < 0 || bits >= 32) Forbidden("shifts a word by ", bits, " bits");
}

void Forbid(const char* what) { Forbidden(what); }

void CheckAccess(const void* address, int bytes, const char* does) {
  const Running& running = machine->current->running;
  if (reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(bytes) != 0) {
    Forbidden(does, bytes, " bytes at an address that is not aligned to ", bytes);
  }
  if (running.began || (address >= running.shared && address < running.shared_end)) return;
  Forbidden(does, bytes, " bytes before BeginKernel(), while the kernel before may still run");
}

void Read8(const void* from, void* to, const void* caller) {
  CheckAccess(from, 8, "reads ");
  if (machine->observer != nullptr) machine->observer->OnAccess(from, 8, false, caller);
  std::memcpy(to, from, 8);
}

void Read16(const void* from, void* to, const void* caller) {
  CheckAccess(from, 16, "reads ");
  if (machine->observer != nullptr) machine->observer->OnAccess(from, 16, false, caller);
  std::memcpy(to, from, 16);
}

void Write8(void* to, const void* from, const void* caller) {
  CheckAccess(to, 8, "writes ");
  if (machine->observer != nullptr) machine->observer->OnAccess(to, 8, true, caller);
  std::memcpy(to, from, 8);
}

void Write16(void* to, const void* from, const void* caller) {
  CheckAccess(to, 16, "writes ");
  if (machine->observer != nullptr) machine->observer->OnAccess(to, 16, true, caller);
  std::memcpy(to, from, 16);
}

void SetOrder(Order order, uint32_t seed) {
  absl::MutexLock lock(&machine->mu);
  machine->order = order;
  machine->random.seed(seed);
}

absl::Status CheckShape(const LaunchShape& shape) {
  const auto bad = [](auto... words) { return absl::InvalidArgumentError(absl::StrCat("launch of ", words...)); };
  if (shape.threads < 1 || shape.threads > kMaxThreads || shape.threads % kWarp != 0) {
    return bad(shape.threads, " threads a block, not whole warps of 32 up to ", kMaxThreads);
  }
  if (shape.grid_x < 1 || shape.grid_x > kMaxGridX) return bad(shape.grid_x, " blocks along x");
  if (shape.grid_y < 1 || shape.grid_y > kMaxGridY) {
    return bad(shape.grid_y, " blocks along y, where there are 1 to ", kMaxGridY);
  }
  if (shape.shared_bytes > kMaxShared) {
    return bad(shape.shared_bytes, " bytes of shared memory a block, more than ", kMaxShared);
  }
  return absl::OkStatus();
}

absl::Status Run(const Kernel& kernel) {
  absl::MutexLock lock(&machine->mu);
  MakeFibers();
  machine->kernel = &kernel;
  machine->violation.clear();
  if (machine->observer != nullptr) machine->observer->OnLaunch(kernel);
  for (const int64_t block : Turns(int64_t{kernel.shape.grid_x} * kernel.shape.grid_y)) {
    RunBlock(kernel, block);
    if (!machine->violation.empty()) break;
  }
  if (machine->observer != nullptr) machine->observer->OnEnd();
  machine->kernel = nullptr;
  if (machine->violation.empty()) return absl::OkStatus();
  return absl::InternalError(machine->violation);
}

int Submit(LaunchStream stream, const LaunchShape& shape, const char* name, Body body) {
  return the_launcher(stream.handle, {name, shape, std::move(body), stream.overlaps});
}

void SetLauncher(Launcher launcher) { the_launcher = launcher == nullptr ? RunAtOnce : launcher; }
const absl::Status& LastStatus() { return last_status; }

void SetObserver(Observer* observer) {
  absl::MutexLock lock(&machine->mu);
  machine->observer = observer;
}
Observer* CurrentObserver() { return machine->observer; }
const Running* CurrentThread() { return machine->current == nullptr ? nullptr : &machine->current->running; }

}  // namespace rwkv::kernels::cuda::emulation
