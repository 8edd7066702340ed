// Threads that work behind a test's back, and waiting for what they do: all of it ends.
#pragma once

#include <atomic>
#include <functional>
#include <thread>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace rwkv::state_store {

// Waits until condition(); false: not within `limit`, which is less than a test of medium size has.
inline bool Eventually(absl::FunctionRef<bool()> condition, absl::Duration limit = absl::Minutes(2)) {
  const absl::Time end = absl::Now() + limit;
  while (!condition()) {
    if (absl::Now() > end) return false;
    std::this_thread::yield();
  }
  return true;
}

// Threads that go on until the test is through, however it ends. For the test's own thread.
class Background {
 public:
  Background() = default;
  Background(const Background&) = delete;
  Background& operator=(const Background&) = delete;
  ~Background() { End(); }

  // `body` returns soon once ending().
  void Run(std::function<void()> body) { threads_.emplace_back(std::move(body)); }
  bool ending() const { return ending_; }
  void End() {
    ending_ = true;
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }

 private:
  std::atomic<bool> ending_{false};
  std::vector<std::thread> threads_;
};

}  // namespace rwkv::state_store
