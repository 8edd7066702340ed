#include "services/worker/engine/kept_states.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace rwkv::worker {

std::string KeptStates::KeyOf(const std::vector<v1::RecordInfo>& records) {
  std::string key = records.empty() ? std::string() : records.front().snapshot_id();
  for (const v1::RecordInfo& info : records) {
    absl::StrAppend(&key, "/", info.layer(), ":", info.bytes(), ":", info.crc32c());
  }
  return key;
}

void KeptStates::Put(const std::vector<v1::RecordInfo>& records, std::shared_ptr<StateCopy> state, int64_t bytes) {
  if (bytes > max_bytes_ || records.empty()) return;
  std::list<Kept> evicted;  // Their memory goes back after the lock.
  absl::MutexLock lock(&mu_);
  std::string key = KeyOf(records);
  const auto same = [&key](const Kept& kept) { return kept.key == key; };
  if (std::any_of(kept_.begin(), kept_.end(), same)) return;
  while (bytes_ + bytes > max_bytes_) {
    bytes_ -= kept_.back().bytes;
    evicted.splice(evicted.end(), kept_, std::prev(kept_.end()));
  }
  kept_.push_front({std::move(key), std::move(state), bytes});
  bytes_ += bytes;
  metrics_->kept_state_bytes.Set(static_cast<double>(bytes_));
}

std::shared_ptr<StateCopy> KeptStates::Find(const std::vector<v1::RecordInfo>& records) {
  const std::string key = KeyOf(records);
  absl::MutexLock lock(&mu_);
  const auto it = std::find_if(kept_.begin(), kept_.end(), [&key](const Kept& kept) { return kept.key == key; });
  (it != kept_.end() ? metrics_->kept_state_hits : metrics_->kept_state_misses).Increment();
  if (it == kept_.end()) return nullptr;
  kept_.splice(kept_.begin(), kept_, it);
  return kept_.front().state;
}

}  // namespace rwkv::worker
