// What a running sequence does next.
#include <algorithm>

#include "services/router/turns/turn_core.h"

namespace rwkv::router {

void TurnCore::Advance(Turn& turn) {
  const bool idle = turn.done_end == turn.fed_end && !turn.tail_pending;  // Everything fed has come back.
  if (turn.yielding && !turn.decided() && idle && turn.kind->IsPassedOn(turn)) return Yield(running_.at(turn.id));
  if (turn.kind->generates()) return AdvanceGenerate(turn, idle);
  using What = CallKind::Next::What;
  const CallKind::Next next =
      turn.kind->Advance(turn, idle, [this, &turn](size_t queued) { return HasRoom(turn, queued); });
  switch (next.what) {
    case What::kWait:
      return;
    case What::kFeed:
      return turn.yielding ? void() : Feed(turn, turn.fed_end + next.tokens, Scheduler::FeedKind::kPrefill);
    case What::kSave: {
      const PendingSave* const save = saves_.Begin(turn);
      if (save == nullptr) return Fail(turn, absl::InternalError("the state could not be saved"));
      return turn.kind->OnSaveBegan(save->snapshot_id);
    }
    case What::kEnd:
      if (!next.status.ok()) return Fail(turn, next.status);
      EndCall(turn, next.status);
      return RemoveSequence(turn);
  }
}

void TurnCore::Feed(Turn& turn, uint64_t end, Scheduler::FeedKind kind) {
  turn.lane->scheduler.Feed(turn.sequence, static_cast<int64_t>(end - turn.fed_end), kind);
  turn.fed_end = end;
}

bool TurnCore::FeedPastPrefix(Turn& turn) {
  if (turn.prefix.next_end == turn.prefix.ends.size()) return false;
  const uint64_t end = turn.prefix.ends[turn.prefix.next_end];
  if (turn.planned_end < end) return true;  // On its way there.
  if (turn.planned_end == end) SavePrefix(turn);
  ++turn.prefix.next_end;
  const uint64_t fed = turn.fed_end;
  FeedKnown(turn);
  return turn.prefix.next_end < turn.prefix.ends.size() || turn.fed_end > fed;
}

bool TurnCore::Lagging(const Turn& turn) const {
  const uint64_t size = turn.answer->size();
  if (turn.HasLog() && size - turn.durable >= static_cast<uint64_t>(options_.max_uncommitted_tokens)) return true;
  return (turn.HasLog() ? turn.durable : size) >= turn.sent + options_.max_stream_messages;
}

void TurnCore::AdvanceGenerate(Turn& turn, bool idle) {
  if (turn.yielding && !turn.decided()) return;
  if (!turn.decided() && !turn.stopped && FeedPastPrefix(turn)) return;
  if (turn.spec.max_tokens() == 0 && idle && turn.fed_end == turn.FeedEnd() && !turn.decided()) {
    turn.answer->Finish(v1::FINISH_REASON_LENGTH, absl::nullopt, "");
    if (!turn.HasLog()) metrics_->CountFinish(v1::FINISH_REASON_LENGTH);
  }
  if (turn.decided() || turn.stopped) {
    if (!turn.HasLog() || turn.abandoned) return RemoveSequence(turn);
    if (idle) SaveAndRetire(turn);
    return;
  }
  if (turn.going_on.on) return AdvanceGoing(turn, idle);
  if (turn.fed_end < turn.FeedEnd() && !turn.tail_pending && !Lagging(turn)) {
    return Feed(turn, turn.FeedEnd(), Scheduler::FeedKind::kDecode);
  }
  if (MaySave(turn) && turn.planned_end >= turn.saved_position + options_.snapshot_interval_tokens) saves_.Begin(turn);
}

}  // namespace rwkv::router
