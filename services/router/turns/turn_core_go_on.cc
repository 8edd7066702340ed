// Sequences that decode without being asked for each token. The worker feeds what it draws by itself, as far as the
// router said; results come as from any step. What the turn knows holds all the same: nothing is shown before it is
// durable, a snapshot is taken where the slot is known to be, and every position is checked as it comes.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "services/router/turns/turn_core.h"

namespace rwkv::router {

bool TurnCore::MayGoOn(const Turn& turn) const {
  // A stop string is seen here alone: the worker waits where one may end, or the slot would go too far for others to go
  // on from.
  return !turn.yielding && (!turn.HasLog() || turn.pause_token_ids.has_value());
}

uint64_t TurnCore::GoOnLimit(const Turn& turn) const {
  // As many tokens as there may be; the last of them is drawn, and not fed.
  uint64_t tokens = std::min<uint64_t>(turn.spec.max_tokens(), turn.sent + options_.max_stream_messages);
  if (turn.HasLog()) {
    const uint64_t uncommitted = options_.max_uncommitted_tokens;
    tokens = std::min<uint64_t>(
        {turn.spec.max_tokens(), turn.durable + uncommitted, turn.sent + options_.max_stream_messages + uncommitted});
  }
  uint64_t limit = turn.begin + turn.prompt.size() + std::max<uint64_t>(tokens, 1) - 1;
  if (MaySave(turn)) limit = std::min(limit, turn.saved_position + options_.snapshot_interval_tokens);
  return std::max(limit, turn.planned_end);
}

void TurnCore::BeginGoingOn(Turn& turn, v1::StepEntry* entry) {
  turn.going_on.on = true;
  turn.going_on.paused = false;
  turn.fed_end = turn.planned_end = GoOnLimit(turn);
  entry->set_go_on_until(turn.planned_end);
  turn.lane->scheduler.MoveTo(turn.sequence, turn.planned_end);
}

void TurnCore::AdvanceGoing(Turn& turn, bool idle) {
  if (turn.going_on.halting) return;
  if (idle && MaySave(turn) && turn.planned_end >= turn.saved_position + options_.snapshot_interval_tokens) {
    saves_.Begin(turn);
  }
  const uint64_t limit = GoOnLimit(turn);
  // Told early enough that it never waits, and not for every token.
  const bool is_far = limit == turn.planned_end || turn.planned_end - turn.done_end > (limit - turn.done_end) / 2;
  if (is_far && !turn.going_on.paused) return;
  turn.going_on.paused = false;
  turn.fed_end = turn.planned_end = limit;
  turn.lane->scheduler.GoOn(turn.sequence, limit);
}

void TurnCore::Halt(Turn& turn) {
  if (turn.going_on.halting) return;
  turn.going_on.halting = true;
  turn.lane->scheduler.Halt(turn.sequence);
}

void TurnCore::FollowStop(Turn& turn, uint32_t token_id) {
  if (turn.HasLog()) {
    const std::vector<uint32_t>& pauses = *turn.pause_token_ids;
    turn.going_on.paused = std::binary_search(pauses.begin(), pauses.end(), token_id);
  }
  if (!turn.answer->finished()) return;
  if (turn.answer->reason() == v1::FINISH_REASON_STOP_TOKEN || turn.going_on.paused) return StandStill(turn);
  // Its slot goes beyond the answer: of no use to anybody.
  if (turn.answer->reason() == v1::FINISH_REASON_STOP_STRING) RemoveSequence(turn);
}

void TurnCore::OnStopped(const v1::SequenceStopped& stopped) {
  const auto it = by_sequence_.find(stopped.sequence());
  if (it == by_sequence_.end()) return;
  Turn& turn = *it->second;
  if (!turn.going_on.halting || stopped.position() < turn.done_end || stopped.position() > turn.planned_end) {
    return OnEntryFailed(turn, absl::InternalError(absl::StrCat("a sequence stopped at position ", stopped.position(),
                                                                ", its results at ", turn.done_end,
                                                                ", and it was sent to ", turn.planned_end)));
  }
  turn.going_on.stops_at = stopped.position();
  SettleStop(turn);
}

void TurnCore::SettleStop(Turn& turn) {
  // The first stage says so, and the last one's results may come later.
  if (turn.going_on.stops_at != turn.done_end) return;
  turn.going_on.stops_at = absl::nullopt;
  turn.going_on.halting = false;
  StandStill(turn);
}

void TurnCore::StandStill(Turn& turn) {
  turn.fed_end = turn.planned_end = turn.done_end;
  turn.lane->scheduler.MoveTo(turn.sequence, turn.done_end);
}

}  // namespace rwkv::router
