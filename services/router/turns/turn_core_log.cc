// Turns in the log: how they are opened, committed, and lost.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "services/common/grpc_status.h"
#include "services/common/logging.h"
#include "services/router/turns/turn_core.h"
#include "services/router/turns/turn_input.h"

namespace rwkv::router {
namespace {

using Phase = Turn::Phase;

constexpr absl::Duration kAskAgainForLease = absl::Seconds(1);

}  // namespace

absl::Status TurnCore::StoreError(const absl::Status& status) const {
  if (absl::IsAborted(status) && !common::GetRetryDelay(status).has_value()) {
    return common::WithRetryInfo(status, options_.retry_delay);  // Read again, then go on.
  }
  // Whoever has the session may give it back long before its lease runs out, as soon as a snapshot is there.
  if (common::GetErrorReason(status) == "LEASE_HELD") {
    return common::WithRetryInfo(status, std::min(*common::GetRetryDelay(status), kAskAgainForLease));
  }
  if (!MayHaveHappened(status)) return status;
  return common::WithRetryInfo(
      absl::UnavailableError(absl::StrCat("the state store cannot be reached: ", status.message())), absl::Seconds(1));
}

void TurnCore::OpenTurn(const TurnPtr& turn) {
  turn->phase = Phase::kOpening;
  const Session& session = *turn->session;
  OpeningRequest request;
  request.acquire = sessions_.AcquireRequest(turn->session_id);
  if (session.leased && !session.stale) {
    request.lease = session.lease;
    request.session_tokens = session.durable_length;
    request.session_state = session.initial_state;
    request.session_base = session.base_position;
    request.session_log_begin = session.log_begin;
  }
  request.begins = turn->HasLog();
  request.begin.set_request_id(turn->request_id);
  request.begin.mutable_token_ids()->Add(turn->prompt.begin(), turn->prompt.end());
  request.begin.set_model_fingerprint(turn->model->info.fingerprint());
  request.spec = turn->spec;
  request.named = turn->named;
  request.resume_from = turn->resume_from;
  request.named_state = turn->initial_state;
  request.input_field = turn->input_field;
  const Pool& pool = placement_.pools().at(turn->pool);
  request.model = pool.model;
  request.spec.set_numeric_family(pool.numeric_family);

  TraceStage(*turn);
  const auto work = [this, request = std::move(request)] { return Open(request, StoreDeadline(), catalog_); };
  const auto then = [this, turn](Opened opened) { OnOpened(turn, opened); };
  if (!RunStoreJob<Opened>(world_, Traced<Opened>(turn->trace, work), then)) {
    turn->phase = Phase::kComputed;
    Fail(*turn, common::WithRetryInfo(absl::ResourceExhaustedError("too many calls to the state store wait"),
                                      absl::Seconds(1)));
  }
}

void TurnCore::OnOpened(const TurnPtr& turn, const Opened& opened) {
  Session& session = *turn->session;
  turn->phase = Phase::kComputed;  // Unless there is something to compute.
  if (opened.lease.has_value()) {
    session.leased = true;
    session.stale = false;
    session.lease = opened.lease->lease();
    session.log_branch = opened.lease->log_branch();
    session.model_fingerprint = opened.lease->session().model_fingerprint();
    session.initial_state = opened.lease->session().initial_state();
    session.base_position = BasePosition(opened.lease->session());
    session.log_begin = opened.lease->session().log_begin();
    session.durable_length = opened.lease->session().token_count();
  }
  absl::Status status = opened.status;
  if (absl::IsAborted(status)) session.stale = true;
  if (!status.ok()) return Fail(*turn, StoreError(status));
  if (turn->stopped) return;
  turn->initial_state = session.initial_state;
  if (!turn->HasLog()) {
    ChooseModelOf(session, *turn);
    if (!session.model_fingerprint.empty() && session.model_fingerprint != turn->model->info.fingerprint()) {
      return Fail(*turn, absl::FailedPreconditionError(absl::StrCat("session \"", session.id,
                                                                    "\" belongs to the model with fingerprint ",
                                                                    session.model_fingerprint)));
    }
    turn->begin = session.durable_length;
    return Park(*turn);
  }
  session.durable_length = opened.begun.session_tokens();
  session.model_fingerprint = turn->model->info.fingerprint();
  status = TakeUp(*turn, opened);
  if (!status.ok()) return Fail(*turn, status);
  // A finished turn is only told again. One that has its end but not in the log gets it with the next commit.
  if (!turn->decided()) Park(*turn);
}

// A call that names no model means the session's.
void TurnCore::ChooseModelOf(const Session& session, Turn& turn) {
  if (session.model_fingerprint.empty() || session.model_fingerprint == turn.model->info.fingerprint()) return;
  const std::shared_ptr<const ServingModel> model = world_->FindModel(session.model_fingerprint);
  if (model == nullptr) return;
  turn.model = model;
  for (const auto& [name, pool] : placement_.pools()) {
    if (pool.model.fingerprint() == session.model_fingerprint) turn.pool = name;
  }
}

// Takes over what the log says of the turn.
absl::Status TurnCore::TakeUp(Turn& turn, const Opened& opened) {
  const v1::Turn& known = opened.begun.turn();
  turn.begin = known.begin();
  if (opened.begun.existed()) {
    if (known.prompt_count() != turn.prompt.size() ||
        !std::equal(turn.prompt.begin(), turn.prompt.end(), opened.logged.begin())) {
      turn.abandoned = true;
      return common::InvalidFieldError("request_id", "names a turn with another input");
    }
    if (absl::Status same = CheckSameSpec(opened.spec, turn.spec); !same.ok()) {
      turn.abandoned = true;
      return same;
    }
  }
  turn.spec = opened.spec;
  // A turn that another router began goes on among lanes of the family that it began with.
  if (!turn.spec.numeric_family().empty()) {
    turn.pool = PoolName(turn.model->info.fingerprint(), turn.spec.numeric_family());
  }
  turn.counted = opened.counted;
  turn.answer.emplace(turn.model->tokenizer, turn.spec);
  for (size_t i = known.prompt_count(); i < opened.logged.size(); ++i) {
    const size_t generated = i - known.prompt_count();
    turn.answer->PushLogged(opened.logged[i], generated < known.logprobs_size() ? known.logprobs(generated) : 0.0f);
  }
  turn.durable = turn.answer->size();
  if (known.state() == v1::TURN_STATE_FINISHED) {
    turn.answer->Finish(known.finish_reason(),
                        known.has_stop_token_id() ? absl::make_optional(known.stop_token_id()) : absl::nullopt,
                        known.stop_string());
    if (known.has_error()) turn.error = common::FromStatusProto(known.error());
    turn.finish_durable = true;
  }
  if (turn.resume_from > turn.answer->size()) {
    return absl::OutOfRangeError(
        absl::StrCat("resume_from ", turn.resume_from, " is beyond the ", turn.answer->size(), " tokens of the turn"));
  }
  turn.sent = turn.resume_from;
  return absl::OkStatus();
}

void TurnCore::RunExclusive(const TurnPtr& turn) {
  turn->phase = Phase::kOpening;
  TraceStage(*turn);
  v1::AcquireLeaseRequest acquire = sessions_.AcquireRequest(turn->session_id);
  const auto work = [this, job = turn->kind->job(), acquire = std::move(acquire)] {
    Opened opened;
    absl::StatusOr<v1::AcquireLeaseResponse> lease = catalog_->AcquireLease(acquire, StoreDeadline());
    opened.status = lease.status();
    if (!lease.ok()) return opened;
    opened.lease = *std::move(lease);
    opened.status = job(*opened.lease);
    return opened;
  };
  const auto then = [this, turn](Opened opened) {
    Session& session = *turn->session;
    if (opened.lease.has_value()) {
      session.leased = true;
      session.lease = opened.lease->lease();
    }
    // What was refused has changed nothing; after anything else the log is read again.
    const bool changed = opened.lease.has_value() && (opened.status.ok() || MayHaveHappened(opened.status));
    session.stale = changed || !opened.status.ok();
    if (changed) placement_.DropWarm(session.id);
    if (turn->kind->deletes() && opened.status.ok()) session.leased = false;  // It went with the session.
    turn->phase = Phase::kComputed;
    EndCall(*turn, opened.status.ok() ? opened.status : StoreError(opened.status));
    turn->stopped = true;
  };
  if (!RunStoreJob<Opened>(world_, Traced<Opened>(turn->trace, work), then)) {
    turn->phase = Phase::kComputed;
    Fail(*turn, common::WithRetryInfo(absl::ResourceExhaustedError("too many calls to the state store wait"),
                                      absl::Seconds(1)));
  }
}

void TurnCore::SweepCommits() {
  log_writer_.Sweep(stopping_);
  if (log_writer_.busy()) return;
  LogWriter::Batch batch;
  for (auto& [id, turn] : running_) {
    if (batch.full()) break;
    if (!turn->HasLog() || turn->session == nullptr || !turn->session->leased || CommitClean(*turn)) continue;
    batch.Add(*turn);
    turn->committing = true;
  }
  if (!batch.items.empty()) log_writer_.Begin(std::move(batch), StoreDeadline());
}

void TurnCore::OnCommitted(const std::vector<LogWriter::Item>& items, absl::Duration took) {
  metrics_->store_commit_seconds.Observe(absl::ToDoubleSeconds(took));
  if (std::any_of(items.begin(), items.end(), [](const LogWriter::Item& item) { return item.status.ok(); })) {
    metrics_->last_commit_timestamp_seconds.Set(absl::ToDoubleSeconds(Now() - absl::UnixEpoch()));
  }
  for (const LogWriter::Item& result : items) {
    const auto it = running_.find(result.turn_id);
    if (it == running_.end()) continue;
    const TurnPtr turn = it->second;
    turn->committing = false;
    Session& session = *turn->session;  // Kept while its turn is committing.
    if (result.status.ok()) {
      turn->durable += result.tokens;
      if (result.finish) {
        turn->finish_durable = true;
        metrics_->CountFinish(turn->answer->reason());
      }
      session.durable_length = turn->begin + turn->prompt.size() + turn->durable;
      continue;
    }
    common::LogWarning("commit_failed", {{"status", result.status}});
    // What is not in the log has never been: neither slot nor snapshot may hold it.
    turn->abandoned = true;
    session.stale = true;
    Fail(*turn, StoreError(result.status));
    if (turn->sequence != 0) RemoveSequence(*turn);
    placement_.DropWarm(session.id);
    saves_.EndBeyond(session, absl::AbortedError("its tokens are not in the log"));
  }
}

void TurnCore::OnLeaseLost(Session& session) {
  placement_.DropWarm(session.id);
  if (session.turn == nullptr) return;
  const TurnPtr turn = session.turn;
  turn->abandoned = true;
  Fail(*turn, common::WithRetryInfo(absl::AbortedError("another router has taken over the session"), absl::Seconds(1)));
}

}  // namespace rwkv::router
