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

constexpr int kPartBits = 20;
constexpr uint64_t kPartMask = (uint64_t{1} << kPartBits) - 1;

uint64_t NextPart(uint64_t claims) { return claims & kPartMask; }
uint64_t Parts(uint64_t claims) { return claims >> kPartBits & kPartMask; }
uint64_t Operation(uint64_t claims) { return claims >> 2 * kPartBits; }

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
  const uint64_t operation = Operation(claims_.load(std::memory_order_relaxed)) + 1;
  claims_.store(operation << 2 * kPartBits | static_cast<uint64_t>(parts) << kPartBits);
  if (sleepers_.load() > 0) {
    wake_.fetch_add(1);
    Wake(wake_, static_cast<int>(std::min<int64_t>(parts - 1, threads_)));
  }
  ComputeParts(0);
  const auto done = [this] { return unfinished_.load() == 0; };
  if (Spin(done)) return;
  owner_sleeps_.store(true);
  for (uint32_t seen = finished_.load(); !done(); seen = finished_.load()) Sleep(finished_, seen);
  owner_sleeps_.store(false);
}

void ThreadTeam::ComputeParts(int thread) {
  uint64_t claims = claims_.load();
  while (NextPart(claims) < Parts(claims)) {
    if (!claims_.compare_exchange_weak(claims, claims + 1)) continue;
    function_.load(std::memory_order_relaxed)(work_.load(std::memory_order_relaxed),
                                              static_cast<int64_t>(NextPart(claims)), thread);
    if (unfinished_.fetch_sub(1) == 1 && owner_sleeps_.load()) {
      finished_.fetch_add(1);
      Wake(finished_, 1);
    }
    claims = claims_.load();
  }
}

void ThreadTeam::Helper(int thread) {
  const ScopedFlushSubnormals flush;
  const auto work = [this] {
    const uint64_t claims = claims_.load();
    return NextPart(claims) < Parts(claims) || stopping_.load(std::memory_order_relaxed);
  };
  while (!stopping_.load()) {
    ComputeParts(thread);
    if (Spin(work)) continue;
    sleepers_.fetch_add(1);
    for (uint32_t seen = wake_.load(); !work(); seen = wake_.load()) Sleep(wake_, seen);
    sleepers_.fetch_sub(1);
  }
}

}  // namespace rwkv::kernels::cpu
