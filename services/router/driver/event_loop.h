// The one thread that owns the scheduler and the turns. Others post to it.
#pragma once

#include <deque>
#include <functional>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace rwkv::router {

// Thread-safe.
class EventLoop {
 public:
  using Event = std::function<void()>;

  struct Options {
    size_t max_requests = 1024;  // Queued by TryPost.
    absl::Duration tick = absl::Milliseconds(20);
  };

  // After each batch of events, and at least every `tick`, calls `after_events` on the loop's thread.
  EventLoop(const Options& options, Event after_events);
  ~EventLoop();  // Stop().
  EventLoop(const EventLoop&) = delete;
  EventLoop& operator=(const EventLoop&) = delete;

  // New work from outside. False: too much of it waits already.
  bool TryPost(Event event) ABSL_LOCKS_EXCLUDED(mu_);

  // A consequence of work that was taken in: an answer, a cancel, a completion. Never refused, since each is one of few
  // per turn, and turns are bounded. Dropped after Stop().
  void Post(Event event) ABSL_LOCKS_EXCLUDED(mu_);

  // When the thread last came round, which it does every `tick`.
  absl::Time last_round() const ABSL_LOCKS_EXCLUDED(mu_) {
    absl::MutexLock lock(&mu_);
    return last_round_;
  }

  // Runs what is queued and ends the thread. Not from the loop's thread.
  void Stop() ABSL_LOCKS_EXCLUDED(mu_);

 private:
  struct Queued {
    Event event;
    bool is_request = false;
  };

  void Run();
  bool HasWork() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return stopping_ || !queue_.empty(); }

  const Options options_;
  const Event after_events_;
  mutable absl::Mutex mu_;
  absl::Time last_round_ ABSL_GUARDED_BY(mu_) = absl::Now();
  std::vector<Queued> queue_ ABSL_GUARDED_BY(mu_);
  size_t requests_ ABSL_GUARDED_BY(mu_) = 0;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  std::thread thread_;
};

}  // namespace rwkv::router
