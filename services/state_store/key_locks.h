// Locks on names, of which many are taken at once: sessions, or snapshots.
#pragma once

#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace rwkv::state_store {

// Thread-safe. All keys of a call are taken in one step, so calls cannot deadlock among themselves, whatever their
// order; nothing is held while waiting. Memory is that of the keys held.
class KeyLocks {
 public:
  // Unlocks when it goes. Outlived by its KeyLocks.
  class Guard {
   public:
    Guard(Guard&& other) noexcept;
    Guard& operator=(Guard&&) = delete;
    ~Guard();

   private:
    friend class KeyLocks;
    Guard(KeyLocks* locks, std::vector<std::string> keys);

    KeyLocks* locks_;
    std::vector<std::string> keys_;
  };

  // Nobody should hold a key for longer than a write to the disk. kUnavailable: somebody held one all of `timeout`.
  absl::StatusOr<Guard> Lock(std::vector<std::string> keys, absl::Duration timeout = absl::Seconds(10))
      ABSL_LOCKS_EXCLUDED(mu_);

 private:
  void Unlock(const std::vector<std::string>& keys) ABSL_LOCKS_EXCLUDED(mu_);

  absl::Mutex mu_;
  absl::flat_hash_set<std::string> held_ ABSL_GUARDED_BY(mu_);
};

}  // namespace rwkv::state_store
