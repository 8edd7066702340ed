#include "services/router/core/going_on.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace rwkv::router {

bool GoingOn::MayBegin(const Turn& turn) {
  // A stop string is seen here alone: the worker waits where one may end, or the slot would go too far for others to go
  // on from.
  return !turn.yielding() && (!turn.HasLog() || turn.pause_token_ids.has_value());
}

uint64_t GoingOn::Limit(const Turn& turn) const {
  // As many tokens as there may be; the last of them is drawn, and not fed.
  uint64_t tokens = std::min<uint64_t>(turn.spec.max_tokens(), turn.sent + context_.options.max_stream_messages);
  if (turn.HasLog()) {
    const uint64_t uncommitted = context_.options.max_uncommitted_tokens;
    tokens = std::min<uint64_t>({turn.spec.max_tokens(), turn.durable + uncommitted,
                                 turn.sent + context_.options.max_stream_messages + uncommitted});
  }
  uint64_t limit = turn.begin + turn.prompt.size() + std::max<uint64_t>(tokens, 1) - 1;
  if (saves_->MayBegin(turn)) limit = std::min(limit, turn.saved_position + context_.options.snapshot_interval_tokens);
  return std::max(limit, turn.planned_end);
}

void GoingOn::Begin(Turn& turn, v1::StepEntry* entry) const {
  turn.going_on.on = true;
  turn.going_on.paused = false;
  turn.fed_end = turn.planned_end = Limit(turn);
  entry->set_go_on_until(turn.planned_end);
  turn.lane->scheduler.MoveTo(turn.sequence, turn.planned_end);
}

void GoingOn::Advance(Turn& turn, bool idle) const {
  if (turn.going_on.halting) return;
  if (idle && saves_->MayBegin(turn) &&
      turn.planned_end >= turn.saved_position + context_.options.snapshot_interval_tokens) {
    saves_->Begin(turn);
  }
  const uint64_t limit = Limit(turn);
  // Told early enough that it never waits, and not for every token.
  const bool is_far = limit == turn.planned_end || turn.planned_end - turn.done_end > (limit - turn.done_end) / 2;
  if (is_far && !turn.going_on.paused) return;
  turn.going_on.paused = false;
  turn.fed_end = turn.planned_end = limit;
  turn.lane->scheduler.GoOn(turn.sequence, limit);
}

void GoingOn::Halt(Turn& turn) {
  if (turn.going_on.halting) return;
  turn.going_on.halting = true;
  turn.lane->scheduler.Halt(turn.sequence);
}

bool GoingOn::FollowStop(Turn& turn, uint32_t token_id) {
  if (turn.HasLog()) {
    const std::vector<uint32_t>& pauses = *turn.pause_token_ids;
    turn.going_on.paused = std::binary_search(pauses.begin(), pauses.end(), token_id);
  }
  if (!turn.answer->finished()) return true;
  if (turn.answer->reason() == v1::FINISH_REASON_STOP_TOKEN || turn.going_on.paused) {
    StandStill(turn);
    return true;
  }
  return turn.answer->reason() != v1::FINISH_REASON_STOP_STRING;
}

absl::Status GoingOn::Stopped(Turn& turn, uint64_t position) {
  if (!turn.going_on.halting || position < turn.done_end || position > turn.planned_end) {
    return absl::InternalError(absl::StrCat("a sequence stopped at position ", position, ", its results at ",
                                            turn.done_end, ", and it was sent to ", turn.planned_end));
  }
  turn.going_on.stops_at = position;
  Settle(turn);
  return absl::OkStatus();
}

void GoingOn::Settle(Turn& turn) {
  // The first stage says so, and the last one's results may come later.
  if (turn.going_on.stops_at != turn.done_end) return;
  turn.going_on.stops_at = absl::nullopt;
  turn.going_on.halting = false;
  StandStill(turn);
}

void GoingOn::StandStill(Turn& turn) {
  turn.fed_end = turn.planned_end = turn.done_end;
  turn.lane->scheduler.MoveTo(turn.sequence, turn.done_end);
}

}  // namespace rwkv::router
