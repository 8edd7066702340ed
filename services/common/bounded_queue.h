// A first-in first-out queue with a bound, for handing work from many threads to many.
#pragma once

#include <cstddef>
#include <deque>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace rwkv::common {

// Thread-safe. All waits end at their deadline (absl::InfinitePast(): do not wait) or at Close(). Waiters must have
// left before the destructor runs.
template <typename T>
class BoundedQueue {
 public:
  // capacity >= 1, in items; 0 counts as 1.
  explicit BoundedQueue(size_t capacity) : capacity_(capacity == 0 ? 1 : capacity) {}
  BoundedQueue(const BoundedQueue&) = delete;
  BoundedQueue& operator=(const BoundedQueue&) = delete;

  // False: full or closed; then `item` is dropped.
  bool TryPush(T item) ABSL_LOCKS_EXCLUDED(mu_) { return Push(std::move(item), absl::InfinitePast()); }

  // Waits for room. False: still full at the deadline, or closed; then `item` is dropped.
  bool Push(T item, absl::Time deadline) ABSL_LOCKS_EXCLUDED(mu_) {
    absl::MutexLock lock(&mu_);
    mu_.AwaitWithDeadline(absl::Condition(this, &BoundedQueue::HasRoomOrClosed), deadline);
    if (closed_ || items_.size() >= capacity_) return false;
    items_.push_back(std::move(item));
    return true;
  }

  // Waits for an item. False: none at the deadline, or closed and empty; then *item is unchanged. What was pushed
  // before Close() still comes out.
  bool Pop(T* item, absl::Time deadline) ABSL_LOCKS_EXCLUDED(mu_) {
    absl::MutexLock lock(&mu_);
    mu_.AwaitWithDeadline(absl::Condition(this, &BoundedQueue::HasItemOrClosed), deadline);
    if (items_.empty()) return false;
    *item = std::move(items_.front());
    items_.pop_front();
    return true;
  }

  // Nothing more goes in, every waiter wakes up. May be called again.
  void Close() ABSL_LOCKS_EXCLUDED(mu_) {
    absl::MutexLock lock(&mu_);
    closed_ = true;
  }

 private:
  bool HasRoomOrClosed() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return closed_ || items_.size() < capacity_; }
  bool HasItemOrClosed() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return closed_ || !items_.empty(); }

  const size_t capacity_;
  absl::Mutex mu_;
  std::deque<T> items_ ABSL_GUARDED_BY(mu_);
  bool closed_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace rwkv::common
