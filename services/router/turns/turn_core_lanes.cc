// Lanes come and go.
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "services/common/grpc_status.h"
#include "services/common/logging.h"
#include "services/router/turns/turn_core.h"

namespace rwkv::router {
namespace {

using Phase = Turn::Phase;

}  // namespace

void TurnCore::EpochClosing(uint64_t epoch) {
  TurnLane* const lane = placement_.Find(epoch);
  if (lane == nullptr) return;
  common::LogInfo("lane_closes", {{"epoch", epoch}, {"turns", lane->scheduler.sequences()}});
  placement_.Close(*lane);
}

void TurnCore::PoolsSeen(const std::vector<std::string>& pools) {
  if (placement_.SetSeen(pools)) world_->PoolsDropped();
}

void TurnCore::EpochUp(uint64_t epoch, const StagePlan& plan) {
  if (placement_.Add(epoch, plan, Now())) world_->PoolsDropped();
  metrics_->epochs.Increment();
  if (!serving_.exchange(true)) world_->SetServing(true);
}

void TurnCore::EpochDown(uint64_t epoch, const absl::Status& why) {
  std::unique_ptr<TurnLane> lane;
  const bool pools_dropped = placement_.Remove(epoch, &lane);
  if (lane == nullptr) return;
  if (!stopping_) metrics_->epochs_lost.Increment();
  for (auto& [id, turn] : running_) {
    if (turn->lane == lane.get()) Unseat(*turn, why);
  }
  saves_.EndOfLane(epoch, why);
  if (pools_dropped) world_->PoolsDropped();
  if (!placement_.lanes().empty()) return;
  serving_ = false;
  world_->SetServing(false);
}

void TurnCore::Unseat(Turn& turn, const absl::Status& why) {
  const bool computing = turn.phase == Phase::kRunning ? turn.planned_end > turn.attach_position
                                                       : turn.attach_since != absl::InfiniteFuture();
  LeaveSlot(turn);
  if (turn.decided() || turn.stopped) {
    turn.phase = Phase::kComputed;  // Its state is not in a slot any more; the log has it all.
    return;
  }
  if (turn.lost_since == absl::InfiniteFuture()) {
    turn.lost_since = Now();
    turn.lost_at = turn.done_end;
  }
  Park(turn);
  metrics_->recovered_turns.Increment();
  if (!computing || turn.patience.EpochLost() != Patience::Verdict::kGiveUp) return;
  Fail(turn, common::WithRetryInfo(absl::UnavailableError(absl::StrCat("the pipeline was lost ", Patience::kLostEpochs,
                                                                       " times while the turn was at position ",
                                                                       turn.patience.furthest(), ": ", why.message())),
                                   absl::Seconds(1)));
}

PoolUse TurnCore::ActiveByPool() const {
  PoolUse active;
  for (const auto& [id, turn] : running_) {
    if (turn->Active()) ++active[turn->pool];
  }
  return active;
}

void TurnCore::SweepClosing() {
  for (const auto& [epoch, lane] : placement_.lanes()) {
    if (!lane->closing) continue;
    bool is_used = false;
    for (const auto& [sequence, turn] : by_sequence_) {
      if (turn->lane != lane.get()) continue;
      is_used = true;
      if (turn->phase == Phase::kRunning && !turn->yielding && CanYield(*turn)) BeginYield(*turn);
    }
    if (!is_used && !saves_.UseLane(epoch)) world_->EndEpoch(epoch, absl::UnavailableError("its turns have left it"));
  }
}

std::vector<LaneState> TurnCore::Lanes() const {
  std::vector<LaneState> lanes;
  for (const auto& [epoch, lane] : placement_.lanes()) {
    lanes.push_back({epoch, lane->plan, lane->closing, lane->Load()});
  }
  return lanes;
}

}  // namespace rwkv::router
