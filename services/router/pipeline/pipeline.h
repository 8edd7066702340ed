// The router's hold on one pipeline of workers: finds out which worker is which stage, keeps one Execute stream open to
// each, and when any of them breaks, ends the epoch and opens the next one as soon as all stages answer again.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "rwkv/v1/worker.pb.h"
#include "services/common/bounded_queue.h"
#include "services/router/pipeline/stage_plan.h"
#include "services/worker/client/worker_client.h"

namespace rwkv::router {

// Thread-safe.
class Pipeline {
 public:
  struct Options {
    std::string router;               // --name of this router.
    std::string incarnation;          // Unique per start of this router: makes epochs unique.
    std::string state_store_address;  // Told to the workers.
    absl::Duration describe_timeout = absl::Seconds(2);
    absl::Duration open_timeout = absl::Seconds(10);  // From the first OpenEpoch to the last EpochOpened.
    absl::Duration min_backoff = absl::Milliseconds(20);
    absl::Duration max_backoff = absl::Seconds(1);
    size_t max_queued_commands = 4096;  // Per stage; beyond it the stage is taken for dead.
  };

  // Hears of epochs. Calls come from the pipeline's threads, must return soon, and may call Send and EndEpoch. For one
  // epoch: first OnEpochUp, then OnResponse (concurrently from several stages, in order from each), then, with no
  // OnResponse still running, OnEpochDown.
  class Listener {
   public:
    virtual ~Listener() = default;
    virtual void OnEpochUp(uint64_t epoch, const StagePlan& plan) = 0;
    virtual void OnResponse(uint64_t epoch, int stage, v1::ExecuteResponse response) = 0;
    virtual void OnEpochDown(uint64_t epoch, const absl::Status& why) = 0;
  };

  struct State {
    bool serving = false;
    absl::Status status;                  // Why not serving.
    std::string text;                     // "serving", or "connecting: ..." as Cluster.GetStatus shows it.
    absl::optional<v1::ModelInfo> model;  // Of the last epoch; unset before the first.
  };

  struct WorkerStatus {
    std::string address;
    absl::Status status;          // Of the Describe just made.
    v1::DescribeResponse worker;  // The last one that succeeded; default if none did.
    int stage_index = -1;         // In the last plan; -1 if there was none.
    int stage_count = 0;
  };

  // `listener` outlives it. Nothing happens before Start().
  Pipeline(Options options, std::vector<std::unique_ptr<worker::WorkerClient>> workers, Listener* listener);
  ~Pipeline();  // Stop().
  Pipeline(const Pipeline&) = delete;
  Pipeline& operator=(const Pipeline&) = delete;

  void Start() ABSL_LOCKS_EXCLUDED(mu_);
  // Ends the epoch and waits for all threads; the listener hears OnEpochDown if it heard OnEpochUp.
  void Stop() ABSL_LOCKS_EXCLUDED(mu_);

  // Hands a command to every stage. Never blocks. Commands of one thread reach each stage in order. False: the epoch is
  // over (or is ended now, because a stage takes no commands).
  bool Send(uint64_t epoch, std::shared_ptr<const v1::ExecuteRequest> command) ABSL_LOCKS_EXCLUDED(mu_);

  // Ends the epoch, if it is still this one.
  void EndEpoch(uint64_t epoch, absl::Status why) ABSL_LOCKS_EXCLUDED(mu_);

  State state() const ABSL_LOCKS_EXCLUDED(mu_);

  // Asks every worker, in parallel, who it is. Blocks until `deadline` at most.
  std::vector<WorkerStatus> Probe(absl::Time deadline) ABSL_LOCKS_EXCLUDED(mu_);

 private:
  using CommandQueue = common::BoundedQueue<std::shared_ptr<const v1::ExecuteRequest>>;

  // One stage's stream during one epoch.
  struct StageStream {
    std::unique_ptr<worker::ExecuteStream> stream;
    std::unique_ptr<CommandQueue> commands;
    std::thread reader;
    std::thread writer;
  };

  void Run();
  absl::StatusOr<StagePlan> Connect() ABSL_LOCKS_EXCLUDED(mu_);
  // Opens an epoch and returns why it ended.
  absl::Status RunEpoch(uint64_t epoch, const StagePlan& plan) ABSL_LOCKS_EXCLUDED(mu_);
  void ReadStage(uint64_t epoch, int stage, const std::string& label, worker::ExecuteStream* stream)
      ABSL_LOCKS_EXCLUDED(mu_);
  std::vector<absl::StatusOr<v1::DescribeResponse>> DescribeAll(absl::Time deadline);
  bool EpochOverOrStopping() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return !end_.ok() || stopping_; }
  bool OpenedOrOver() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return opened_ == static_cast<int>(streams_.size()) || EpochOverOrStopping();
  }

  const Options options_;
  const std::vector<std::unique_ptr<worker::WorkerClient>> workers_;
  Listener* const listener_;  // Not owned.

  mutable absl::Mutex mu_;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  uint64_t epoch_ ABSL_GUARDED_BY(mu_) = 0;                // The last one begun: 1, 2, 3, ...
  absl::Status end_ ABSL_GUARDED_BY(mu_);                  // Why the epoch ends; OK while it lives.
  int opened_ ABSL_GUARDED_BY(mu_) = 0;                    // Stages that said EpochOpened.
  std::vector<StageStream> streams_ ABSL_GUARDED_BY(mu_);  // Of the epoch; empty between two.
  State state_ ABSL_GUARDED_BY(mu_);
  std::vector<WorkerStatus> known_ ABSL_GUARDED_BY(mu_);  // One per worker.

  std::thread thread_;  // Run().
};

}  // namespace rwkv::router
