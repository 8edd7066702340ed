// The threads around the core: its loop, the fleet, the store's executors. Whatever happens on any of them becomes an
// event of the loop; what the core asks of the world goes to them.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "services/common/clock.h"
#include "services/common/executor.h"
#include "services/router/core/router_metrics.h"
#include "services/router/core/serving_model.h"
#include "services/router/core/turn.h"
#include "services/router/core/turn_core.h"
#include "services/router/core/world.h"
#include "services/router/driver/event_loop.h"
#include "services/router/driver/turn_manager.h"
#include "services/router/pipeline/fleet.h"
#include "services/router/pipeline/found_workers.h"
#include "services/state_store/client/state_store_client.h"
#include "services/tokenizer/tokenizer.h"

namespace rwkv::router {

// Thread-safe.
class TurnManager::Driver final : public Fleet::Listener, private World {
 public:
  Driver(const Options& options, Fleet::Options fleet_options, std::unique_ptr<WorkerSource> workers,
         state_store::CatalogClient* catalog, std::vector<const tokenizer::Tokenizer*> tokenizers,
         RouterMetrics* metrics, common::Clock* clock, std::function<uint64_t()> random);
  ~Driver() override;

  const Options& options() const { return options_; }
  Fleet& fleet() { return fleet_; }
  const TurnCore& core() const { return core_; }
  uint64_t Random() override { return random_(); }
  absl::Time last_round() const { return loop_->last_round(); }
  // Of the last epoch that came up; null before the first.
  std::shared_ptr<const ServingModel> model() const ABSL_LOCKS_EXCLUDED(mu_);
  Models models() const ABSL_LOCKS_EXCLUDED(mu_);
  std::vector<LaneState> Lanes(absl::Time deadline);

  void Start() { fleet_.Start(); }
  void Stop() ABSL_LOCKS_EXCLUDED(mu_);
  void Drain(absl::Time deadline) ABSL_LOCKS_EXCLUDED(mu_);
  void Submit(const std::shared_ptr<Turn>& turn);
  void Cancel(CallId call);
  void Reject(Turn& turn, const absl::Status& status) { core_.Reject(turn, status); }

  // Fleet::Listener; the fleet's threads.
  void OnEpochUp(uint64_t epoch, const StagePlan& plan) override ABSL_LOCKS_EXCLUDED(mu_);
  void OnResponse(uint64_t epoch, int stage, v1::ExecuteResponse response) override;
  void OnEpochDown(uint64_t epoch, const absl::Status& why) override;
  void OnEpochClosing(uint64_t epoch) override;
  void OnModelsSeen(const std::vector<Fleet::SeenModel>& models) override ABSL_LOCKS_EXCLUDED(mu_);

 private:
  // World; the loop's thread, but for what world.h says.
  absl::Time Now() override { return clock_->Now(); }
  absl::Time CallClock() override { return absl::Now(); }
  void Post(std::function<void()> event) override { loop_->Post(std::move(event)); }
  bool Run(Queue queue, std::function<void()> work) override;
  bool Send(uint64_t epoch, const std::shared_ptr<const v1::ExecuteRequest>& command) override {
    return fleet_.Send(epoch, command);
  }
  void EndEpoch(uint64_t epoch, const absl::Status& why) override { fleet_.EndEpoch(epoch, why); }
  void SetLoad(uint64_t epoch, const LaneLoad& load) override { fleet_.SetLoad(epoch, load); }
  bool OthersDrive(const std::string& pool) override { return fleet_.OthersDrive(pool); }
  absl::Status WhyNoLane() override { return fleet_.state().status; }
  std::shared_ptr<const ServingModel> FindModel(const std::string& fingerprint) override ABSL_LOCKS_EXCLUDED(mu_);
  void SetServing(bool serving) override;
  void Drained() override ABSL_LOCKS_EXCLUDED(mu_);
  void PoolsDropped() override ABSL_LOCKS_EXCLUDED(mu_);

  // What other routers are told of this one, too.
  Fleet::Options WithAnnouncement(Fleet::Options options);
  ServingModel MakeModel(const v1::ModelInfo& info) const;

  const Options options_;
  const std::vector<const tokenizer::Tokenizer*> tokenizers_;
  common::Clock* const clock_;  // Not owned.
  const std::function<uint64_t()> random_;

  mutable absl::Mutex mu_;
  std::shared_ptr<const ServingModel> model_ ABSL_GUARDED_BY(mu_);
  Models models_ ABSL_GUARDED_BY(mu_);
  bool idle_ ABSL_GUARDED_BY(mu_) = false;  // Drained.
  bool stopped_ ABSL_GUARDED_BY(mu_) = false;

  // Destroyed in reverse: the core and its loop last of all that may post to them.
  TurnCore core_;
  std::unique_ptr<EventLoop> loop_;
  Fleet fleet_;
  common::Executor committer_;  // One commit at a time.
  common::Executor executor_;
  common::Executor snapshots_;
};

}  // namespace rwkv::router
