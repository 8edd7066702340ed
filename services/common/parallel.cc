#include "services/common/parallel.h"

#include <algorithm>
#include <system_error>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace rwkv::common {
namespace {

class Jobs {
 public:
  Jobs(size_t count, absl::FunctionRef<absl::Status(size_t)> job, absl::FunctionRef<void(size_t)> on_done)
      : count_(count), job_(job), on_done_(on_done) {}

  // Takes one job after the other until there is none, or one has failed.
  void Work() ABSL_LOCKS_EXCLUDED(mutex_) {
    for (;;) {
      size_t index = 0;
      {
        absl::MutexLock lock(&mutex_);
        if (next_ == count_ || !status_.ok()) return;
        index = next_++;
      }
      absl::Status status = job_(index);
      absl::MutexLock lock(&mutex_);
      if (status.ok()) {
        on_done_(++done_);
      } else if (status_.ok() || index < failed_) {
        status_ = std::move(status);
        failed_ = index;
      }
    }
  }

  absl::Status status() const ABSL_LOCKS_EXCLUDED(mutex_) {
    absl::MutexLock lock(&mutex_);
    return status_;
  }

 private:
  const size_t count_;
  const absl::FunctionRef<absl::Status(size_t)> job_;
  const absl::FunctionRef<void(size_t)> on_done_;
  mutable absl::Mutex mutex_;
  size_t next_ ABSL_GUARDED_BY(mutex_) = 0;
  size_t done_ ABSL_GUARDED_BY(mutex_) = 0;
  size_t failed_ ABSL_GUARDED_BY(mutex_) = 0;  // Whose error status_ is.
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

absl::Status RunInParallel(size_t count, size_t at_once, absl::FunctionRef<absl::Status(size_t)> job,
                           absl::FunctionRef<void(size_t)> on_done) {
  Jobs jobs(count, job, on_done);
  std::vector<std::thread> threads;
  try {
    for (size_t i = 1; i < std::min(count, at_once); ++i) threads.emplace_back([&jobs] { jobs.Work(); });
  } catch (const std::system_error&) {  // No more threads: those that there are do all.
  }
  jobs.Work();
  for (std::thread& thread : threads) thread.join();
  return jobs.status();
}

}  // namespace rwkv::common
