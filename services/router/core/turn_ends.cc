#include "services/router/core/turn_ends.h"

#include "services/router/core/going_on.h"

namespace rwkv::router {
namespace {

using Phase = Turn::Phase;

}  // namespace

void TurnEnds::Fail(Turn& turn, const absl::Status& status) {
  streams_->End(turn, status);
  Abandon(turn);
}

void TurnEnds::Refuse(Turn& turn, const absl::Status& status) {
  if (!turn.HasLog()) return Fail(turn, status);
  turn.set_phase(Phase::kComputed);
  turn.error = status;
  turn.answer->Finish(v1::FINISH_REASON_ERROR, absl::nullopt, "");
}

void TurnEnds::Abandon(Turn& turn) {
  if (turn.stopped) return;
  turn.stopped = true;
  turn.Touch();
  switch (turn.phase()) {
    case Phase::kWaiting: {
      Session* const session = sessions_->Find(turn.session_id);
      turn.set_phase(Phase::kComputed);
      if (session != nullptr && session->next.get() == &turn) {
        session->next = nullptr;
        sessions_->Touch(*session);
      }
      line_->Remove(turn);  // May be the last that holds the turn.
      return;
    }
    case Phase::kOpening:
    case Phase::kLocating:
      return;  // Who comes back from the store sees that it was stopped.
    case Phase::kParked:
      turn.set_phase(Phase::kComputed);
      return;
    case Phase::kYielded:
      line_->Remove(turn);
      turn.set_phase(Phase::kComputed);
      return;
    case Phase::kAttaching:
      return slots_->Remove(turn);
    case Phase::kRunning:
      if (!turn.HasLog() || turn.abandoned) return slots_->Remove(turn);
      if (!turn.Going()) return slots_->Retire(turn);
      turn.set_yielding(false);
      return GoingOn::Halt(turn);  // Retired once it is known where its slot is.
    case Phase::kComputed:
      return;
  }
}

}  // namespace rwkv::router
