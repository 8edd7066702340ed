#include "services/state_store/key_locks.h"

#include <algorithm>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace rwkv::state_store {

KeyLocks::Guard::Guard(KeyLocks* locks, std::vector<std::string> keys) : locks_(locks), keys_(std::move(keys)) {}

KeyLocks::Guard::Guard(Guard&& other) noexcept
    : locks_(std::exchange(other.locks_, nullptr)), keys_(std::move(other.keys_)) {}

KeyLocks::Guard::~Guard() {
  if (locks_ != nullptr) locks_->Unlock(keys_);
}

absl::StatusOr<KeyLocks::Guard> KeyLocks::Lock(std::vector<std::string> keys, absl::Duration timeout) {
  std::sort(keys.begin(), keys.end());
  keys.erase(std::unique(keys.begin(), keys.end()), keys.end());
  const auto is_held = [&](const std::string& key) ABSL_SHARED_LOCKS_REQUIRED(mu_) { return held_.contains(key); };
  const auto all_free = [&]()
                            ABSL_SHARED_LOCKS_REQUIRED(mu_) { return std::none_of(keys.begin(), keys.end(), is_held); };
  absl::MutexLock lock(&mu_);
  if (!mu_.AwaitWithTimeout(absl::Condition(&all_free), timeout)) {
    return absl::UnavailableError(absl::StrCat(*std::find_if(keys.begin(), keys.end(), is_held),
                                               " is busy with an earlier call for longer than ",
                                               absl::FormatDuration(timeout)));
  }
  held_.insert(keys.begin(), keys.end());
  return Guard(this, std::move(keys));
}

void KeyLocks::Unlock(const std::vector<std::string>& keys) {
  absl::MutexLock lock(&mu_);
  for (const std::string& key : keys) held_.erase(key);
}

}  // namespace rwkv::state_store
