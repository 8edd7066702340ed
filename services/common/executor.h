// A few threads for calls that block or take long. Everything that may not block hands its work here.
#pragma once

#include <functional>
#include <thread>
#include <vector>

#include "absl/time/time.h"
#include "services/common/bounded_queue.h"

namespace rwkv::common {

// Thread-safe.
class Executor {
 public:
  Executor(int threads, size_t max_queued) : queue_(max_queued) {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { Run(); });
  }
  ~Executor() { Stop(); }
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  // False: the queue is full, or stopped; `work` is dropped.
  bool TryRun(std::function<void()> work) { return queue_.TryPush(std::move(work)); }

  // What is queued still runs; then the threads end. Not from one of them.
  void Stop() {
    queue_.Close();
    for (std::thread& thread : threads_) {
      if (thread.joinable()) thread.join();
    }
  }

 private:
  void Run() {
    std::function<void()> work;
    while (queue_.Pop(&work, absl::InfiniteFuture())) {
      work();
      work = nullptr;  // What it holds goes now, not with the next.
    }
  }

  BoundedQueue<std::function<void()>> queue_;
  std::vector<std::thread> threads_;
};

}  // namespace rwkv::common
