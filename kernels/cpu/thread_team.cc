#include "kernels/cpu/thread_team.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <system_error>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "kernels/cpu/flush_subnormals.h"

namespace rwkv::kernels::cpu {
namespace {

// About as long as it takes to wake a sleeper, so waiting costs at most twice what the better choice would have.
constexpr std::chrono::microseconds kSpin(30);

constexpr int kNumberBits = 24;
constexpr int kPartBits = 20;
constexpr uint64_t kNumberMask = (uint64_t{1} << kNumberBits) - 1;  // They wrap around.
constexpr uint64_t kPartMask = (uint64_t{1} << kPartBits) - 1;

uint64_t Posted(uint64_t number, uint64_t parts) { return number << kPartBits | parts; }
uint64_t NumberOf(uint64_t posted) { return posted >> kPartBits; }
int64_t PartsOf(uint64_t posted) { return static_cast<int64_t>(posted & kPartMask); }

// Of a share.
uint64_t Left(uint64_t number, int64_t first, int64_t end) {
  return (number << kPartBits | static_cast<uint64_t>(first)) << kPartBits | static_cast<uint64_t>(end);
}
uint64_t NumberOfShare(uint64_t left) { return left >> 2 * kPartBits; }
int64_t First(uint64_t left) { return static_cast<int64_t>(left >> kPartBits & kPartMask); }
int64_t End(uint64_t left) { return static_cast<int64_t>(left & kPartMask); }

void Sleep(const std::atomic<uint32_t>& word, uint32_t while_value) {
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, while_value, nullptr, nullptr, 0);
}

void Wake(const std::atomic<uint32_t>& word, int count) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
}

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Whether condition() came true before the spin's time was over.
template <typename Condition>
bool Spin(Condition condition) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (condition()) return true;
      Pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

}  // namespace

absl::Status ThreadTeam::Check(int threads) {
  if (threads >= 1 && threads <= kMaxThreads) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("threads is ", threads, ", outside [1, ", kMaxThreads, "]"));
}

absl::StatusOr<std::unique_ptr<ThreadTeam>> ThreadTeam::Create(int threads) {
  RWKV_RETURN_IF_ERROR(Check(threads));
  std::unique_ptr<ThreadTeam> team(new ThreadTeam(threads));
  try {
    for (int thread = 1; thread < threads; ++thread) {
      team->helpers_.emplace_back([team = team.get(), thread] { team->Helper(thread); });
    }
  } catch (const std::system_error& error) {
    return absl::ResourceExhaustedError(
        absl::StrCat("no thread ", team->helpers_.size() + 1, " of ", threads, " for the stream: ", error.what()));
  }
  return team;
}

ThreadTeam::~ThreadTeam() {
  stopping_.store(true);
  wake_.fetch_add(1);
  Wake(wake_, threads_);
  for (std::thread& helper : helpers_) helper.join();
}

void ThreadTeam::RunErased(int64_t parts, Function function, const void* work) {
  const ScopedFlushSubnormals flush;
  if (threads_ == 1 || parts <= 1) {
    for (int64_t part = 0; part < parts; ++part) function(work, part, 0);
    return;
  }
  function_.store(function, std::memory_order_relaxed);
  work_.store(work, std::memory_order_relaxed);
  unfinished_.store(parts, std::memory_order_relaxed);
  const uint64_t number = (NumberOf(posted_.load(std::memory_order_relaxed)) + 1) & kNumberMask;
  const uint64_t operation = Posted(number, static_cast<uint64_t>(parts));
  posted_.store(operation);
  if (sleepers_.load() > 0) {
    wake_.fetch_add(1);
    Wake(wake_, static_cast<int>(std::min<int64_t>(parts - 1, threads_)));
  }
  ComputeParts(operation, 0);
  const auto done = [this] { return unfinished_.load() == 0; };
  if (Spin(done)) return;
  owner_sleeps_.store(true);
  for (uint32_t seen = finished_.load(); !done(); seen = finished_.load()) Sleep(finished_, seen);
  owner_sleeps_.store(false);
}

int64_t ThreadTeam::Claim(uint64_t operation, int share, bool from_front) {
  const uint64_t number = NumberOf(operation);
  std::atomic<uint64_t>& word = shares_[static_cast<size_t>(share)].left;
  uint64_t left = word.load();
  while (true) {
    int64_t first = First(left), end = End(left);
    if (NumberOfShare(left) != number) {
      if (NumberOfShare(left) != ((number - 1) & kNumberMask)) return -1;  // This thread is late, the operation over.
      first = PartsOf(operation) * share / threads_;
      end = PartsOf(operation) * (share + 1) / threads_;
    } else if (first == end) {
      return -1;
    }
    // Of a share without parts only the number is written: no share stays behind by more than an operation.
    const int64_t part = first == end ? -1 : from_front ? first++ : --end;
    if (word.compare_exchange_weak(left, Left(number, first, end))) return part;
  }
}

void ThreadTeam::ComputeParts(uint64_t operation, int thread) {
  for (int i = 0; i < threads_; ++i) {
    const int share = (thread + i) % threads_;
    for (int64_t part = Claim(operation, share, i == 0); part >= 0; part = Claim(operation, share, i == 0)) {
      function_.load(std::memory_order_relaxed)(work_.load(std::memory_order_relaxed), part, thread);
      if (unfinished_.fetch_sub(1) == 1 && owner_sleeps_.load()) {
        finished_.fetch_add(1);
        Wake(finished_, 1);
      }
    }
  }
}

void ThreadTeam::Helper(int thread) {
  const ScopedFlushSubnormals flush;
  uint64_t seen = 0;
  const auto work = [&] { return posted_.load() != seen || stopping_.load(std::memory_order_relaxed); };
  while (!stopping_.load()) {
    seen = posted_.load();
    ComputeParts(seen, thread);
    if (Spin(work)) continue;
    sleepers_.fetch_add(1);
    for (uint32_t woken = wake_.load(); !work(); woken = wake_.load()) Sleep(wake_, woken);
    sleepers_.fetch_sub(1);
  }
}

}  // namespace rwkv::kernels::cpu
