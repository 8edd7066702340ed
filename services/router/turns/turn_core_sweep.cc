// What the loop does after each batch of events: what a turn may do next follows from what it is.
#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "services/common/grpc_status.h"
#include "services/router/turns/turn_core.h"

namespace rwkv::router {
namespace {

using Phase = Turn::Phase;

// Over which tokens a second are counted.
constexpr absl::Duration kRateInterval = absl::Seconds(2);

}  // namespace

bool TurnCore::CommitClean(const Turn& turn) const {
  if (turn.committing) return false;
  if (!turn.HasLog() || turn.abandoned || !turn.answer.has_value()) return true;
  return turn.durable == turn.answer->size() && (!turn.answer->finished() || turn.finish_durable);
}

void TurnCore::TraceStage(Turn& turn) {
  if (turn.trace == nullptr) return;
  const auto stage = [&turn]() -> absl::string_view {
    switch (turn.phase) {
      case Phase::kWaiting:
        return "queue";
      case Phase::kOpening:
        return "open";
      case Phase::kParked:
        return "park";
      case Phase::kLocating:
        return turn.stopped ? "" : "locate";  // Nobody wants to know any more.
      case Phase::kAttaching:
        return "attach";
      case Phase::kRunning:
        return turn.first_token.has_value() ? "decode" : "prefill";
      case Phase::kYielded:
        return "yield";
      case Phase::kComputed:
        return turn.kind->IsOpen() ? "commit" : "";
    }
    return "";
  };
  turn.trace->Enter(stage());
}

void TurnCore::SweepParked(Turn& turn) {
  const absl::Time now = Now();
  if (const absl::Status status = placement_.CheckServed(turn); !status.ok()) return Fail(turn, status);
  // What it left behind when it gave its slot away is on its way to where it is looked for.
  const bool saving = turn.yielded && turn.saves > 0 && now - turn.parked_since < kSaveWait;
  const bool has_lane = placement_.ChooseLane(turn) != nullptr;
  const bool is_lost = turn.lost_since != absl::InfiniteFuture();
  if (has_lane && is_lost && HasNoPlace(turn)) return WaitForPlace(running_.at(turn.id));
  if (has_lane && now >= turn.not_before && !saving) return Locate(running_.at(turn.id));
  const absl::Duration parked = now - turn.parked_since;
  if (!has_lane && turn.named && turn.HasLog() && parked > options_.handover_after && world_->OthersDrive(turn.pool)) {
    return Fail(turn, common::WithRetryInfo(
                          absl::UnavailableError("this router has lost its pipeline; another goes on with the turn"),
                          options_.retry_delay));
  }
  if (parked > options_.outage_timeout) {
    Fail(turn, common::WithRetryInfo(absl::UnavailableError(absl::StrCat("no pipeline for ",
                                                                         absl::FormatDuration(options_.outage_timeout),
                                                                         ": ", world_->WhyNoLane().message())),
                                     absl::Seconds(1)));
  }
}

void TurnCore::SweepTurn(Turn& turn) {
  if (turn.phase == Phase::kParked) SweepParked(turn);
  if (turn.phase == Phase::kRunning) Advance(turn);
  Pump(turn);
  if (turn.phase == Phase::kRunning) Advance(turn);  // Sending may have made room to decode.
  if (turn.phase == Phase::kComputed && turn.session != nullptr && CommitClean(turn)) {
    turn.session->turn = nullptr;
    turn.session = nullptr;
  }
  TraceStage(turn);
}

void TurnCore::Sweep() {
  kept_.Expire(Now());
  StartWaiting();
  for (auto it = running_.begin(); it != running_.end();) {
    const TurnPtr turn = it->second;
    SweepTurn(*turn);
    const bool over =
        turn->phase == Phase::kComputed && turn->session == nullptr && CommitClean(*turn) && !turn->kind->IsOpen();
    if (over) DropOwn(*turn);
    it = over ? running_.erase(it) : std::next(it);
  }
  SweepWaiting();
  SweepYields();
  SweepClosing();
  SweepCommits();
  saves_.Sweep();
  sessions_.Sweep();
  SweepDrain();
  StartWaiting();
  for (auto& [epoch, lane] : placement_.lanes()) SendCommands(*lane);
  Watch();
  UpdateGauges();
}

void TurnCore::SweepWaiting() {
  const absl::Time now = Now();
  for (size_t i = 0; i < waiting_.size();) {
    const TurnPtr turn = waiting_[i];
    if (turn->phase != Phase::kWaiting || now - turn->arrival <= options_.max_wait) {
      ++i;
      continue;
    }
    Fail(*turn, common::WithRetryInfo(
                    absl::ResourceExhaustedError(absl::StrCat(
                        "the call waited for ", absl::FormatDuration(options_.max_wait),
                        " to be started: ", running_.size() - yielded_, " run and ", waiting_.size(), " wait")),
                    absl::Seconds(1)));
  }
}

void TurnCore::SweepDrain() {
  if (!draining()) return;
  if (Now() >= pause_at_) {
    for (auto& [id, turn] : running_) {
      if (!turn->stopped && !turn->decided()) Fail(*turn, DrainingStatus());
    }
  }
  if (!running_.empty() || !saves_.empty() || !sessions_.empty()) return;
  world_->Drained();
}

void TurnCore::Watch() {
  const absl::Time now = Now();
  std::set<const TurnLane*> going;
  for (const auto& [sequence, turn] : by_sequence_) {
    if (turn->Going()) going.insert(turn->lane);
  }
  for (auto& [epoch, lane] : placement_.lanes()) {
    const bool is_idle = lane->scheduler.steps_in_flight() == 0 && going.count(lane.get()) == 0;
    if (is_idle) lane->last_progress = now;
    if (is_idle || now - lane->last_progress <= options_.progress_timeout) continue;
    world_->EndEpoch(epoch, absl::UnavailableError(absl::StrCat("no step came back for ",
                                                                absl::FormatDuration(options_.progress_timeout), "; ",
                                                                lane->scheduler.steps_in_flight(), " are in flight")));
    lane->last_progress = now;
  }
  for (const auto& [sequence, turn] : by_sequence_) {
    if (now - turn->attach_since <= options_.attach_timeout) continue;
    const absl::Status late = absl::UnavailableError(
        absl::StrCat("a slot was not attached within ", absl::FormatDuration(options_.attach_timeout)));
    const TurnPtr waiting = turn;  // What follows takes it out.
    const uint64_t epoch = turn->lane->epoch;
    if (waiting->prefix.attached) waiting->prefix.off = true;  // Its state may be what hangs: the input is read.
    if (waiting->patience.AttachTimedOut() == Patience::Verdict::kGiveUp) {
      Fail(*waiting, common::WithRetryInfo(late, absl::Seconds(1)));
    }
    world_->EndEpoch(epoch, late);
    return;
  }
}

void TurnCore::UpdateGauges() {
  running_count_ = static_cast<int>(running_.size());
  waiting_count_ = static_cast<int>(waiting_.size());
  if (const absl::Duration since = Now() - counted_at_; since >= kRateInterval) {
    tokens_per_second_ = static_cast<double>(tokens_drawn_ - tokens_counted_) / absl::ToDoubleSeconds(since);
    tokens_counted_ = tokens_drawn_;
    counted_at_ += since;
  }
  metrics_->running_turns.Set(static_cast<double>(running_.size()));
  metrics_->waiting_turns.Set(static_cast<double>(waiting_.size()));
  int slots = 0, used = 0, warm = 0, steps = 0;
  for (auto& [epoch, lane] : placement_.lanes()) {
    slots += lane->plan.slots;
    used += lane->scheduler.slots_in_use();
    warm += lane->scheduler.slots_warm();
    steps += lane->scheduler.steps_in_flight();
    if (const LaneLoad load = lane->Load(); std::exchange(lane->told_load, load) != load) world_->SetLoad(epoch, load);
  }
  metrics_->slots_used.Set(used);
  metrics_->slots_warm.Set(warm);
  metrics_->slots_free.Set(slots - used - warm);
  metrics_->microbatches_in_flight.Set(steps);
}

}  // namespace rwkv::router
