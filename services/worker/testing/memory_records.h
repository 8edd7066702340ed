// A record store in memory that tests can hold up, empty and spoil. (services/state_store/client has the whole fake
// store.)
#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "gtest/gtest.h"
#include "rwkv/v1/state_store.pb.h"
#include "services/state_store/client/state_store_client.h"

namespace rwkv::worker {

// Thread-safe.
class MemoryRecords final : public state_store::RecordsClient {
 public:
  absl::Status PutRecords(absl::Span<const v1::RecordInfo> infos, absl::Span<const absl::Span<const char>> data, size_t,
                          const std::shared_ptr<const void>& owner, absl::Time deadline) override {
    absl::MutexLock lock(&mu_);
    ++calls_;
    if (absl::Status status = Gate(deadline); !status.ok()) return status;
    for (size_t i = 0; i < infos.size(); ++i) {
      records_[{infos[i].snapshot_id(), infos[i].layer()}] = std::string(data[i].data(), data[i].size());
    }
    return absl::OkStatus();
  }

  absl::Status ReadRecords(absl::Span<const v1::RecordInfo> infos, absl::Span<const absl::Span<char>> to,
                           absl::Time deadline) override {
    absl::MutexLock lock(&mu_);
    ++calls_;
    if (absl::Status status = Gate(deadline); !status.ok()) return status;
    for (size_t i = 0; i < infos.size(); ++i) {
      const auto it = records_.find({infos[i].snapshot_id(), infos[i].layer()});
      if (it == records_.end()) return absl::NotFoundError("no such record");
      if (it->second.size() != to[i].size()) return absl::DataLossError("the record has another length");
      std::copy(it->second.begin(), it->second.end(), to[i].begin());
    }
    return absl::OkStatus();
  }

  // From now on calls wait until Open(), or fail with their deadline.
  void Close() {
    absl::MutexLock lock(&mu_);
    open_ = false;
  }
  void Open() {
    absl::MutexLock lock(&mu_);
    open_ = true;
  }
  void FailWith(absl::Status status) {
    absl::MutexLock lock(&mu_);
    fail_ = std::move(status);
  }
  void Drop(const std::string& snapshot_id, int layer) {
    absl::MutexLock lock(&mu_);
    records_.erase({snapshot_id, layer});
  }
  // Waits until `count` calls are held up.
  void WaitForWaiting(int count) {
    absl::MutexLock lock(&mu_);
    const auto reached = [this, count]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return waiting_ >= count; };
    if (mu_.AwaitWithTimeout(absl::Condition(&reached), absl::Seconds(60))) return;
    ADD_FAILURE() << waiting_ << " calls are held up after a minute, not " << count;
  }
  size_t size() {
    absl::MutexLock lock(&mu_);
    return records_.size();
  }
  int calls() {
    absl::MutexLock lock(&mu_);
    return calls_;
  }

 private:
  absl::Status Gate(absl::Time deadline) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    ++waiting_;
    const bool open = mu_.AwaitWithDeadline(absl::Condition(&open_), deadline);
    --waiting_;
    if (!open) return absl::DeadlineExceededError("the store is held up");
    return fail_;
  }

  absl::Mutex mu_;
  bool open_ ABSL_GUARDED_BY(mu_) = true;
  int waiting_ ABSL_GUARDED_BY(mu_) = 0;
  int calls_ ABSL_GUARDED_BY(mu_) = 0;
  absl::Status fail_ ABSL_GUARDED_BY(mu_);
  std::map<std::pair<std::string, int>, std::string> records_ ABSL_GUARDED_BY(mu_);
};

}  // namespace rwkv::worker
