// States that many sequences begin with, in this worker's memory: who attaches from one asks no store. Each is a
// snapshot's records of this stage's layers, known by their id and checksums, so that it can be no other; the longest
// unused go when there are too many.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "rwkv/v1/state_store.pb.h"
#include "services/worker/engine/state_copy.h"
#include "services/worker/engine/worker_metrics.h"

namespace rwkv::worker {

// Thread-safe. What it gives out is only read from then on, and stays as long as somebody holds it.
class KeptStates {
 public:
  // `max_bytes` 0: keeps none. `metrics` outlives it.
  KeptStates(int64_t max_bytes, WorkerMetrics* metrics) : max_bytes_(max_bytes), metrics_(metrics) {}

  // `records` of one snapshot are what `state` holds, of `bytes` bytes.
  void Put(const std::vector<v1::RecordInfo>& records, std::shared_ptr<StateCopy> state, int64_t bytes)
      ABSL_LOCKS_EXCLUDED(mu_);
  // Null: it is not here.
  std::shared_ptr<StateCopy> Find(const std::vector<v1::RecordInfo>& records) ABSL_LOCKS_EXCLUDED(mu_);

 private:
  struct Kept {
    std::string key;
    std::shared_ptr<StateCopy> state;
    int64_t bytes = 0;
  };
  static std::string KeyOf(const std::vector<v1::RecordInfo>& records);

  const int64_t max_bytes_;
  WorkerMetrics* const metrics_;
  absl::Mutex mu_;
  std::list<Kept> kept_ ABSL_GUARDED_BY(mu_);  // Used last, first. Few: a scan is cheap beside a copy.
  int64_t bytes_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace rwkv::worker
