// Epochs, and giving a turn its slot: where its state is, attaching.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "services/common/grpc_status.h"
#include "services/common/logging.h"
#include "services/router/turns/engine.h"

namespace rwkv::router {
namespace {

using Kind = Turn::Kind;
using Phase = Turn::Phase;

// No log stands for what a session was imported with.
absl::Status BaseLost(const std::string& session_id, uint64_t position, absl::string_view why) {
  return absl::DataLossError(absl::StrCat("session \"", session_id, "\" was imported with a state at position ",
                                          position, ", which cannot be read any more: ", why));
}

}  // namespace

void TurnManager::Engine::OnEpochUp(uint64_t epoch, const StagePlan& plan) {
  auto model = std::make_shared<ServingModel>(MakeServingModel(plan.model, tokenizers_, options_.unusable_tokenizers));
  model->state_layout = plan.state_layout;
  {
    absl::MutexLock lock(&mu_);
    model_ = std::move(model);
  }
  loop_->Post([this, epoch, plan] { EpochUp(epoch, plan); });
}

void TurnManager::Engine::OnResponse(uint64_t epoch, int stage, v1::ExecuteResponse response) {
  auto shared = std::make_shared<const v1::ExecuteResponse>(std::move(response));
  loop_->Post([this, epoch, stage, shared] { Handle(epoch, stage, *shared); });
}

void TurnManager::Engine::OnEpochDown(uint64_t epoch, const absl::Status& why) {
  loop_->Post([this, epoch, why] { EpochDown(epoch, why); });
}

void TurnManager::Engine::EpochUp(uint64_t epoch, const StagePlan& plan) {
  epoch_ = epoch;
  plan_ = plan;
  Scheduler::Options options;
  options.stages = static_cast<int>(plan.stages.size());
  options.slots = plan.slots;
  options.max_batch_rows = plan.max_batch_rows;
  options.max_sequences = options_.max_running;
  scheduler_ = std::make_unique<Scheduler>(options);
  last_progress_ = Now();
  metrics_->epochs.Increment();
  if (!std::exchange(ready_, true) && options_.on_ready) options_.on_ready();
}

void TurnManager::Engine::EpochDown(uint64_t epoch, const absl::Status& why) {
  if (epoch != epoch_) return;
  epoch_ = 0;
  scheduler_ = nullptr;
  by_sequence_.clear();
  save_ids_.clear();
  if (!stopping_) metrics_->epochs_lost.Increment();
  std::vector<std::string> lost;
  for (const auto& [id, save] : saves_) {
    if (!save.committing && save.answers_left > 0) lost.push_back(id);
  }
  for (auto& [id, turn] : running_) {
    if (turn->sequence == 0) continue;
    const bool computing = turn->phase == Phase::kRunning ? turn->planned_end > turn->attach_position
                                                          : turn->attach_since != absl::InfiniteFuture();
    turn->sequence = 0;
    turn->yielding = false;
    turn->tail.clear();
    turn->tail_pending = false;
    turn->attach_since = absl::InfiniteFuture();
    turn->export_snapshot.clear();
    if (turn->decided() || turn->stopped) {
      turn->phase = Phase::kComputed;  // Its state is not in a slot any more; the log has it all.
    } else {
      Park(*turn);
      metrics_->recovered_turns.Increment();
      if (computing && turn->patience.EpochLost() == Patience::Verdict::kGiveUp) {
        Fail(*turn,
             common::WithRetryInfo(absl::UnavailableError(absl::StrCat("the pipeline was lost ", Patience::kLostEpochs,
                                                                       " times while the turn was at position ",
                                                                       turn->patience.furthest(), ": ", why.message())),
                                   absl::Seconds(1)));
      }
    }
  }
  for (const std::string& id : lost) EndSave(id, why);
}

void TurnManager::Engine::Handle(uint64_t epoch, int stage, const v1::ExecuteResponse& response) {
  if (epoch != epoch_) return;
  switch (response.result_case()) {
    case v1::ExecuteResponse::kAttached:
      return OnAttachAnswer(response.attached());
    case v1::ExecuteResponse::kLogits:
      return OnLogits(response.logits());
    case v1::ExecuteResponse::kStep:
      return OnStep(response.step());
    case v1::ExecuteResponse::kSaved:
      return OnSaved(response.saved());
    case v1::ExecuteResponse::kOpened:
    case v1::ExecuteResponse::RESULT_NOT_SET:
      pipeline_.EndEpoch(epoch, absl::InternalError(absl::StrCat("stage ", stage, " sent an answer to nothing")));
      return;
  }
}

void TurnManager::Engine::Park(Turn& turn) {
  if (turn.parked_since == absl::InfiniteFuture()) turn.parked_since = Now();
  turn.phase = Phase::kParked;
}

void TurnManager::Engine::Locate(const TurnPtr& turn) {
  if (const absl::Status status = CheckServed(*turn); !status.ok()) return Fail(*turn, status);
  turn->snapshot.Clear();
  turn->warm_source = absl::nullopt;
  turn->tail.clear();
  const uint64_t at_most = turn->StateEnd();
  if (turn->kind != Kind::kExport && LocateWarm(turn, 0, at_most)) return;
  if (turn->session == nullptr) {
    turn->snapshot = turn->own_snapshot;
    return Admit(turn, turn->snapshot.position());
  }

  turn->phase = Phase::kLocating;
  v1::FindSnapshotRequest find;
  find.set_session_id(turn->session_id);
  find.set_at_or_before(std::min(at_most, turn->snapshot_limit));
  find.set_model_fingerprint(plan_.model.fingerprint());
  const absl::optional<uint64_t> base = turn->session->base_position;
  const bool restart = turn->no_snapshot || turn->patience.leaves_snapshots();
  if (restart && base.has_value()) find.set_at_or_before(*base);
  const auto work = [this, find = std::move(find), fresh = restart && !base.has_value(), base, begin = turn->begin] {
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
  if (!RunJob<Located>(executor_, work, [this, turn](Located located) { OnLocated(turn, std::move(located)); })) {
    Park(*turn);
    turn->not_before = Now() + options_.retry_delay;
  }
}

bool TurnManager::Engine::LocateWarm(const TurnPtr& turn, uint64_t at_least, uint64_t at_most) {
  if (turn->no_warm) return false;
  const absl::optional<Scheduler::WarmSlot> warm = scheduler_->FindWarm(WarmSession(*turn), WarmBranch(*turn), at_most);
  if (!warm.has_value() || warm->position < at_least) return false;
  const SequenceId sequence = next_sequence_;
  if (!scheduler_->AdmitWarm(sequence, warm->sequence)) return false;
  ++next_sequence_;
  turn->warm_source = warm->sequence;
  BeginAttach(turn, sequence, warm->position);
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
  if (!RunJob<Tail>(
          executor_, [this, read = std::move(read)] { return Tail(catalog_->ReadTokens(read, StoreDeadline())); },
          then)) {
    RemoveSequence(*turn);
    Park(*turn);
    turn->not_before = Now() + options_.retry_delay;
  }
  return true;
}

std::string TurnManager::Engine::WarmSession(const Turn& turn) {
  return turn.session != nullptr ? turn.session_id : absl::StrCat("turn/", turn.id);  // No session's id has a slash.
}

std::string TurnManager::Engine::WarmBranch(const Turn& turn) {
  return turn.session != nullptr ? turn.session->log_branch : std::string();
}

void TurnManager::Engine::OnLocated(const TurnPtr& turn, Located located) {
  if (turn->stopped) {
    turn->phase = Phase::kComputed;
    return;
  }
  if (!located.status.ok()) {
    turn->phase = Phase::kComputed;
    return Fail(*turn, StoreError(located.status));
  }
  if (turn->kind == Kind::kExport && !located.manifest.snapshot_id().empty() &&
      located.manifest.position() == turn->begin) {
    turn->phase = Phase::kComputed;
    if (auto done = std::exchange(turn->export_done, nullptr)) {
      done(ExportedState{std::move(located.manifest), plan_.state_layout});
    }
    return EndCall(*turn, absl::OkStatus());
  }
  if (epoch_ == 0) return Park(*turn);
  if (turn->kind == Kind::kExport && LocateWarm(turn, located.manifest.position(), turn->begin)) return;
  turn->snapshot = std::move(located.manifest);
  turn->tail = std::move(located.tail);
  Admit(turn, turn->snapshot.position());
}

void TurnManager::Engine::Admit(const TurnPtr& turn, uint64_t position) {
  const SequenceId sequence = next_sequence_++;
  if (!scheduler_->Admit(sequence, position)) {
    turn->phase = Phase::kComputed;
    return Fail(*turn, common::WithRetryInfo(absl::ResourceExhaustedError("too many sequences"), absl::Seconds(1)));
  }
  BeginAttach(turn, sequence, position);
  FeedKnown(*turn);
}

void TurnManager::Engine::BeginAttach(const TurnPtr& turn, SequenceId sequence, uint64_t position) {
  by_sequence_[sequence] = turn;
  turn->sequence = sequence;
  turn->phase = Phase::kAttaching;
  turn->parked_since = absl::InfiniteFuture();
  turn->attach_position = position;
  turn->attach_answers_left = static_cast<int>(plan_.stages.size());
  turn->fed_end = position;
  turn->planned_end = position;
  turn->done_end = position;
  turn->saved_position = position;
  turn->attach_since = absl::InfiniteFuture();  // Until there is a slot.
  turn->scores.clear();
}

void TurnManager::Engine::OnAttachAnswer(const v1::SequenceAttached& attached) {
  const auto it = by_sequence_.find(attached.sequence());
  if (it == by_sequence_.end()) return;  // Cancelled meanwhile.
  const TurnPtr turn = it->second;
  const absl::Status status = common::FromStatusProto(attached.status());
  if (!status.ok()) return OnAttachFailed(*turn, status);
  if (--turn->attach_answers_left > 0) return;
  scheduler_->OnAttached(turn->sequence);
  turn->phase = Phase::kRunning;
  turn->attach_since = absl::InfiniteFuture();
  turn->slot_since = Now();
  turn->progress_at_slot = turn->patience.furthest();
  if (turn->attached_once) return;
  turn->attached_once = true;
  turn->reused_tokens = std::min(turn->attach_position, turn->begin);
  metrics_->reused_tokens.Increment(static_cast<double>(turn->reused_tokens));
}

void TurnManager::Engine::OnAttachFailed(Turn& turn, const absl::Status& status) {
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
  if (unusable && !turn.snapshot.snapshot_id().empty()) {
    if (turn.session == nullptr) return DropOwn(turn);
    metrics_->snapshots_dropped.Increment();
    if (turn.session->base_position == turn.snapshot.position()) {
      return Fail(turn, BaseLost(turn.session_id, turn.snapshot.position(), status.message()));
    }
    if (turn.snapshot.position() == 0) {
      turn.no_snapshot = true;
    } else {
      turn.snapshot_limit = turn.snapshot.position() - 1;
    }
    v1::DropSnapshotRequest drop;
    drop.set_session_id(turn.session_id);
    drop.set_snapshot_id(turn.snapshot.snapshot_id());
    drop.set_reason(status.ToString());
    // If it stays, the next one who needs it drops it.
    executor_.TryRun([this, drop = std::move(drop)] { (void)catalog_->DropSnapshot(drop, StoreDeadline()); });
    return;
  }
  const Patience::Verdict verdict = turn.patience.AttachFailed();
  turn.not_before = Now() + options_.retry_delay * std::min(turn.patience.failures(), 5);
  if (turn.session == nullptr && turn.patience.leaves_snapshots()) DropOwn(turn);
  if (verdict != Patience::Verdict::kTryAgain) Fail(turn, common::Annotate(status, "no slot could be made ready"));
}

void TurnManager::Engine::RemoveSequence(Turn& turn) {
  if (scheduler_ != nullptr) scheduler_->Cancel(turn.sequence);
  by_sequence_.erase(turn.sequence);
  turn.sequence = 0;
  turn.tail.clear();
  turn.tail_pending = false;
  turn.yielding = false;
  turn.attach_since = absl::InfiniteFuture();
  turn.phase = Phase::kComputed;
}

}  // namespace rwkv::router
