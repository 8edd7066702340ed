// The one thread that enqueues on the device, and the epochs it runs.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "rwkv/v1/worker.pb.h"
#include "services/state_store/client/state_store_client.h"
#include "services/worker/engine/snapshot_transfer.h"
#include "services/worker/engine/stage_engine.h"
#include "services/worker/engine/worker_metrics.h"
#include "services/worker/link/link.h"

namespace rwkv::worker {

// Where an epoch's answers go: the Execute stream. Any thread may call it; calls after End() do nothing.
class EpochSink {
 public:
  virtual ~EpochSink() = default;
  // May block while the router does not read, until End().
  virtual void Send(v1::ExecuteResponse response) = 0;
  // A refused TryPush may be tried again.
  virtual void OnRoom() = 0;
  // The epoch is over. Once, with an error. Must not block.
  virtual void End(const absl::Status& why) = 0;
};

// One Execute stream's commands, from OpenEpoch on. Thread-safe.
class Epoch {
 public:
  static constexpr size_t kMaxCommands = 256;  // Waiting.

  Epoch(v1::OpenEpoch open, std::shared_ptr<EpochSink> sink, std::unique_ptr<LinkReceiver> receiver,
        std::unique_ptr<LinkSender> sender, std::shared_ptr<state_store::RecordsClient> store);

  const v1::OpenEpoch& open() const { return open_; }

  // Hands over the next command, or says no and leaves it: then the sink's OnRoom() will be called. True and dropped
  // when the epoch is over.
  bool TryPush(v1::ExecuteRequest& command) ABSL_LOCKS_EXCLUDED(mu_);

  // Ends the epoch; wakes the device's thread, both links and the sink. The first reason counts.
  void End(const absl::Status& why) ABSL_LOCKS_EXCLUDED(mu_);
  bool ended() const ABSL_LOCKS_EXCLUDED(mu_);

 private:
  friend class StageRunner;

  // A snapshot that came, or did not, for the device's thread.
  struct Loaded {
    int slot = 0;
    uint64_t sequence = 0;
    absl::StatusOr<std::shared_ptr<StateCopy>> state;
  };
  struct Work {
    bool is_loaded = false;
    Loaded loaded;
    v1::ExecuteRequest command;
  };

  // The next piece of work: loaded states before commands. False: the epoch is over, or there is none and `wait` is
  // false.
  bool Pop(bool wait, Work* work) ABSL_LOCKS_EXCLUDED(mu_);
  // From a loader. Waits until the device's thread has taken it, so that a loader holds at most one state.
  void PushLoaded(Loaded loaded) ABSL_LOCKS_EXCLUDED(mu_);
  bool HasWork() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return !end_.ok() || !loaded_.empty() || !commands_.empty();
  }

  const v1::OpenEpoch open_;
  const std::shared_ptr<EpochSink> sink_;
  const std::unique_ptr<LinkReceiver> receiver_;  // Null on the first stage.
  const std::unique_ptr<LinkSender> sender_;      // Null on the last.
  const std::shared_ptr<state_store::RecordsClient> store_;

  mutable absl::Mutex mu_;
  absl::Status end_ ABSL_GUARDED_BY(mu_);  // OK while it lives.
  bool wants_room_ ABSL_GUARDED_BY(mu_) = false;
  std::deque<v1::ExecuteRequest> commands_ ABSL_GUARDED_BY(mu_);
  std::deque<Loaded> loaded_ ABSL_GUARDED_BY(mu_);
};

// Runs epochs on the engine, one after the other. Thread-safe.
class StageRunner {
 public:
  using StoreFactory = std::function<std::shared_ptr<state_store::RecordsClient>(const std::string& address)>;

  // All borrowed, to outlive the runner. The engine is the runner's thread's alone from here on.
  StageRunner(StageEngine* engine, LinkTransport* links, SnapshotTransfer* transfer, StoreFactory open_store,
              WorkerMetrics* metrics);
  // Ends the epoch and joins the thread.
  ~StageRunner();

  // Begins an epoch. It takes over from an epoch of the same router.
  //   kInvalidArgument: no router or epoch named. kFailedPrecondition: the stage plan does not fit these layers.
  //   kUnavailable: another router drives this worker (named), or it drains.
  absl::StatusOr<std::shared_ptr<Epoch>> Open(const v1::OpenEpoch& open, std::shared_ptr<EpochSink> sink)
      ABSL_LOCKS_EXCLUDED(mu_);

  // No new epoch from now on. Lets snapshots that were begun reach the store, until `deadline`; then ends the epoch.
  void Drain(absl::Time deadline) ABSL_LOCKS_EXCLUDED(mu_);
  bool draining() const ABSL_LOCKS_EXCLUDED(mu_);

  // Waits until no epoch runs. False: one still does at `deadline`.
  bool WaitUntilIdle(absl::Time deadline) ABSL_LOCKS_EXCLUDED(mu_);

 private:
  absl::Status CheckPlan(const v1::OpenEpoch& open) const;
  void Loop();
  void RunEpoch(const std::shared_ptr<Epoch>& epoch);
  void Attach(const std::shared_ptr<Epoch>& epoch, const v1::AttachSequence& attach);
  void FinishLoad(const std::shared_ptr<Epoch>& epoch, Epoch::Loaded loaded);
  // Steps are enqueued behind each other; the results of one are sent as soon as they are there, before anything else
  // begins, and at the latest when there is nothing else to do.
  void BeginStep(const std::shared_ptr<Epoch>& epoch, v1::Step step);
  void FinishStep(const std::shared_ptr<Epoch>& epoch);
  void Handle(const std::shared_ptr<Epoch>& epoch, Epoch::Work work);
  void Save(const std::shared_ptr<Epoch>& epoch, const v1::SaveSnapshot& save);
  // OK: the save will answer when it is done.
  absl::Status BeginSave(const std::shared_ptr<Epoch>& epoch, const v1::SaveSnapshot& save);
  bool HasWork() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return stopping_ || pending_ != nullptr; }
  bool IsIdle() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return pending_ == nullptr && current_ == nullptr; }

  struct BegunStep {
    absl::Time begin;
    bool prefill = false;
  };

  StageEngine* const engine_;
  LinkTransport* const links_;
  SnapshotTransfer* const transfer_;
  const StoreFactory open_store_;
  WorkerMetrics* const metrics_;

  std::deque<BegunStep> begun_;  // Those that are pending. The thread's.

  mutable absl::Mutex mu_;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  bool draining_ ABSL_GUARDED_BY(mu_) = false;
  std::shared_ptr<Epoch> current_ ABSL_GUARDED_BY(mu_);  // On the thread.
  std::shared_ptr<Epoch> pending_ ABSL_GUARDED_BY(mu_);  // Waits for the one before to leave the thread.
  std::thread thread_;
};

}  // namespace rwkv::worker
