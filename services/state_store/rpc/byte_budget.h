// Bounds the memory that calls in progress take.
#pragma once

#include <cstdint>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"

namespace rwkv::state_store {

// Thread-safe. Outlives its shares.
class ByteBudget {
 public:
  explicit ByteBudget(int64_t bytes) : free_(bytes), bytes_(bytes) {}

  // Given back when it goes.
  class Share {
   public:
    Share(Share&& other) noexcept : budget_(std::exchange(other.budget_, nullptr)), bytes_(other.bytes_) {}
    Share& operator=(Share&&) = delete;
    ~Share() {
      if (budget_ != nullptr) budget_->Return(bytes_);
    }

   private:
    friend class ByteBudget;
    Share(ByteBudget* budget, int64_t bytes) : budget_(budget), bytes_(bytes) {}

    ByteBudget* budget_;
    int64_t bytes_;
  };

  // kResourceExhausted with RetryInfo at once, never a wait. One share larger than the whole budget never succeeds.
  absl::StatusOr<Share> Take(int64_t bytes, absl::string_view what) ABSL_LOCKS_EXCLUDED(mu_);

 private:
  void Return(int64_t bytes) ABSL_LOCKS_EXCLUDED(mu_);

  absl::Mutex mu_;
  int64_t free_ ABSL_GUARDED_BY(mu_);
  const int64_t bytes_;
};

}  // namespace rwkv::state_store
