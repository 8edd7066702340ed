// Asks again and again whether something makes progress, and tells when the answer changes.
#pragma once

#include <functional>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace rwkv::common {

// Both functions are called on one thread of its own, until the destructor returns. `tell` hears the first "no", and
// every change from then on.
class Watchdog {
 public:
  Watchdog(absl::Duration interval, std::function<bool()> makes_progress, std::function<void(bool)> tell)
      : interval_(interval),
        makes_progress_(std::move(makes_progress)),
        tell_(std::move(tell)),
        thread_([this] { Run(); }) {}
  ~Watchdog() {
    {
      absl::MutexLock lock(&mu_);
      stopping_ = true;
    }
    thread_.join();
  }
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

 private:
  void Run() {
    bool told = true;
    while (true) {
      {
        absl::MutexLock lock(&mu_);
        if (mu_.AwaitWithTimeout(absl::Condition(&stopping_), interval_)) return;
      }
      const bool now = makes_progress_();
      if (now != told) tell_(now);
      told = now;
    }
  }

  const absl::Duration interval_;
  const std::function<bool()> makes_progress_;
  const std::function<void(bool)> tell_;
  absl::Mutex mu_;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  std::thread thread_;
};

}  // namespace rwkv::common
