// Moves states between this worker and the state store, on threads of its own, so that no step waits for the store.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <list>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "rwkv/v1/state_store.pb.h"
#include "services/common/tracing/trace_context.h"
#include "services/state_store/client/state_store_client.h"
#include "services/worker/engine/worker_metrics.h"

namespace rwkv::worker {

// Thread-safe. Jobs of one kind start in order; answers come in any order. Each job has a thread, and who has none
// helps with the calls of those that run. It outlives epochs: what an ended epoch left behind is dropped before it
// starts (`wanted`), and finishes in its own time if it runs.
class SnapshotTransfer {
 public:
  struct Options {
    int load_threads = 4;
    int save_threads = 4;
    int max_waiting_loads = 1024;
    int64_t max_save_bytes = int64_t{256} << 20;  // Copies that wait or travel. One snapshot always fits.
    // Records of a job go in one call up to so many bytes. A call takes both processes about as long as 0.5 MB do; what
    // comes is copied while the next is written or read.
    size_t first_save_call_bytes = size_t{1} << 20;  // So that the disk begins soon.
    size_t save_call_bytes = size_t{2} << 20;
    size_t load_call_bytes = size_t{2} << 20;
    size_t min_load_call_bytes = size_t{512} << 10;  // A small state is shared out among the threads down to so many.
    absl::Duration call_timeout = absl::Seconds(10);
  };

  struct LoadJob {
    std::shared_ptr<state_store::RecordsClient> store;
    std::vector<v1::RecordInfo> records;
    common::TraceContext trace;  // That its calls to the store are part of; not valid: none.
    // Where each record goes, RecordInfo.bytes long: memory that lives as long as this function. Called once, from a
    // loader thread, before the first is asked for, unless the job is no longer wanted.
    std::function<absl::StatusOr<std::vector<absl::Span<char>>>()> room;
    std::function<bool()> wanted;
    // Called once, from a loader thread, unless the job is no longer wanted. May block, which bounds the states in
    // memory. kDataLoss: a record is missing or corrupt. kUnavailable, kDeadlineExceeded: the store cannot be reached.
    // An error of `room` comes as it is.
    std::function<void(absl::Status)> done;
  };

  struct SaveJob {
    std::shared_ptr<state_store::RecordsClient> store;
    std::string snapshot_id;
    int first_layer = 0;
    int64_t bytes = 0;           // Of all records.
    common::TraceContext trace;  // As LoadJob has it.
    // One record per layer, of memory that lives as long as this function, once they are there and checked. Called
    // once, from a saver thread, unless the job is no longer wanted.
    std::function<absl::StatusOr<std::vector<absl::Span<const char>>>()> records;
    std::shared_ptr<const void> owner;  // Of that memory. Null: it is copied (RecordsClient::PutRecord).
    std::function<bool()> wanted;
    // Called once, from a saver thread, unless the job is no longer wanted. An error of `records` comes as it is.
    std::function<void(absl::StatusOr<std::vector<v1::RecordInfo>>)> done;
  };

  SnapshotTransfer(const Options& options, WorkerMetrics* metrics);
  // Drops what waits and joins the threads; what travels ends within call_timeout.
  ~SnapshotTransfer();

  // All return at once. kResourceExhausted: too much is waiting; `done` is not called then.
  absl::Status Load(LoadJob job);
  absl::Status Save(SaveJob job);
  // What Save() would say of a job of this size now.
  absl::Status CheckRoom(const std::string& snapshot_id, int64_t bytes) ABSL_LOCKS_EXCLUDED(mu_);

  // Waits until no save waits or travels. False: not until `deadline`.
  bool WaitUntilSaved(absl::Time deadline);

 private:
  struct TimedLoad {
    LoadJob job;
    absl::Time begin;
  };
  struct TimedSave {
    SaveJob job;
    absl::Time begin;
  };

  // The calls of a job that runs, on the stack of its thread.
  struct Batch {
    size_t count = 0;
    absl::FunctionRef<absl::Status(size_t)> run;
    size_t next = 0;  // The first that nobody has taken.
    int working = 0;  // Threads at one of them.
    absl::Status status;
    bool HasWork() const { return status.ok() && next < count; }
  };
  using Batches = std::list<Batch*>;

  void LoadLoop();
  void SaveLoop();
  absl::Status RunLoad(const LoadJob& job);
  absl::StatusOr<std::vector<v1::RecordInfo>> RunSave(const SaveJob& job);
  // run(0) .. run(count - 1), with the help of others; the first error, after which none is begun.
  absl::Status RunAll(Batches SnapshotTransfer::*batches, size_t count, absl::FunctionRef<absl::Status(size_t)> run)
      ABSL_LOCKS_EXCLUDED(mu_);
  // Works at what is left of the oldest batch. False: nothing is.
  bool Help(Batches& batches) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void WorkAt(Batch& batch) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  static bool HasWork(const Batches& batches);
  absl::Status CheckRoomLocked(const std::string& snapshot_id, int64_t bytes) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool HasLoad() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return stopping_ || !loads_.empty() || HasWork(loading_); }
  bool HasSave() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return stopping_ || !saves_.empty() || HasWork(storing_); }
  bool NothingToSave() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return saves_.empty() && saving_ == 0; }

  const Options options_;
  WorkerMetrics* const metrics_;  // Not owned.
  absl::Mutex mu_;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  std::deque<TimedLoad> loads_ ABSL_GUARDED_BY(mu_);
  std::deque<TimedSave> saves_ ABSL_GUARDED_BY(mu_);
  Batches loading_ ABSL_GUARDED_BY(mu_);
  Batches storing_ ABSL_GUARDED_BY(mu_);
  int saving_ ABSL_GUARDED_BY(mu_) = 0;
  int64_t save_bytes_ ABSL_GUARDED_BY(mu_) = 0;
  std::vector<std::thread> threads_;
};

}  // namespace rwkv::worker
