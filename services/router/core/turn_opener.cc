#include "services/router/core/turn_opener.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "services/common/grpc_status.h"
#include "services/router/core/log_writer.h"
#include "services/router/core/trace_stage.h"
#include "services/router/core/turn_input.h"
#include "services/router/core/turn_lane.h"
#include "services/router/core/turn_trace.h"
#include "services/router/core/world.h"

namespace rwkv::router {
namespace {

using Phase = Turn::Phase;

}  // namespace

TurnOpener::TurnOpener(const CoreContext& context, const Placement& placement, SessionTable* sessions,
                       ClientStreams* streams, TurnSlots* slots, TurnEnds* ends)
    : context_(context), placement_(placement), sessions_(sessions), streams_(streams), slots_(slots), ends_(ends) {}

OpeningRequest TurnOpener::RequestOf(const Turn& turn) const {
  const Session& session = *turn.session;
  OpeningRequest request;
  request.acquire = sessions_->AcquireRequest(turn.session_id);
  if (session.leased && !session.stale) {
    request.lease = session.lease;
    request.session_tokens = session.durable_length;
    request.session_state = session.initial_state;
    request.session_base = session.base_position;
    request.session_log_begin = session.log_begin;
  }
  request.begins = turn.HasLog();
  request.begin.set_request_id(turn.request_id);
  request.begin.mutable_token_ids()->Add(turn.prompt.begin(), turn.prompt.end());
  request.begin.set_model_fingerprint(turn.model->info.fingerprint());
  request.spec = turn.spec;
  request.named = turn.named;
  request.resume_from = turn.resume_from;
  request.named_state = turn.initial_state;
  request.input_field = turn.input_field;
  const Pool& pool = placement_.pools().at(turn.pool());
  request.model = pool.model;
  request.spec.set_numeric_family(pool.numeric_family);
  return request;
}

void TurnOpener::Open(const TurnPtr& turn) const {
  turn->set_phase(Phase::kOpening);
  TraceStage(*turn);
  const auto work = [this, request = RequestOf(*turn)] {
    return router::Open(request, context_.StoreDeadline(), context_.catalog);
  };
  const auto then = [this, turn](Opened opened) { OnOpened(turn, opened); };
  if (!RunStoreJob<Opened>(context_.world, Traced<Opened>(turn->trace, work), then)) FailForRoom(*turn);
}

void TurnOpener::FailForRoom(Turn& turn) const {
  turn.set_phase(Phase::kComputed);
  ends_->Fail(turn, common::WithRetryInfo(absl::ResourceExhaustedError("too many calls to the state store wait"),
                                          absl::Seconds(1)));
}

void TurnOpener::OnOpened(const TurnPtr& turn, const Opened& opened) const {
  Session& session = *turn->session;
  turn->set_phase(Phase::kComputed);  // Unless there is something to compute.
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
  sessions_->Touch(session);
  absl::Status status = opened.status;
  if (absl::IsAborted(status)) session.stale = true;
  if (!status.ok()) return ends_->Fail(*turn, context_.StoreError(status));
  if (turn->stopped) return;
  turn->initial_state = session.initial_state;
  if (!turn->HasLog()) {
    ChooseModelOf(session, *turn);
    if (!session.model_fingerprint.empty() && session.model_fingerprint != turn->model->info.fingerprint()) {
      return ends_->Fail(*turn, absl::FailedPreconditionError(absl::StrCat("session \"", session.id,
                                                                           "\" belongs to the model with fingerprint ",
                                                                           session.model_fingerprint)));
    }
    turn->begin = session.durable_length;
    return slots_->Park(*turn);
  }
  session.durable_length = opened.begun.session_tokens();
  session.model_fingerprint = turn->model->info.fingerprint();
  status = TakeUp(*turn, opened);
  if (!status.ok()) return ends_->Fail(*turn, status);
  // A finished turn is only told again. One that has its end but not in the log gets it with the next commit.
  if (!turn->decided()) slots_->Park(*turn);
}

void TurnOpener::ChooseModelOf(const Session& session, Turn& turn) const {
  if (session.model_fingerprint.empty() || session.model_fingerprint == turn.model->info.fingerprint()) return;
  const std::shared_ptr<const ServingModel> model = context_.world->FindModel(session.model_fingerprint);
  if (model == nullptr) return;
  turn.model = model;
  for (const auto& [name, pool] : placement_.pools()) {
    if (pool.model.fingerprint() == session.model_fingerprint) turn.set_pool(name);
  }
}

absl::Status TurnOpener::TakeUp(Turn& turn, const Opened& opened) {
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
    turn.set_pool(PoolName(turn.model->info.fingerprint(), turn.spec.numeric_family()));
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

void TurnOpener::RunExclusive(const TurnPtr& turn) const {
  turn->set_phase(Phase::kOpening);
  TraceStage(*turn);
  const auto work = [this, job = turn->kind->job(), acquire = sessions_->AcquireRequest(turn->session_id)] {
    Opened opened;
    absl::StatusOr<v1::AcquireLeaseResponse> lease = context_.catalog->AcquireLease(acquire, context_.StoreDeadline());
    opened.status = lease.status();
    if (!lease.ok()) return opened;
    opened.lease = *std::move(lease);
    opened.status = job(*opened.lease);
    return opened;
  };
  const auto then = [this, turn](Opened opened) { OnExclusive(*turn, opened); };
  if (!RunStoreJob<Opened>(context_.world, Traced<Opened>(turn->trace, work), then)) FailForRoom(*turn);
}

void TurnOpener::OnExclusive(Turn& turn, const Opened& opened) const {
  Session& session = *turn.session;
  if (opened.lease.has_value()) {
    session.leased = true;
    session.lease = opened.lease->lease();
  }
  sessions_->Touch(session);
  // What was refused has changed nothing; after anything else the log is read again.
  const bool changed = opened.lease.has_value() && (opened.status.ok() || MayHaveHappened(opened.status));
  session.stale = changed || !opened.status.ok();
  if (changed) placement_.DropWarm(session.id);
  if (turn.kind->deletes() && opened.status.ok()) session.leased = false;  // It went with the session.
  turn.set_phase(Phase::kComputed);
  streams_->End(turn, opened.status.ok() ? opened.status : context_.StoreError(opened.status));
  turn.stopped = true;
}

}  // namespace rwkv::router
