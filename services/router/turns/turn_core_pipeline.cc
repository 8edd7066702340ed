// Giving a turn its slot: where its state is, attaching.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "services/common/grpc_status.h"
#include "services/common/logging.h"
#include "services/router/turns/turn_core.h"

namespace rwkv::router {
namespace {

using Phase = Turn::Phase;

// No log stands for what a session was imported with.
absl::Status BaseLost(const std::string& session_id, uint64_t position, absl::string_view why) {
  return absl::DataLossError(absl::StrCat("session \"", session_id, "\" was imported with a state at position ",
                                          position, ", which cannot be read any more: ", why));
}

}  // namespace

void TurnCore::Handle(uint64_t epoch, int stage, const v1::ExecuteResponse& response) {
  TurnLane* const of_epoch = placement_.Find(epoch);
  if (of_epoch == nullptr) return;
  TurnLane& lane = *of_epoch;
  switch (response.result_case()) {
    case v1::ExecuteResponse::kAttached:
      return OnAttachAnswer(response.attached());
    case v1::ExecuteResponse::kLogits:
      return OnLogits(response.logits());
    case v1::ExecuteResponse::kStep:
      return OnStep(lane, response.step());
    case v1::ExecuteResponse::kSaved:
      return saves_.OnSaved(response.saved());
    case v1::ExecuteResponse::kStopped:
      return OnStopped(response.stopped());
    case v1::ExecuteResponse::kOpened:
    case v1::ExecuteResponse::RESULT_NOT_SET:
      world_->EndEpoch(epoch, absl::InternalError(absl::StrCat("stage ", stage, " sent an answer to nothing")));
      return;
  }
}

void TurnCore::Park(Turn& turn) {
  if (turn.stopped) {  // It would wait for a pipeline for nothing, and its session with it.
    turn.phase = Phase::kComputed;
    return;
  }
  if (turn.parked_since == absl::InfiniteFuture()) turn.parked_since = Now();
  turn.phase = Phase::kParked;
}

void TurnCore::Locate(const TurnPtr& turn) {
  turn->snapshot.Clear();
  turn->warm_source = absl::nullopt;
  turn->tail.clear();
  turn->prefix.attached = false;
  prefixes_.Plan(*turn);
  const uint64_t at_most = turn->StateEnd();
  if (!turn->kind->wants_snapshot() && LocateWarm(turn, 0, at_most)) return;
  absl::optional<v1::FindPrefixRequest> prefix = prefixes_.Lookup(*turn);
  if (turn->session == nullptr) {
    turn->snapshot = turn->own_snapshot;
    if (prefix.has_value() && turn->snapshot.snapshot_id().empty()) return LocatePrefix(turn, *std::move(prefix));
    return Admit(turn, turn->snapshot.position());
  }

  turn->phase = Phase::kLocating;
  TraceStage(*turn);
  v1::FindSnapshotRequest find;
  find.set_session_id(turn->session_id);
  find.set_at_or_before(std::min(at_most, turn->snapshot_limit));
  find.set_model_fingerprint(turn->model->info.fingerprint());
  const absl::optional<uint64_t> base = turn->session->base_position;
  const bool restart = turn->no_snapshot || turn->patience.LeavesSnapshots(Now());
  if (restart && base.has_value()) find.set_at_or_before(*base);
  const auto work = [this, find = std::move(find), fresh = restart && !base.has_value(), base, begin = turn->begin,
                     prefix = std::move(prefix)] {
    Located located;
    const absl::Time deadline = StoreDeadline();
    if (!fresh) {
      absl::StatusOr<v1::FindSnapshotResponse> found = catalog_->FindSnapshot(find, deadline);
      located.status = found.status();
      if (!found.ok()) return located;
      located.manifest = *std::move(found->mutable_manifest());
      if (base.has_value() && located.manifest.snapshot_id().empty()) {
        located.status = BaseLost(find.session_id(), *base, "the store does not know it");
        return located;
      }
    }
    if (prefix.has_value()) prefixes_.Find(*prefix, &located);
    if (located.manifest.position() >= begin) return located;
    v1::ReadTokensRequest read;
    read.set_session_id(find.session_id());
    read.set_begin(located.manifest.position());
    read.set_end(begin);
    absl::StatusOr<std::vector<uint32_t>> tail = catalog_->ReadTokens(read, deadline);
    located.status = tail.status();
    if (tail.ok()) located.tail = *std::move(tail);
    return located;
  };
  if (!RunStoreJob<Located>(world_, Traced<Located>(turn->trace, work),
                            [this, turn](Located located) { OnLocated(turn, std::move(located)); })) {
    Park(*turn);
    turn->not_before = Now() + options_.retry_delay;
  }
}

void TurnCore::LocatePrefix(const TurnPtr& turn, v1::FindPrefixRequest find) {
  turn->phase = Phase::kLocating;
  TraceStage(*turn);
  const auto work = [this, find = std::move(find)] {
    Located located;
    prefixes_.Find(find, &located);
    return located;
  };
  if (RunStoreJob<Located>(world_, Traced<Located>(turn->trace, work),
                           [this, turn](Located located) { OnLocated(turn, std::move(located)); })) {
    return;
  }
  Admit(turn, 0);
}

bool TurnCore::LocateWarm(const TurnPtr& turn, uint64_t at_least, uint64_t at_most) {
  if (turn->no_warm) return false;
  absl::optional<Scheduler::WarmSlot> warm;
  TurnLane* lane = nullptr;
  for (const auto& [epoch, other] : placement_.lanes()) {
    if (!placement_.IsOpenTo(*turn, *other)) continue;
    const absl::optional<Scheduler::WarmSlot> found =
        other->scheduler.FindWarm(WarmSession(*turn), WarmBranch(*turn), at_most);
    if (!found.has_value() || (warm.has_value() && warm->position >= found->position)) continue;
    warm = found;
    lane = other.get();
  }
  if (!warm.has_value() || warm->position < at_least) return false;
  const SequenceId sequence = next_sequence_;
  if (!lane->scheduler.AdmitWarm(sequence, warm->sequence, turn->tenant, WeightOf(turn->tenant))) return false;
  ++next_sequence_;
  turn->warm_source = warm->sequence;
  BeginAttach(turn, *lane, sequence, warm->position);
  if (warm->position >= turn->begin) {
    FeedKnown(*turn);
    return true;
  }
  // The log grew without this slot: what it has not seen is read while it attaches.
  turn->tail_pending = true;
  v1::ReadTokensRequest read;
  read.set_session_id(turn->session_id);
  read.set_begin(warm->position);
  read.set_end(turn->begin);
  using Tail = absl::StatusOr<std::vector<uint32_t>>;
  const auto then = [this, turn, sequence](Tail tail) {
    if (turn->sequence != sequence) return;
    turn->tail_pending = false;
    if (!tail.ok()) return Fail(*turn, StoreError(tail.status()));
    turn->tail = *std::move(tail);
    FeedKnown(*turn);
  };
  const auto work = [this, read = std::move(read)] { return Tail(catalog_->ReadTokens(read, StoreDeadline())); };
  if (!RunStoreJob<Tail>(world_, Traced<Tail>(turn->trace, work), then)) {
    RemoveSequence(*turn);
    Park(*turn);
    turn->not_before = Now() + options_.retry_delay;
  }
  return true;
}

std::string TurnCore::WarmSession(const Turn& turn) {
  return turn.session != nullptr ? turn.session_id : absl::StrCat("turn/", turn.id);  // No session's id has a slash.
}

std::string TurnCore::WarmBranch(const Turn& turn) {
  return turn.session != nullptr ? turn.session->log_branch : std::string();
}

void TurnCore::OnLocated(const TurnPtr& turn, Located located) {
  if (turn->stopped) {
    turn->phase = Phase::kComputed;
    return;
  }
  if (!located.status.ok()) {
    turn->phase = Phase::kComputed;
    return Fail(*turn, StoreError(located.status));
  }
  if (turn->kind->wants_snapshot()) {
    if (!located.manifest.snapshot_id().empty() && located.manifest.position() == turn->begin) {
      turn->phase = Phase::kComputed;
      turn->kind->OnSnapshot(*turn, std::move(located.manifest));
      return EndCall(*turn, absl::OkStatus());
    }
    if (LocateWarm(turn, located.manifest.position(), turn->begin)) return;
  }
  prefixes_.OnFound(*turn, located);
  turn->snapshot = std::move(located.manifest);
  turn->tail = std::move(located.tail);
  Admit(turn, turn->snapshot.position());
}

void TurnCore::Admit(const TurnPtr& turn, uint64_t position) {
  TurnLane* const lane = placement_.ChooseLane(*turn);
  if (lane == nullptr) return Park(*turn);
  const SequenceId sequence = next_sequence_++;
  if (!lane->scheduler.Admit(sequence, position, turn->tenant, WeightOf(turn->tenant))) {
    turn->phase = Phase::kComputed;
    return Fail(*turn, common::WithRetryInfo(absl::ResourceExhaustedError("too many sequences"), absl::Seconds(1)));
  }
  BeginAttach(turn, *lane, sequence, position);
  FeedKnown(*turn);
}

void TurnCore::BeginAttach(const TurnPtr& turn, TurnLane& lane, SequenceId sequence, uint64_t position) {
  by_sequence_[sequence] = turn;
  turn->sequence = sequence;
  turn->lane = &lane;
  turn->phase = Phase::kAttaching;
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

void TurnCore::OnAttachAnswer(const v1::SequenceAttached& attached) {
  const auto it = by_sequence_.find(attached.sequence());
  if (it == by_sequence_.end()) return;  // Cancelled meanwhile.
  const TurnPtr turn = it->second;
  const absl::Status status = common::FromStatusProto(attached.status());
  if (!status.ok()) return OnAttachFailed(*turn, status);
  if (--turn->attach_answers_left > 0) return;
  turn->lane->scheduler.OnAttached(turn->sequence);
  turn->phase = Phase::kRunning;
  turn->attach_since = absl::InfiniteFuture();
  turn->patience.Attached();
  turn->slot_since = Now();
  turn->progress_at_slot = turn->patience.furthest();
  if (turn->lost_since != absl::InfiniteFuture()) {
    metrics_->recovery_seconds.Observe(std::max(0.0, absl::ToDoubleSeconds(Now() - turn->lost_since)));
    if (turn->lost_at > turn->attach_position) {
      metrics_->replayed_tokens.Increment(static_cast<double>(turn->lost_at - turn->attach_position));
    }
    turn->lost_since = absl::InfiniteFuture();
  }
  if (turn->attached_once) return;
  turn->attached_once = true;
  turn->reused_tokens = turn->prefix.attached ? turn->attach_position : std::min(turn->attach_position, turn->begin);
  metrics_->reused_tokens.Increment(static_cast<double>(turn->reused_tokens));
}

void TurnCore::OnAttachFailed(Turn& turn, const absl::Status& status) {
  common::LogWarning("attach_failed", {{"position", turn.attach_position},
                                       {"warm", turn.warm_source.has_value()},
                                       {"snapshot", turn.snapshot.snapshot_id()},
                                       {"status", status}});
  RemoveSequence(turn);
  Park(turn);
  if (turn.warm_source.has_value()) {
    turn.no_warm = true;
    return;
  }
  const bool unusable = absl::IsDataLoss(status) || absl::IsNotFound(status) || absl::IsFailedPrecondition(status) ||
                        absl::IsInvalidArgument(status);
  if (prefixes_.OnAttachFailed(turn, status, unusable)) return;
  if (unusable && !turn.snapshot.snapshot_id().empty()) {
    return turn.session == nullptr ? DropOwn(turn) : OnSnapshotUnusable(turn, status);
  }
  const Patience::Verdict verdict = turn.patience.AttachFailed();
  turn.not_before = Now() + options_.retry_delay * std::min(turn.patience.failures(), 5);
  if (turn.session == nullptr && turn.patience.LeavesSnapshots(Now())) DropOwn(turn);
  if (verdict != Patience::Verdict::kTryAgain) Fail(turn, common::Annotate(status, "no slot could be made ready"));
}

void TurnCore::OnSnapshotUnusable(Turn& turn, const absl::Status& why) {
  metrics_->snapshots_dropped.Increment();
  if (turn.session->base_position == turn.snapshot.position()) {
    return Fail(turn, BaseLost(turn.session_id, turn.snapshot.position(), why.message()));
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
  world_->Run(World::Queue::kSnapshot,
              [this, drop = std::move(drop)] { (void)catalog_->DropSnapshot(drop, StoreDeadline()); });
}

void TurnCore::RemoveSequence(Turn& turn) {
  if (turn.lane != nullptr) turn.lane->scheduler.Cancel(turn.sequence);
  LeaveSlot(turn);
  turn.phase = Phase::kComputed;
  KeepSlot(turn);
}

void TurnCore::LeaveSlot(Turn& turn) {
  by_sequence_.erase(turn.sequence);
  turn.sequence = 0;
  turn.lane = nullptr;
  turn.tail.clear();
  turn.tail_pending = false;
  turn.yielding = false;
  turn.attach_since = absl::InfiniteFuture();
  turn.kind->LeftSlot();
}

}  // namespace rwkv::router
