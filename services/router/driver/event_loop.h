// One event after the other: whoever runs them owns the scheduler and the turns as long. A thread of the loop's own
// does, for all that post, or the one that brings an event, when nobody else does.
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

  // After each batch of events, and at least every `tick`, calls `after_events` as one more.
  EventLoop(const Options& options, Event after_events);
  ~EventLoop();  // Stop().
  EventLoop(const EventLoop&) = delete;
  EventLoop& operator=(const EventLoop&) = delete;

  // New work from outside. False: too much of it waits already.
  bool TryPost(Event event) ABSL_LOCKS_EXCLUDED(mu_);

  // A consequence of work that was taken in: an answer, a cancel, a completion. Never refused, since each is one of few
  // per turn, and turns are bounded. Dropped after Stop().
  void Post(Event event) ABSL_LOCKS_EXCLUDED(mu_);

  // The same from a thread that may run events, so holds no lock that one may want: unless some are running, it runs
  // all that are queued before it returns, and no other thread has to wake up for them. An event may call it, too.
  void PostAndRun(Event event) ABSL_LOCKS_EXCLUDED(mu_);

  // When events were last looked for, which they are every `tick`.
  absl::Time last_round() const ABSL_LOCKS_EXCLUDED(mu_) {
    absl::MutexLock lock(&mu_);
    return last_round_;
  }

  // Runs what is queued and ends the thread. Not from an event.
  void Stop() ABSL_LOCKS_EXCLUDED(mu_);

 private:
  struct Queued {
    Event event;
    bool is_request = false;
  };

  void Run() ABSL_LOCKS_EXCLUDED(mu_);
  bool HasWork() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return !running_ && (stopping_ || !queue_.empty()); }
  // The caller runs what it returns, with RunBatch().
  std::vector<Queued> TakeBatch() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void RunBatch(std::vector<Queued> batch) ABSL_LOCKS_EXCLUDED(mu_);

  const Options options_;
  const Event after_events_;
  mutable absl::Mutex mu_;
  absl::Time last_round_ ABSL_GUARDED_BY(mu_) = absl::Now();
  std::vector<Queued> queue_ ABSL_GUARDED_BY(mu_);
  size_t requests_ ABSL_GUARDED_BY(mu_) = 0;
  bool running_ ABSL_GUARDED_BY(mu_) = false;  // By some thread.
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  std::thread thread_;
};

}  // namespace rwkv::router
