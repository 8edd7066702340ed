#include "services/router/core/attaching.h"

#include <algorithm>
#include <utility>

#include "services/common/grpc_status.h"
#include "services/common/logging.h"
#include "services/router/core/feeding.h"
#include "services/router/core/turn_opening.h"
#include "services/router/core/world.h"

namespace rwkv::router {
namespace {

using Phase = Turn::Phase;

}  // namespace

Attaching::Attaching(const CoreContext& context, const Placement& placement, TurnTable* turns, Prefixes* prefixes,
                     TurnSlots* slots, TurnEnds* ends)
    : context_(context), placement_(placement), turns_(turns), prefixes_(prefixes), slots_(slots), ends_(ends) {}

void Attaching::Admit(const TurnPtr& turn, uint64_t position) const {
  TurnLane* const lane = placement_.ChooseLane(*turn);
  if (lane == nullptr) return slots_->Park(*turn);
  if (!lane->scheduler.Admit(turns_->next_sequence(), position, turn->tenant, context_.WeightOf(turn->tenant))) {
    turn->set_phase(Phase::kComputed);
    return ends_->Fail(*turn,
                       common::WithRetryInfo(absl::ResourceExhaustedError("too many sequences"), absl::Seconds(1)));
  }
  Begin(turn, *lane, position);
  FeedKnown(*turn);
}

bool Attaching::AdmitWarm(const TurnPtr& turn, TurnLane& lane, const Scheduler::WarmSlot& warm) const {
  if (!lane.scheduler.AdmitWarm(turns_->next_sequence(), warm.sequence, turn->tenant,
                                context_.WeightOf(turn->tenant))) {
    return false;
  }
  turn->warm_source = warm.sequence;
  Begin(turn, lane, warm.position);
  return true;
}

void Attaching::Begin(const TurnPtr& turn, TurnLane& lane, uint64_t position) const {
  turns_->Seat(turn);
  turn->lane = &lane;
  turn->set_phase(Phase::kAttaching);
  turn->yielded = false;
  turn->parked_since = absl::InfiniteFuture();
  turn->attach_position = position;
  turn->attach_answers_left = static_cast<int>(lane.plan.stages.size());
  turn->fed_end = position;
  turn->planned_end = position;
  turn->done_end = position;
  turn->going_on = {};
  turn->saved_position = turn->prefix.attached ? 0 : position;  // A session has a state of its own before long.
  turn->attach_since = absl::InfiniteFuture();                  // Until there is a slot.
}

void Attaching::OnAnswer(const v1::SequenceAttached& attached) const {
  const TurnPtr turn = turns_->FindSequence(attached.sequence());
  if (turn == nullptr) return;  // Cancelled meanwhile.
  const absl::Status status = common::FromStatusProto(attached.status());
  if (!status.ok()) return OnFailed(*turn, status);
  if (--turn->attach_answers_left > 0) return;
  OnAttached(*turn);
}

void Attaching::OnAttached(Turn& turn) const {
  turn.lane->scheduler.OnAttached(turn.sequence);
  turn.set_phase(Phase::kRunning);
  turn.attach_since = absl::InfiniteFuture();
  turn.patience.Attached();
  turn.slot_since = context_.Now();
  turn.progress_at_slot = turn.patience.furthest();
  if (turn.lost_since != absl::InfiniteFuture()) {
    context_.metrics->recovery_seconds.Observe(std::max(0.0, absl::ToDoubleSeconds(context_.Now() - turn.lost_since)));
    if (turn.lost_at > turn.attach_position) {
      context_.metrics->replayed_tokens.Increment(static_cast<double>(turn.lost_at - turn.attach_position));
    }
    turn.lost_since = absl::InfiniteFuture();
  }
  if (turn.attached_once) return;
  turn.attached_once = true;
  turn.reused_tokens = turn.prefix.attached ? turn.attach_position : std::min(turn.attach_position, turn.begin);
  context_.metrics->reused_tokens.Increment(static_cast<double>(turn.reused_tokens));
}

void Attaching::OnFailed(Turn& turn, const absl::Status& status) const {
  common::LogWarning("attach_failed", {{"position", turn.attach_position},
                                       {"warm", turn.warm_source.has_value()},
                                       {"snapshot", turn.snapshot.snapshot_id()},
                                       {"status", status}});
  slots_->Remove(turn);
  slots_->Park(turn);
  if (turn.warm_source.has_value()) {
    turn.no_warm = true;
    return;
  }
  const bool unusable = absl::IsDataLoss(status) || absl::IsNotFound(status) || absl::IsFailedPrecondition(status) ||
                        absl::IsInvalidArgument(status);
  if (prefixes_->OnAttachFailed(turn, status, unusable)) return;
  if (unusable && !turn.snapshot.snapshot_id().empty()) {
    return turn.session == nullptr ? slots_->DropOwn(turn) : OnSnapshotUnusable(turn, status);
  }
  const Patience::Verdict verdict = turn.patience.AttachFailed();
  turn.not_before = context_.Now() + context_.options.retry_delay * std::min(turn.patience.failures(), 5);
  if (turn.session == nullptr && turn.patience.LeavesSnapshots(context_.Now())) slots_->DropOwn(turn);
  if (verdict != Patience::Verdict::kTryAgain) {
    ends_->Fail(turn, common::Annotate(status, "no slot could be made ready"));
  }
}

void Attaching::OnSnapshotUnusable(Turn& turn, const absl::Status& why) const {
  context_.metrics->snapshots_dropped.Increment();
  if (turn.session->base_position == turn.snapshot.position()) {
    return ends_->Fail(turn, BaseLost(turn.session_id, turn.snapshot.position(), why.message()));
  }
  if (turn.snapshot.position() == 0) {
    turn.no_snapshot = true;
  } else {
    turn.snapshot_limit = turn.snapshot.position() - 1;
  }
  v1::DropSnapshotRequest drop;
  drop.set_session_id(turn.session_id);
  drop.set_snapshot_id(turn.snapshot.snapshot_id());
  drop.set_reason(why.ToString());
  // If it stays, the next one who needs it drops it.
  context_.world->Run(World::Queue::kSnapshot, [this, drop = std::move(drop)] {
    (void)context_.catalog->DropSnapshot(drop, context_.StoreDeadline());
  });
}

}  // namespace rwkv::router
