// Epochs, attaching, feeding, results, saving: all that the engine does with the pipeline.
#include <algorithm>
#include <utility>
#include <variant>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "services/common/grpc_status.h"
#include "services/common/logging.h"
#include "services/common/sampling/sampling_params.h"
#include "services/router/turns/embedding.h"
#include "services/router/turns/engine.h"

namespace rwkv::router {
namespace {

// Of a refusal, in the error that ends a turn.
constexpr size_t kMaxErrorBytes = 2048;

using Kind = Turn::Kind;
using Phase = Turn::Phase;

// Logits that may be on their way to one client, of all steps together.
constexpr int64_t kLogitsWindowBytes = 8 << 20;
// Messages that may wait in the stream of a client of Logits or ScoreDocument.
constexpr size_t kQueuedMessages = 4;
// Tokens of a document that may be on their way, or scored and not sent.
constexpr uint64_t kDocumentWindow = 16384;

}  // namespace

void TurnManager::Engine::OnEpochUp(uint64_t epoch, const StagePlan& plan) {
  auto model =
      std::make_shared<const ServingModel>(MakeServingModel(plan.model, tokenizers_, options_.unusable_tokenizers));
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
  const auto work = [this, find = std::move(find), fresh = turn->no_snapshot || turn->patience.leaves_snapshots(),
                     begin = turn->begin] {
    Located located;
    const absl::Time deadline = StoreDeadline();
    if (!fresh) {
      absl::StatusOr<v1::FindSnapshotResponse> found = catalog_->FindSnapshot(find, deadline);
      located.status = found.status();
      if (!found.ok()) return located;
      located.manifest = *std::move(found->mutable_manifest());
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

void TurnManager::Engine::DropOwn(Turn& turn) {
  if (turn.own_snapshot.snapshot_id().empty()) return;
  v1::DropSnapshotRequest drop;
  drop.set_snapshot_id(turn.own_snapshot.snapshot_id());
  turn.own_snapshot.Clear();
  // If it stays, it is swept as an orphan.
  executor_.TryRun([this, drop = std::move(drop)] { (void)catalog_->DropSnapshot(drop, StoreDeadline()); });
  if (scheduler_ != nullptr) scheduler_->DropWarm(WarmSession(turn));
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

void TurnManager::Engine::FeedKnown(Turn& turn) {
  uint64_t end = turn.FeedEnd();
  // After a loss: what the client has is fed, and not returned again.
  if (turn.kind == Kind::kLogits) end = turn.logits_received;
  if (turn.kind == Kind::kDocument) end = turn.scores_sent;
  if (end <= turn.fed_end) return;
  scheduler_->Feed(turn.sequence, static_cast<int64_t>(end - turn.fed_end), Scheduler::FeedKind::kPrefill);
  turn.fed_end = end;
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

void TurnManager::Engine::OnStep(const v1::StepResult& result) {
  scheduler_->OnStepDone(result.step_id());
  last_progress_ = Now();
  for (const v1::EntryResult& entry : result.entries()) {
    const auto it = by_sequence_.find(entry.sequence());
    if (it == by_sequence_.end()) continue;  // Cancelled meanwhile.
    const TurnPtr turn = it->second;
    OnEntry(*turn, entry);
  }
}

void TurnManager::Engine::OnEntry(Turn& turn, const v1::EntryResult& result) {
  const absl::Status status = common::FromStatusProto(result.status());
  if (!status.ok()) return OnEntryFailed(turn, status);
  turn.done_end = result.position();
  turn.patience.Came(turn.done_end);
  turn.scores.insert(turn.scores.end(), result.scores().begin(), result.scores().end());
  if (turn.kind == Kind::kEmbed && turn.done_end == turn.KnownEnd()) {
    turn.embedding = EmbeddingBytes(turn.embed.source(), result);
  }
  if (!result.has_token_id()) return;
  if (!turn.WantsToken() || result.position() != turn.KnownEnd()) {
    return OnEntryFailed(turn, absl::InternalError(absl::StrCat("a token for position ", result.position(),
                                                                " came while ", turn.KnownEnd(), " are known")));
  }
  const absl::Time now = Now();
  if (turn.last_token.has_value()) {
    metrics_->inter_token_seconds.Observe(std::max(0.0, absl::ToDoubleSeconds(now - *turn.last_token)));
  }
  if (!turn.first_token.has_value()) turn.first_token = now;
  turn.last_token = now;
  metrics_->generated_tokens.Increment();
  turn.answer->Push(result.token_id(), result.logprob(), {result.top_logprobs().begin(), result.top_logprobs().end()});
  if (turn.answer->finished() && !turn.HasLog()) metrics_->CountFinish(turn.answer->reason());
}

void TurnManager::Engine::OnEntryFailed(Turn& turn, const absl::Status& status) {
  common::LogWarning("step_entry_failed", {{"position", turn.done_end}, {"status", status}});
  RemoveSequence(turn);
  turn.no_warm = true;
  const Patience::Verdict verdict = turn.patience.EntryFailed(status.code());
  turn.not_before = Now() + options_.retry_delay * std::min(turn.patience.failures(), 5);
  Park(turn);
  if (verdict == Patience::Verdict::kRefused) {
    Refuse(turn, absl::Status(status.code(),
                              absl::StrCat("the model does not go on after ", turn.patience.furthest(), " tokens: ",
                                           absl::string_view(status.message()).substr(0, kMaxErrorBytes))));
  } else if (verdict == Patience::Verdict::kGiveUp) {
    Fail(turn, status);
  }
}

void TurnManager::Engine::OnLogits(const v1::LogitsRows& rows) {
  const auto it = by_sequence_.find(rows.sequence());
  if (it == by_sequence_.end()) return;
  Turn& turn = *it->second;
  if (turn.logits_stream == nullptr || rows.first_position() != turn.logits_received) return;
  v1::LogitsResponse response;
  response.set_first_row(rows.first_position());
  response.set_rows(rows.rows());
  response.set_vocab_size(turn.model->info.vocab_size());
  response.set_logits(rows.logits());
  turn.logits_received += rows.rows();
  turn.logits_stream->Send(std::move(response));
}

void TurnManager::Engine::OnSaved(const v1::SnapshotSaved& saved) {
  const auto it = saves_.find(saved.snapshot_id());
  if (it == saves_.end()) return;
  PendingSave& save = it->second;
  const absl::Status status = common::FromStatusProto(saved.status());
  if (!status.ok() && save.status.ok()) save.status = status;
  save.records.insert(save.records.end(), saved.records().begin(), saved.records().end());
  --save.answers_left;
}

bool TurnManager::Engine::Lagging(const Turn& turn) const {
  const uint64_t size = turn.answer->size();
  if (turn.HasLog() && size - turn.durable >= static_cast<uint64_t>(options_.max_uncommitted_tokens)) return true;
  return (turn.HasLog() ? turn.durable : size) >= turn.sent + options_.max_stream_messages;
}

void TurnManager::Engine::Advance(Turn& turn) {
  const bool idle = turn.done_end == turn.fed_end && !turn.tail_pending;  // Everything fed has come back.
  if (turn.yielding && !turn.decided()) {
    // What came back is with the client, or can be sent at any time.
    const bool passed_on = turn.kind == Kind::kDocument ? turn.scores.empty() : turn.logits_received >= turn.done_end;
    if (idle && (turn.kind == Kind::kGenerate || passed_on)) return Yield(running_.at(turn.id));
    if (turn.kind != Kind::kDocument) return;
  }
  switch (turn.kind) {
    case Kind::kGenerate: {
      if (turn.spec.max_tokens() == 0 && idle && turn.fed_end == turn.FeedEnd() && !turn.decided()) {
        turn.answer->Finish(v1::FINISH_REASON_LENGTH, absl::nullopt, "");
        if (!turn.HasLog()) metrics_->CountFinish(v1::FINISH_REASON_LENGTH);
      }
      if (turn.decided() && !turn.HasLog()) return RemoveSequence(turn);
      if (turn.decided()) {
        if (idle) SaveAndRetire(turn);
        return;
      }
      if (turn.fed_end < turn.FeedEnd() && !turn.tail_pending && !Lagging(turn)) {
        scheduler_->Feed(turn.sequence, static_cast<int64_t>(turn.FeedEnd() - turn.fed_end),
                         Scheduler::FeedKind::kDecode);
        turn.fed_end = turn.FeedEnd();
        return;
      }
      if (turn.HasLog() && turn.saves == 0 &&
          turn.planned_end >= turn.saved_position + options_.snapshot_interval_tokens &&
          saves_.size() < kSavesPerSlot * plan_.slots) {
        Save(turn);
      }
      return;
    }
    case Kind::kScore: {
      if (!idle || turn.done_end < turn.KnownEnd()) return;
      if (auto done = std::exchange(turn.score_done, nullptr)) {
        v1::ScoreResponse response;
        response.mutable_token_ids()->Add(turn.prompt.begin(), turn.prompt.end());
        response.add_token_ids(turn.last_target);
        response.mutable_logprobs()->Add(turn.scores.begin(), turn.scores.end());
        done(std::move(response));
      }
      EndCall(turn, absl::OkStatus());
      return RemoveSequence(turn);
    }
    case Kind::kDocument: {
      if (turn.document_stream == nullptr) return;
      if (!turn.scores.empty() && HasRoom(turn, turn.document_stream->queued())) SendScores(turn);
      if (turn.stopped) return;
      if (turn.scores_sent == turn.KnownEnd()) {
        EndCall(turn, absl::OkStatus());
        return RemoveSequence(turn);
      }
      const uint64_t ahead = turn.fed_end - turn.scores_sent;
      if (turn.yielding || turn.fed_end == turn.KnownEnd() || turn.done_end < turn.scores_sent ||
          ahead > kDocumentWindow / 2)
        return;
      const uint64_t tokens = std::min(kDocumentWindow - ahead, turn.KnownEnd() - turn.fed_end);
      scheduler_->Feed(turn.sequence, static_cast<int64_t>(tokens), Scheduler::FeedKind::kPrefill);
      turn.fed_end += tokens;
      return;
    }
    case Kind::kLogits: {
      if (!idle || turn.logits_received < turn.fed_end || turn.logits_stream == nullptr) return;
      if (turn.fed_end == turn.KnownEnd()) {
        EndCall(turn, absl::OkStatus());
        return RemoveSequence(turn);
      }
      if (!HasRoom(turn, turn.logits_stream->queued())) return;
      const int64_t row_bytes = static_cast<int64_t>(turn.model->info.vocab_size()) * sizeof(float);
      const uint64_t window = std::max<int64_t>(1, kLogitsWindowBytes / row_bytes);
      const uint64_t rows = std::min(window, turn.KnownEnd() - turn.fed_end);
      scheduler_->Feed(turn.sequence, static_cast<int64_t>(rows), Scheduler::FeedKind::kPrefill);
      turn.fed_end += rows;
      return;
    }
    case Kind::kEmbed: {
      if (!idle || turn.done_end < turn.KnownEnd() || turn.embed_done == nullptr) return;
      absl::StatusOr<v1::EmbedResponse> response =
          MakeEmbedding(turn.embed, turn.embedding, static_cast<uint32_t>(turn.prompt.size()));
      if (!response.ok()) return Fail(turn, response.status());
      std::exchange(turn.embed_done, nullptr)(*std::move(response));
      EndCall(turn, absl::OkStatus());
      return RemoveSequence(turn);
    }
    case Kind::kExport: {
      if (!idle || turn.fed_end < turn.KnownEnd() || !turn.export_snapshot.empty()) return;
      if (!Save(turn)) return Fail(turn, absl::InternalError("the state could not be saved"));
      return;
    }
    case Kind::kExclusive:
      return;
  }
}

bool TurnManager::Engine::HasRoom(Turn& turn, size_t queued) {
  if (queued < kQueuedMessages) {
    turn.stalled_since = absl::InfiniteFuture();
    return true;
  }
  const absl::Time now = Now();
  if (turn.stalled_since == absl::InfiniteFuture() || queued < turn.stalled_at) turn.stalled_since = now;
  turn.stalled_at = queued;
  if (now - turn.stalled_since > options_.slow_client_timeout) {
    Fail(turn, absl::ResourceExhaustedError("the client does not read"));
  }
  return false;
}

void TurnManager::Engine::SendScores(Turn& turn) {
  v1::ScoreDocumentResponse response;
  response.set_token_count(turn.prompt.size() + 1);
  response.set_first(turn.scores_sent + 1);
  for (size_t i = 0; i < turn.scores.size(); ++i) response.add_token_ids(turn.ScoreTarget(turn.scores_sent + i));
  response.mutable_logprobs()->Add(turn.scores.begin(), turn.scores.end());
  turn.scores_sent += turn.scores.size();
  turn.scores.clear();
  turn.document_stream->Send(std::move(response));
}

void TurnManager::Engine::Yield(const TurnPtr& turn) {
  if (turn->planned_end > turn->saved_position) Save(*turn);
  scheduler_->Retire(turn->sequence, WarmSession(*turn), WarmBranch(*turn));
  by_sequence_.erase(turn->sequence);
  turn->sequence = 0;
  turn->tail.clear();
  turn->yielding = false;
  turn->phase = Phase::kYielded;
  ++yielded_;
  waiting_.push_back(turn);
  metrics_->yielded_turns.Increment();
}

bool TurnManager::Engine::Save(Turn& turn) {
  const absl::optional<uint64_t> position = scheduler_->Save(turn.sequence);
  if (!position.has_value()) return false;
  PendingSave save;
  save.snapshot_id = absl::StrFormat("%016x%016x", random_(), random_());
  save.session_id = turn.session_id;
  save.model_fingerprint = turn.model->info.fingerprint();
  save.turn_id = turn.id;
  save.position = *position;
  save.answers_left = static_cast<int>(plan_.stages.size());
  save.deadline = Now() + options_.save_timeout;
  save_ids_[{turn.sequence, *position}] = save.snapshot_id;
  if (turn.kind == Kind::kExport) turn.export_snapshot = save.snapshot_id;
  turn.saved_position = *position;
  ++turn.saves;
  if (turn.session != nullptr) ++turn.session->saves;
  saves_[save.snapshot_id] = std::move(save);
  return true;
}

void TurnManager::Engine::SaveAndRetire(Turn& turn) {
  if (turn.planned_end > turn.saved_position) Save(turn);
  scheduler_->Retire(turn.sequence, turn.session_id, turn.session->log_branch);
  by_sequence_.erase(turn.sequence);
  turn.sequence = 0;
  turn.tail.clear();
  turn.phase = Phase::kComputed;
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

void TurnManager::Engine::FillAttach(const AttachCommand& command, v1::AttachSequence* attach) {
  attach->set_slot(command.slot);
  attach->set_sequence(command.sequence);
  attach->set_position(command.position);
  if (command.warm_sequence.has_value()) attach->set_warm_sequence(*command.warm_sequence);
  const auto it = by_sequence_.find(command.sequence);
  if (it == by_sequence_.end()) {  // Cancelled before it was sent; its release follows.
    *attach->mutable_sampling() = common::CompleteSampling(v1::Sampling(), 0);
    if (!command.warm_sequence.has_value()) attach->set_fresh(true);
    return;
  }
  Turn& turn = *it->second;
  turn.attach_since = Now();
  if (command.warm_sequence.has_value()) {
    // Said above.
  } else if (!turn.snapshot.snapshot_id().empty()) {
    *attach->mutable_snapshot() = turn.snapshot;
  } else {
    attach->set_fresh(true);
    attach->set_initial_state(turn.initial_state);
  }
  *attach->mutable_sampling() =
      turn.kind == Kind::kGenerate ? turn.spec.sampling() : common::CompleteSampling(v1::Sampling(), 0);
  attach->mutable_turn_token_ids()->Add(turn.counted.begin(), turn.counted.end());
  if (turn.answer.has_value()) {
    attach->mutable_turn_token_ids()->Add(turn.answer->ids().begin(), turn.answer->ids().end());
  }
  attach->mutable_banned_token_ids()->Add(turn.model->banned_token_ids.begin(), turn.model->banned_token_ids.end());
}

void TurnManager::Engine::FillStep(const StepCommand& command, v1::Step* step) {
  step->set_step_id(command.step_id);
  int rows = 0;
  for (const StepCommand::Entry& planned : command.entries) {
    Turn& turn = *by_sequence_.at(planned.sequence);
    v1::StepEntry& entry = *step->add_entries();
    entry.set_slot(planned.slot);
    entry.set_sequence(planned.sequence);
    entry.set_expected_position(planned.position);
    const uint64_t end = planned.position + planned.tokens;
    const bool scores =
        turn.kind == Kind::kScore || (turn.kind == Kind::kDocument && planned.position >= turn.scores_sent);
    for (uint64_t position = planned.position; position < end; ++position) {
      entry.add_token_ids(turn.TokenAt(position));
      if (scores) entry.add_score_token_ids(turn.ScoreTarget(position));
    }
    entry.set_sample(turn.WantsToken() && end == turn.KnownEnd());
    entry.set_logits(turn.kind == Kind::kLogits && planned.position >= turn.logits_received);
    if (turn.kind == Kind::kEmbed) AskForEmbedding(turn.embed.source(), end == turn.KnownEnd(), &entry);
    turn.planned_end = end;
    if (end >= turn.begin && !turn.tail.empty()) std::vector<uint32_t>().swap(turn.tail);
    if (!turn.first_rows.has_value()) {
      turn.first_rows = Now();
      metrics_->queue_seconds.Observe(std::max(0.0, absl::ToDoubleSeconds(*turn.first_rows - turn.arrival)));
    }
    rows += planned.tokens;
  }
  metrics_->batch_rows.Observe(rows);
}

void TurnManager::Engine::SendCommands() {
  if (scheduler_ == nullptr) return;
  if (scheduler_->steps_in_flight() == 0) last_progress_ = Now();
  for (const Command& planned : scheduler_->Plan()) {
    auto command = std::make_shared<v1::ExecuteRequest>();
    if (const auto* attach = std::get_if<AttachCommand>(&planned)) {
      FillAttach(*attach, command->mutable_attach());
    } else if (const auto* step = std::get_if<StepCommand>(&planned)) {
      FillStep(*step, command->mutable_step());
    } else if (const auto* save = std::get_if<SaveCommand>(&planned)) {
      const auto id = save_ids_.find({save->sequence, save->position});
      if (id == save_ids_.end()) continue;
      command->mutable_save()->set_slot(save->slot);
      command->mutable_save()->set_sequence(save->sequence);
      command->mutable_save()->set_expected_position(save->position);
      command->mutable_save()->set_snapshot_id(id->second);
      save_ids_.erase(id);
    } else if (const auto* release = std::get_if<ReleaseCommand>(&planned)) {
      command->mutable_release()->set_slot(release->slot);
      command->mutable_release()->set_sequence(release->sequence);
    }
    // Not sent: the epoch is over, and EpochDown is on its way.
    if (!pipeline_.Send(epoch_, std::move(command))) return;
  }
}

void TurnManager::Engine::Watch() {
  if (epoch_ == 0) return;
  const absl::Time now = Now();
  if (scheduler_->steps_in_flight() > 0 && now - last_progress_ > options_.progress_timeout) {
    pipeline_.EndEpoch(epoch_, absl::UnavailableError(absl::StrCat(
                                   "no step came back for ", absl::FormatDuration(options_.progress_timeout), "; ",
                                   scheduler_->steps_in_flight(), " are in flight")));
    last_progress_ = now;
  }
  for (const auto& [sequence, turn] : by_sequence_) {
    if (now - turn->attach_since <= options_.attach_timeout) continue;
    const absl::Status late = absl::UnavailableError(
        absl::StrCat("a slot was not attached within ", absl::FormatDuration(options_.attach_timeout)));
    const TurnPtr waiting = turn;  // What follows takes it out.
    if (waiting->patience.AttachTimedOut() == Patience::Verdict::kGiveUp) {
      Fail(*waiting, common::WithRetryInfo(late, absl::Seconds(1)));
    }
    pipeline_.EndEpoch(epoch_, late);
    return;
  }
}

}  // namespace rwkv::router
