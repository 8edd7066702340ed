// The threads of one stream, which compute the parts of an operation side by side. Each has a share, parts that follow
// each other, and claims them one by one, because memory is read fastest where a thread goes on from where it was. Who
// is done claims from the ends of the others' shares, so a thread that the operating system has taken away holds up one
// part, not its share. Which thread computes what changes no bit, because no sum crosses parts (kernel_set.h).
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace rwkv::kernels::cpu {

// Owned by one thread at a time, which computes too; the others spin for a little after an operation, then sleep.
class ThreadTeam {
 public:
  static constexpr int64_t kMaxParts = (int64_t{1} << 20) - 1;
  static constexpr int kMaxThreads = 1024;

  // kInvalidArgument: not in [1, kMaxThreads].
  static absl::Status Check(int threads);

  // `threads` with the caller's. Errors of Check(); kResourceExhausted: the operating system gives no more threads.
  static absl::StatusOr<std::unique_ptr<ThreadTeam>> Create(int threads);
  ~ThreadTeam();

  int threads() const { return threads_; }

  // Calls work(part, thread) once for each of [0, parts), on any of the threads and in any order; returns when all are
  // done. `thread` in [0, threads). Allocates nothing. Results too small for a normal float become zero inside (a state
  // that fades away must not cost more than one that does not).
  template <typename Work>
  void Run(int64_t parts, const Work& work) {
    RunErased(
        parts, [](const void* w, int64_t part, int thread) { (*static_cast<const Work*>(w))(part, thread); }, &work);
  }

 private:
  using Function = void (*)(const void* work, int64_t part, int thread);

  // What is left of a thread's share of an operation, which it takes from the front and the others from the back: the
  // operation's number (24 bits), the first part left (20) and the end (20). Where the number is the one before nobody
  // has claimed yet; the owner leaves no operation before every share has its number.
  struct alignas(64) Share {
    std::atomic<uint64_t> left{0};
  };

  explicit ThreadTeam(int threads) : threads_(threads), shares_(static_cast<size_t>(threads)) {}

  void RunErased(int64_t parts, Function function, const void* work);
  // Claims and computes parts of the operation, a value of posted_, until none is left.
  void ComputeParts(uint64_t operation, int thread);
  // One of `share`; -1 if none is left.
  int64_t Claim(uint64_t operation, int share, bool from_front);
  void Helper(int thread);

  const int threads_;
  std::vector<Share> shares_;
  std::vector<std::thread> helpers_;

  alignas(64) std::atomic<uint64_t> posted_{0};  // The operation's number (24 bits) and its parts (20).
  std::atomic<Function> function_{nullptr};      // These two hold while a part of their operation is unfinished.
  std::atomic<const void*> work_{nullptr};
  alignas(64) std::atomic<int64_t> unfinished_{0};
  alignas(64) std::atomic<uint32_t> wake_{0};  // Goes up when sleepers are to look again.
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stopping_{false};
  alignas(64) std::atomic<uint32_t> finished_{0};  // As wake_, for the owner.
  std::atomic<bool> owner_sleeps_{false};
};

}  // namespace rwkv::kernels::cpu
