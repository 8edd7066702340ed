#include "services/router/core/lane_keeper.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "services/common/grpc_status.h"
#include "services/common/logging.h"
#include "services/router/core/turn_lane.h"
#include "services/router/core/world.h"

namespace rwkv::router {
namespace {

using Phase = Turn::Phase;

}  // namespace

LaneKeeper::LaneKeeper(const CoreContext& context, const TurnTable& turns, Placement* placement, Saves* saves,
                       TurnSlots* slots, TurnEnds* ends)
    : context_(context), turns_(turns), placement_(placement), saves_(saves), slots_(slots), ends_(ends) {}

void LaneKeeper::Close(uint64_t epoch) {
  TurnLane* const lane = placement_->Find(epoch);
  if (lane == nullptr) return;
  common::LogInfo("lane_closes", {{"epoch", epoch}, {"turns", lane->scheduler.sequences()}});
  placement_->Close(*lane);
  turns_.Touch();
}

void LaneKeeper::PoolsSeen(const std::vector<std::string>& pools) {
  if (placement_->SetSeen(pools)) context_.world->PoolsDropped();
  turns_.Touch();
}

void LaneKeeper::Up(uint64_t epoch, const StagePlan& plan) {
  if (placement_->Add(epoch, plan, context_.Now())) context_.world->PoolsDropped();
  context_.metrics->epochs.Increment();
  if (!serving_.exchange(true)) context_.world->SetServing(true);
  turns_.Touch();
}

void LaneKeeper::Down(uint64_t epoch, const absl::Status& why) {
  std::unique_ptr<TurnLane> lane;
  const bool pools_dropped = placement_->Remove(epoch, &lane);
  if (lane == nullptr) return;
  if (!context_.stopping) context_.metrics->epochs_lost.Increment();
  for (const auto& [id, turn] : turns_.running()) {
    if (turn->lane == lane.get()) Unseat(*turn, why);
  }
  saves_->EndOfLane(epoch, why);
  turns_.Touch();
  if (pools_dropped) context_.world->PoolsDropped();
  if (!placement_->lanes().empty()) return;
  serving_ = false;
  context_.world->SetServing(false);
}

void LaneKeeper::Unseat(Turn& turn, const absl::Status& why) const {
  const bool computing = turn.phase() == Phase::kRunning ? turn.planned_end > turn.attach_position
                                                         : turn.attach_since != absl::InfiniteFuture();
  slots_->Leave(turn);
  if (turn.decided() || turn.stopped) {
    turn.set_phase(Phase::kComputed);  // Its state is not in a slot any more; the log has it all.
    return;
  }
  if (turn.lost_since == absl::InfiniteFuture()) {
    turn.lost_since = context_.Now();
    turn.lost_at = turn.done_end;
  }
  slots_->Park(turn);
  context_.metrics->recovered_turns.Increment();
  if (!computing || turn.patience.EpochLost() != Patience::Verdict::kGiveUp) return;
  ends_->Fail(turn,
              common::WithRetryInfo(absl::UnavailableError(absl::StrCat("the pipeline was lost ", Patience::kLostEpochs,
                                                                        " times while the turn was at position ",
                                                                        turn.patience.furthest(), ": ", why.message())),
                                    absl::Seconds(1)));
}

void LaneKeeper::SweepClosing() const {
  for (const auto& [epoch, lane] : placement_->lanes()) {
    if (!lane->closing) continue;
    bool is_used = false;
    for (const auto& [sequence, turn] : turns_.seated()) {
      if (turn->lane != lane.get()) continue;
      is_used = true;
      if (turn->phase() == Phase::kRunning && !turn->yielding() && TurnSlots::CanYield(*turn))
        slots_->BeginYield(*turn);
    }
    if (!is_used && !saves_->UseLane(epoch))
      context_.world->EndEpoch(epoch, absl::UnavailableError("its turns have left it"));
  }
}

std::vector<LaneState> LaneKeeper::Lanes() const {
  std::vector<LaneState> lanes;
  for (const auto& [epoch, lane] : placement_->lanes()) {
    lanes.push_back({epoch, lane->plan, lane->closing, lane->Load()});
  }
  return lanes;
}

void LaneKeeper::Watch() {
  WatchSteps();
  WatchAttaches();
}

void LaneKeeper::WatchSteps() const {
  const absl::Time now = context_.Now();
  const absl::Duration timeout = context_.options.progress_timeout;
  for (const auto& [epoch, lane] : placement_->lanes()) {
    const bool is_idle = lane->scheduler.steps_in_flight() == 0 && lane->going == 0;
    if (is_idle) lane->last_progress = now;
    if (is_idle || now - lane->last_progress <= timeout) continue;
    context_.world->EndEpoch(
        epoch, absl::UnavailableError(absl::StrCat("no step came back for ", absl::FormatDuration(timeout), "; ",
                                                   lane->scheduler.steps_in_flight(), " are in flight")));
    lane->last_progress = now;
  }
}

void LaneKeeper::WatchAttaches() {
  const absl::Time now = context_.Now();
  const absl::Duration timeout = context_.options.attach_timeout;
  if (now >= attaches_seen_ && now < attaches_due_) return;
  // Those that begin to attach later are late later.
  absl::Time due = now + timeout;
  for (const auto& [sequence, turn] : turns_.seated()) {
    due = std::min(due, turn->attach_since + timeout);
    if (now - turn->attach_since <= timeout) continue;
    const absl::Status late =
        absl::UnavailableError(absl::StrCat("a slot was not attached within ", absl::FormatDuration(timeout)));
    const TurnPtr waiting = turn;  // What follows takes it out.
    const uint64_t epoch = turn->lane->epoch;
    if (waiting->prefix.attached) waiting->prefix.off = true;  // Its state may be what hangs: the input is read.
    if (waiting->patience.AttachTimedOut() == Patience::Verdict::kGiveUp) {
      ends_->Fail(*waiting, common::WithRetryInfo(late, absl::Seconds(1)));
    }
    return context_.world->EndEpoch(epoch, late);
  }
  attaches_seen_ = now;
  attaches_due_ = due;
}

}  // namespace rwkv::router
