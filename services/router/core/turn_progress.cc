#include "services/router/core/turn_progress.h"

#include "services/router/core/feeding.h"

namespace rwkv::router {
namespace {

using Phase = Turn::Phase;
using FeedKind = Scheduler::FeedKind;

}  // namespace

TurnProgress::TurnProgress(const CoreContext& context, const GoingOn& going_on, Saves* saves, ClientStreams* streams,
                           TurnSlots* slots, TurnEnds* ends)
    : context_(context), going_on_(going_on), saves_(saves), streams_(streams), slots_(slots), ends_(ends) {}

void TurnProgress::Advance(const TurnPtr& turn) const {
  const bool idle = turn->done_end == turn->fed_end && !turn->tail_pending;  // Everything fed has come back.
  if (turn->yielding() && !turn->decided() && idle && turn->kind->IsPassedOn(*turn)) return slots_->Yield(turn);
  return turn->kind->generates() ? AdvanceGenerate(*turn, idle) : AdvanceOther(*turn, idle);
}

void TurnProgress::AdvanceOther(Turn& turn, bool idle) const {
  bool is_stuck = false;
  const auto has_room = [this, &turn, &is_stuck](size_t queued) {
    const bool has_room = streams_->HasRoom(turn, queued);
    is_stuck = !has_room && streams_->IsStuck(turn);
    return has_room;
  };
  const CallKind::Next next = turn.kind->Advance(turn, idle, has_room);
  if (is_stuck) return ends_->Fail(turn, absl::ResourceExhaustedError("the client does not read"));
  using What = CallKind::Next::What;
  switch (next.what) {
    case What::kWait:
      return;
    case What::kFeed:
      return turn.yielding() ? void() : Feed(turn, turn.fed_end + next.tokens, FeedKind::kPrefill);
    case What::kSave: {
      const PendingSave* const save = saves_->Begin(turn);
      if (save == nullptr) return ends_->Fail(turn, absl::InternalError("the state could not be saved"));
      return turn.kind->OnSaveBegan(save->snapshot_id);
    }
    case What::kEnd:
      if (!next.status.ok()) return ends_->Fail(turn, next.status);
      streams_->End(turn, next.status);
      return slots_->Remove(turn);
  }
}

void TurnProgress::AdvanceGenerate(Turn& turn, bool idle) const {
  if (turn.yielding() && !turn.decided()) return;
  if (!turn.decided() && !turn.stopped && FeedPastPrefix(turn)) return;
  if (turn.spec.max_tokens() == 0 && idle && turn.fed_end == turn.FeedEnd() && !turn.decided()) {
    turn.answer->Finish(v1::FINISH_REASON_LENGTH, absl::nullopt, "");
    if (!turn.HasLog()) context_.metrics->CountFinish(v1::FINISH_REASON_LENGTH);
  }
  if (turn.decided() || turn.stopped) {
    if (!turn.HasLog() || turn.abandoned) return slots_->Remove(turn);
    if (idle) slots_->Retire(turn);
    return;
  }
  if (turn.going_on.on) return going_on_.Advance(turn, idle);
  if (turn.fed_end < turn.FeedEnd() && !turn.tail_pending && !Lags(turn)) {
    return Feed(turn, turn.FeedEnd(), FeedKind::kDecode);
  }
  if (saves_->MayBegin(turn) && turn.planned_end >= turn.saved_position + context_.options.snapshot_interval_tokens) {
    saves_->Begin(turn);
  }
}

bool TurnProgress::FeedPastPrefix(Turn& turn) const {
  if (turn.prefix.next_end == turn.prefix.ends.size()) return false;
  const uint64_t end = turn.prefix.ends[turn.prefix.next_end];
  if (turn.planned_end < end) return true;  // On its way there.
  if (turn.planned_end == end) saves_->BeginPrefix(turn);
  ++turn.prefix.next_end;
  const uint64_t fed = turn.fed_end;
  FeedKnown(turn);
  return turn.prefix.next_end < turn.prefix.ends.size() || turn.fed_end > fed;
}

bool TurnProgress::Lags(const Turn& turn) const {
  const TurnOptions& options = context_.options;
  const uint64_t size = turn.answer->size();
  if (turn.HasLog() && size - turn.durable >= static_cast<uint64_t>(options.max_uncommitted_tokens)) return true;
  return (turn.HasLog() ? turn.durable : size) >= turn.sent + options.max_stream_messages;
}

void TurnProgress::OnSaveEnded(Turn& turn, const PendingSave& save, bool is_whole, const absl::Status& status) const {
  --turn.saves;
  if (save.session_id.empty() && status.ok()) {
    slots_->DropOwn(turn);
    turn.own_snapshot = Saves::ManifestOf(save);
  }
  if (!turn.kind->AwaitsSave(save.snapshot_id)) return;
  // Whether or not the manifest could be committed (of an empty session, for instance).
  if (is_whole) turn.kind->OnSnapshot(turn, Saves::ManifestOf(save));
  if (turn.kind->IsOpen()) return ends_->Fail(turn, status);
  streams_->End(turn, absl::OkStatus());
  if (turn.phase() == Phase::kRunning) slots_->Retire(turn);
}

}  // namespace rwkv::router
