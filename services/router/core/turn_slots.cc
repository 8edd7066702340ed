#include "services/router/core/turn_slots.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "services/router/core/going_on.h"
#include "services/router/core/world.h"

namespace rwkv::router {
namespace {

using Phase = Turn::Phase;

}  // namespace

TurnSlots::TurnSlots(const CoreContext& context, const Placement& placement, TurnTable* turns, WaitingLine* line,
                     Saves* saves)
    : context_(context), placement_(placement), turns_(turns), line_(line), saves_(saves) {}

void TurnSlots::Park(Turn& turn) const {
  if (turn.stopped) {  // It would wait for a pipeline for nothing, and its session with it.
    turn.set_phase(Phase::kComputed);
    return;
  }
  if (turn.parked_since == absl::InfiniteFuture()) turn.parked_since = context_.Now();
  turn.set_phase(Phase::kParked);
}

void TurnSlots::Leave(Turn& turn) {
  turns_->Unseat(turn);
  turn.lane = nullptr;
  turn.tail.clear();
  turn.tail_pending = false;
  turn.set_yielding(false);
  turn.attach_since = absl::InfiniteFuture();
  turn.kind->LeftSlot();
}

void TurnSlots::Remove(Turn& turn) {
  if (turn.lane != nullptr) turn.lane->scheduler.Cancel(turn.sequence);
  Leave(turn);
  turn.set_phase(Phase::kComputed);
  line_->KeepSlot(turn);
}

void TurnSlots::Retire(Turn& turn) {
  if (turn.planned_end > turn.saved_position) saves_->Begin(turn);
  turn.lane->scheduler.Retire(turn.sequence, turn.session_id, turn.session->log_branch);
  Leave(turn);
  turn.set_phase(Phase::kComputed);
  line_->KeepSlot(turn);
}

bool TurnSlots::CanYield(const Turn& turn) { return turn.kind->may_yield() && !turn.stopped && !turn.decided(); }

void TurnSlots::BeginYield(Turn& turn) const {
  turn.set_yielding(true);
  if (turn.Going()) return GoingOn::Halt(turn);
  turn.lane->scheduler.Unfeed(turn.sequence);
  turn.fed_end = turn.planned_end;
}

void TurnSlots::Yield(const TurnPtr& turn) {
  if (turn->planned_end > turn->saved_position) saves_->Begin(*turn);
  turn->lane->scheduler.Retire(turn->sequence, WarmSession(*turn), WarmBranch(*turn));
  Leave(*turn);
  turn->yielded = true;
  turn->set_phase(Phase::kYielded);
  line_->Add(turn);
  context_.metrics->yielded_turns.Increment();
}

bool TurnSlots::HasNoPlace(const Turn& turn) const {
  const auto pool = placement_.pools().find(turn.pool());
  if (pool == placement_.pools().end()) return false;
  return turns_->tally().active(turn.pool()) > pool->second.slots;
}

void TurnSlots::WaitForPlace(const TurnPtr& turn) {
  turn->set_phase(Phase::kYielded);
  turn->parked_since = absl::InfiniteFuture();
  line_->AddLost(turn);
}

void TurnSlots::DropOwn(Turn& turn) {
  if (turn.own_snapshot.snapshot_id().empty()) return;
  v1::DropSnapshotRequest drop;
  drop.set_snapshot_id(turn.own_snapshot.snapshot_id());
  turn.own_snapshot.Clear();
  // If it stays, it is swept as an orphan.
  context_.world->Run(World::Queue::kSnapshot, [this, drop = std::move(drop)] {
    (void)context_.catalog->DropSnapshot(drop, context_.StoreDeadline());
  });
  placement_.DropWarm(WarmSession(turn));
}

std::string TurnSlots::WarmSession(const Turn& turn) {
  return turn.session != nullptr ? turn.session_id : absl::StrCat("turn/", turn.id);  // No session's id has a slash.
}

std::string TurnSlots::WarmBranch(const Turn& turn) {
  return turn.session != nullptr ? turn.session->log_branch : std::string();
}

}  // namespace rwkv::router
