// One epoch over one pipeline of workers: an Execute stream to each stage, from the claim to the end.
#pragma once

#include <cstdint>
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
#include "services/common/bounded_queue.h"
#include "services/router/pipeline/stage_plan.h"
#include "services/worker/client/worker_client.h"

namespace rwkv::router {

// Hears of epochs. Calls come from the lanes' threads and from those of the streams (OnResponse, see
// ExecuteStream::Listen), must return soon, and may call Send and EndEpoch. For one epoch: first OnEpochUp, then
// OnResponse (concurrently from several stages, in order from each), then, with no OnResponse still running,
// OnEpochDown. Several epochs may be up at a time, each over workers of its own.
class LaneListener {
 public:
  virtual ~LaneListener() = default;
  virtual void OnEpochUp(uint64_t epoch, const StagePlan& plan) = 0;
  virtual void OnResponse(uint64_t epoch, int stage, v1::ExecuteResponse response) = 0;
  virtual void OnEpochDown(uint64_t epoch, const absl::Status& why) = 0;
};

// Thread-safe.
class Lane {
 public:
  struct Options {
    std::string router;                               // --name of this router.
    std::string incarnation;                          // Unique per start of this router: makes epochs unique.
    std::string state_store_address;                  // Told to the workers.
    absl::Duration open_timeout = absl::Seconds(10);  // From the first OpenEpoch to the last EpochOpened.
    size_t max_queued_commands = 4096;                // Per stage; beyond it the stage is taken for dead.
  };

  // `plan`, and the clients of its stages. `changed` is called when the epoch is up (OnEpochUp has returned) and when
  // all is over, from the lane's thread. Borrows `listener`. Nothing happens before Start().
  Lane(const Options& options, uint64_t epoch, StagePlan plan,
       std::vector<std::shared_ptr<worker::WorkerClient>> stages, LaneListener* listener,
       std::function<void()> changed);
  ~Lane();  // Ends it, and waits.
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  // Claims the stages one after the other, the last one first: each worker has one driver, so of two routers that want
  // the same ones somebody always gets through, and whoever is refused lets go of all.
  void Start();

  // Hands a command to every stage. Never blocks. Commands of one thread reach each stage in order. False: the epoch is
  // not up any more (or is ended now, because a stage takes no commands).
  bool Send(const std::shared_ptr<const v1::ExecuteRequest>& command) ABSL_LOCKS_EXCLUDED(mu_);

  // The first reason counts.
  void End(absl::Status why) ABSL_LOCKS_EXCLUDED(mu_);

  enum class Phase { kOpening, kUp, kOver };
  Phase phase() const ABSL_LOCKS_EXCLUDED(mu_);
  bool was_up() const ABSL_LOCKS_EXCLUDED(mu_);
  absl::Status why() const ABSL_LOCKS_EXCLUDED(mu_);  // Why it ends; OK while it lives.
  uint64_t epoch() const { return epoch_; }
  const StagePlan& plan() const { return plan_; }
  std::string name() const;  // Of the epoch, as the workers know it.

 private:
  using CommandQueue = common::BoundedQueue<std::shared_ptr<const v1::ExecuteRequest>>;

  struct Stage {
    std::shared_ptr<worker::WorkerClient> worker;
    std::unique_ptr<worker::ExecuteStream> stream;
    std::unique_ptr<CommandQueue> commands;
    std::thread writer;
    // Of what is heard.
    std::string label;
    bool opened = false;
    bool over = false;
  };

  void Run();
  void OpenStage(int stage) ABSL_LOCKS_EXCLUDED(mu_);
  void Hear(int stage, absl::StatusOr<v1::ExecuteResponse> response) ABSL_LOCKS_EXCLUDED(mu_);
  bool IsEnding() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return !end_.ok(); }

  const Options options_;
  const uint64_t epoch_;
  const StagePlan plan_;
  LaneListener* const listener_;
  const std::function<void()> changed_;
  std::vector<Stage> stages_;  // Run()'s, but for what Send() reads while it is up, and what Hear() has of each.

  mutable absl::Mutex mu_;
  Phase phase_ ABSL_GUARDED_BY(mu_) = Phase::kOpening;
  bool was_up_ ABSL_GUARDED_BY(mu_) = false;
  absl::Status end_ ABSL_GUARDED_BY(mu_);
  int opened_ ABSL_GUARDED_BY(mu_) = 0;  // Stages that said EpochOpened.

  std::thread thread_;
};

}  // namespace rwkv::router
