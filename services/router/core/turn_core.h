// What the router decides: events go in by method calls, everything else goes out through World. No threads, no clock
// and no randomness of its own: equal events and equal answers of the world give equal calls to it. This is the door
// alone: it owns the parts, gives each event to the one whose it is, and sweeps. Each part has a header of its own;
// those further up in the list of members use those further down never.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "rwkv/v1/worker.pb.h"
#include "services/router/core/arrivals.h"
#include "services/router/core/attaching.h"
#include "services/router/core/client_streams.h"
#include "services/router/core/core_context.h"
#include "services/router/core/going_on.h"
#include "services/router/core/lane_commands.h"
#include "services/router/core/lane_keeper.h"
#include "services/router/core/load_gauges.h"
#include "services/router/core/placement.h"
#include "services/router/core/prefixes.h"
#include "services/router/core/router_metrics.h"
#include "services/router/core/saves.h"
#include "services/router/core/seating.h"
#include "services/router/core/session_table.h"
#include "services/router/core/step_results.h"
#include "services/router/core/turn.h"
#include "services/router/core/turn_commits.h"
#include "services/router/core/turn_ends.h"
#include "services/router/core/turn_opener.h"
#include "services/router/core/turn_options.h"
#include "services/router/core/turn_progress.h"
#include "services/router/core/turn_slots.h"
#include "services/router/core/turn_table.h"
#include "services/router/core/waiting_line.h"
#include "services/router/core/world.h"
#include "services/router/core/yields.h"
#include "services/router/pipeline/stage_plan.h"
#include "services/state_store/client/state_store_client.h"

namespace rwkv::router {

class TurnCore {
 public:
  using Options = TurnOptions;

  // All borrowed.
  TurnCore(const Options& options, World* world, state_store::CatalogClient* catalog, RouterMetrics* metrics);

  // Any thread.
  const Options& options() const { return context_.options; }
  TurnCounts counts() const { return gauges_.counts(); }
  bool draining() const { return context_.draining; }
  bool serving() const { return lane_keeper_.serving(); }
  absl::Status DrainingStatus() const { return context_.DrainingStatus(); }
  // From now on DrainingStatus() is why; what is begun is brought to its end by BeginDrain() or Stop().
  void SetDraining() { context_.draining = true; }
  void SetStopping() { context_.stopping = context_.draining = true; }
  // Tells the caller of a turn that never started. On any thread: nobody else has such a turn.
  void Reject(Turn& turn, const absl::Status& status) { streams_.Close(turn, status); }

  // Events, and all that follows: one thread at a time. After each event, or a few, Sweep() does what follows.
  void Arrive(const TurnPtr& turn) { arrivals_.Arrive(turn); }
  void Cancel(CallId call);
  void EpochUp(uint64_t epoch, const StagePlan& plan) { lane_keeper_.Up(epoch, plan); }
  void EpochDown(uint64_t epoch, const absl::Status& why) { lane_keeper_.Down(epoch, why); }
  void EpochClosing(uint64_t epoch) { lane_keeper_.Close(epoch); }
  void PoolsSeen(const std::vector<std::string>& pools) { lane_keeper_.PoolsSeen(pools); }
  void Handle(uint64_t epoch, int stage, const v1::ExecuteResponse& response);
  // Who still runs at `pause_at` is paused.
  void BeginDrain(absl::Time pause_at);
  // Every call ends.
  void Stop();
  // What each turn may do next follows from what it is, not from which event came last. Looks at those that something
  // happened to or whose time has come, so that it takes as long as there is to do, not as there are turns.
  void Sweep();
  // The next sweep looks at everything, and does what it would have done anyway: its plain twin.
  void Touch();
  std::vector<LaneState> Lanes() const { return lane_keeper_.Lanes(); }
  // Whether a model's fingerprint is of a pool that is there or may come back.
  bool KnowsModel(const std::string& fingerprint) const { return placement_.KnowsModel(fingerprint); }

 private:
  void SweepTurns();
  void SweepTurn(const TurnPtr& turn);
  // What depends on the turn looks at it, and when it is looked at again is settled.
  void Look(const TurnPtr& turn);
  // What those that run may do next depends on whether they may be saved.
  void WatchSaveRoom();
  void SweepDrain();

  CoreContext context_;
  TurnTable turns_;
  Placement placement_;
  SessionTable sessions_;
  WaitingLine line_;
  LoadGauges gauges_;
  ClientStreams streams_;
  Prefixes prefixes_;
  Saves saves_;
  GoingOn going_on_;
  TurnSlots slots_;
  TurnEnds ends_;
  Yields yields_;
  TurnCommits commits_;
  LaneKeeper lane_keeper_;
  LaneCommands commands_;
  StepResults results_;
  TurnProgress progress_;
  Attaching attaching_;
  Seating seating_;
  TurnOpener opener_;
  Arrivals arrivals_;
  bool had_save_room_ = false;
  absl::Time pause_at_ = absl::InfiniteFuture();  // Draining: who still runs then is paused.
};

}  // namespace rwkv::router
