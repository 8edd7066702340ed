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
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "rwkv/v1/worker.pb.h"
#include "services/common/tracing/tracer.h"
#include "services/state_store/client/state_store_client.h"
#include "services/worker/engine/epoch.h"
#include "services/worker/engine/held_results.h"
#include "services/worker/engine/kept_states.h"
#include "services/worker/engine/own_steps.h"
#include "services/worker/engine/router_registry.h"
#include "services/worker/engine/sequence_spans.h"
#include "services/worker/engine/snapshot_transfer.h"
#include "services/worker/engine/stage_engine.h"
#include "services/worker/engine/worker_metrics.h"
#include "services/worker/link/link.h"

namespace rwkv::worker {

struct StageRunnerOptions {
  // Of states that several sequences begin with, see kept_states.h. 0: none.
  int64_t kept_state_bytes = 0;
  // How long a step may wait for its neighbours where rows go from device to device, whose own waits have no end.
  absl::Duration link_timeout = absl::Seconds(30);
  // The device or a library of its faulted or hangs, and nothing in this process can mend it. Called by the runner's
  // thread. Not set: the process ends with a message, for its supervisor to start it anew.
  std::function<void(const absl::Status& why)> on_device_lost;
  common::Tracer* tracer = nullptr;  // Null: nothing is traced. Outlives the runner.
};

// Runs epochs on the engine, one after the other. Thread-safe.
class StageRunner {
 public:
  // Null: this worker has none. Never of an address that a caller names: he could have states sent anywhere.
  using StoreFactory = std::function<std::shared_ptr<state_store::RecordsClient>()>;

  // All borrowed, to outlive the runner. The engine is the runner's thread's alone from here on.
  StageRunner(StageEngine* engine, LinkTransport* links, SnapshotTransfer* transfer, StoreFactory open_store,
              WorkerMetrics* metrics, const RouterRegistry* routers, StageRunnerOptions options);
  // Ends the epoch and joins the thread.
  ~StageRunner();

  // Begins an epoch. It takes over from an epoch of the same router, and from one of a router that is silent.
  //   kInvalidArgument: no router or epoch named. kFailedPrecondition: the stage plan does not fit these layers.
  //   kUnavailable: another router drives this worker (named), or it drains.
  absl::StatusOr<std::shared_ptr<Epoch>> Open(const v1::OpenEpoch& open, std::shared_ptr<EpochSink> sink)
      ABSL_LOCKS_EXCLUDED(mu_);

  // Whose epoch is open, or about to be; both empty: nobody's.
  struct Driver {
    std::string router;
    std::string epoch;
  };
  Driver driver() const ABSL_LOCKS_EXCLUDED(mu_);

  // No new epoch from now on. Waits for the router, which sees that, to take its turns away and end the epoch, half of
  // the time until `deadline`, and for snapshots that were begun to reach the store; then ends the epoch.
  void Drain(absl::Time deadline) ABSL_LOCKS_EXCLUDED(mu_);
  bool draining() const ABSL_LOCKS_EXCLUDED(mu_);

  // Waits until no epoch runs. False: one still does at `deadline`.
  bool WaitUntilIdle(absl::Time deadline) ABSL_LOCKS_EXCLUDED(mu_);

 private:
  struct BegunStep {
    uint64_t id = 0;  // As the router counts; 0: an own one.
    absl::Time begin;
    bool prefill = false;
    bool more = false;  // An own one, and its sequences go on.
    std::vector<int> traced_slots;
    // For the next stage, of an own one.
    v1::Step own_step;
    uint64_t commands_before = 0;
  };

  absl::Status CheckPlan(const v1::OpenEpoch& open) const;
  void Loop();
  void RunEpoch(const std::shared_ptr<Epoch>& epoch);
  // Both links, and the answer to the router between them.
  void OpenEpoch(Epoch& epoch);
  void CloseLinks(Epoch& epoch);
  // Where rows go from device to device: waits until what waits for them is done, or says why it never will be:
  // kUnavailable, a link broke or took too long, or the epoch has ended.
  absl::Status AwaitLinks(Epoch& epoch, absl::FunctionRef<bool()> done);
  // To the next stage's device, behind the step that was begun last.
  absl::Status SendFromDevice(Epoch& epoch);
  void LoseDevice(const absl::Status& why);
  void Attach(const std::shared_ptr<Epoch>& epoch, const v1::AttachSequence& attach);
  void FinishLoad(const std::shared_ptr<Epoch>& epoch, Epoch::Loaded loaded);
  // Steps are enqueued behind each other; the results of one are sent as soon as they are there, before anything else
  // begins, and at the latest when there is nothing else to do.
  // For one more. False: the epoch has ended.
  bool MakeRoom(const std::shared_ptr<Epoch>& epoch);
  void BeginStep(const std::shared_ptr<Epoch>& epoch, v1::Step step);
  // Of sequences that decode by themselves: the first stage's, and what a later one has to do for them.
  void BeginOwnStep(const std::shared_ptr<Epoch>& epoch);
  void FollowOwnStep(const std::shared_ptr<Epoch>& epoch);
  // They go along with a step of the router's, as far as there is room: the weights are read once for both. Of a
  // pipeline of one stage: later stages have the router's step from the router.
  void AddOwnEntries(v1::Step& step, BegunStep& begun);
  // The next frame of the stage before, when there is room for one more step. Null: the epoch has ended.
  LinkFrame* Receive(const std::shared_ptr<Epoch>& epoch);
  void EnqueueStep(const std::shared_ptr<Epoch>& epoch, uint64_t step_id, v1::Step step, LinkFrame* input);
  void GoOn(const std::shared_ptr<Epoch>& epoch, const v1::GoOn& go_on);
  static void SendResults(Epoch& epoch, HeldResults::Results results);
  static void SendStopped(Epoch& epoch, OwnSteps::Stopped stopped);
  // Ends the epoch if a link is broken. False: it has ended.
  bool CheckLink(Epoch& epoch, const absl::Status& link);
  void FinishStep(const std::shared_ptr<Epoch>& epoch);
  void Handle(const std::shared_ptr<Epoch>& epoch, Epoch::Work work);
  void Save(const std::shared_ptr<Epoch>& epoch, const v1::SaveSnapshot& save);
  // OK: the save will answer when it is done.
  absl::Status BeginSave(const std::shared_ptr<Epoch>& epoch, const v1::SaveSnapshot& save,
                         const std::shared_ptr<common::Span>& span);
  bool HasWork() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return stopping_ || pending_ != nullptr; }
  bool IsIdle() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return pending_ == nullptr && current_ == nullptr; }

  StageEngine* const engine_;
  LinkTransport* const links_;
  SnapshotTransfer* const transfer_;
  const StoreFactory open_store_;
  WorkerMetrics* const metrics_;
  const RouterRegistry* const routers_;
  const StageRunnerOptions options_;
  const std::shared_ptr<KeptStates> kept_;  // Jobs of the transfer may outlive the runner.

  // The thread's, of the epoch that runs.
  std::deque<BegunStep> begun_;  // Those that are pending.
  uint64_t router_steps_ = 0;    // Enqueued so far, of the router's
  uint64_t engine_steps_ = 0;    // and of all.
  OwnSteps own_steps_;
  HeldResults held_results_;  // Of several stages the last one's.
  SequenceSpans spans_;
  // After a step of the router's, unless all went along with it: neither keeps the other waiting.
  bool own_step_is_due_ = false;

  mutable absl::Mutex mu_;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  bool draining_ ABSL_GUARDED_BY(mu_) = false;
  std::shared_ptr<Epoch> current_ ABSL_GUARDED_BY(mu_);  // On the thread.
  std::shared_ptr<Epoch> pending_ ABSL_GUARDED_BY(mu_);  // Waits for the one before to leave the thread.
  std::thread thread_;
};

}  // namespace rwkv::worker
