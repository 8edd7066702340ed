#include "services/router/core/arrivals.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "services/common/grpc_status.h"
#include "services/router/core/trace_stage.h"
#include "services/router/core/turn_input.h"
#include "services/router/core/world.h"

namespace rwkv::router {
namespace {

using Phase = Turn::Phase;

// When one of many that are refused at once may come again: not all in the same instant, which those who decode would
// feel.
absl::Duration ComeAgain(World* world) { return absl::Milliseconds(500) + absl::Milliseconds(world->Random() % 1000); }

bool SameTurn(const Turn& a, const Turn& b) { return a.named && b.named && a.request_id == b.request_id; }

}  // namespace

Arrivals::Arrivals(const CoreContext& context, const Placement& placement, const TurnOpener& opener, TurnTable* turns,
                   SessionTable* sessions, WaitingLine* line, ClientStreams* streams, TurnSlots* slots, TurnEnds* ends)
    : context_(context),
      placement_(placement),
      opener_(opener),
      turns_(turns),
      sessions_(sessions),
      line_(line),
      streams_(streams),
      slots_(slots),
      ends_(ends) {}

void Arrivals::Arrive(const TurnPtr& turn) const {
  if (context_.draining) return Refuse(*turn, context_.DrainingStatus());
  turn->id = turns_->NewId();
  if (!MeetSession(turn)) return;
  if (turn->kind->takes_slot() && !placement_.HasLane(*turn)) return Refuse(*turn, WhyNoLane(*turn));
  StartWaiting();
  if (!line_->CanStart(*turn) && line_->full() && !MakeRoom(*turn)) {
    return Refuse(*turn, common::WithRetryInfo(
                             absl::ResourceExhaustedError(absl::StrCat("too many requests: ", turns_->running().size(),
                                                                       " run and ", line_->size(), " wait")),
                             ComeAgain(context_.world)));
  }
  turns_->AddCall(turn);
  TraceStage(*turn);
  if (line_->CanStart(*turn)) return Start(turn);
  line_->Add(turn);
  if (!turn->session_id.empty()) sessions_->Of(turn->session_id).next = turn;
}

bool Arrivals::MeetSession(const TurnPtr& turn) const {
  const Session* const session = sessions_->Find(turn->session_id);
  if (session == nullptr) return true;
  const auto join_or_refuse = [this, &turn](const TurnPtr& other) {
    if (SameTurn(*other, *turn)) return Join(other, *turn);
    Refuse(*turn, common::WithRetryInfo(
                      absl::AbortedError(absl::StrCat("session \"", turn->session_id, "\": another turn is running")),
                      context_.options.retry_delay));
  };
  if (session->turn != nullptr && !session->turn->stopped &&
      (SameTurn(*session->turn, *turn) || !session->turn->decided())) {
    join_or_refuse(session->turn);
    return false;
  }
  if (session->next == nullptr) return true;
  join_or_refuse(session->next);
  return false;
}

absl::Status Arrivals::WhyNoLane(const Turn& call) const {
  absl::Status why = context_.world->WhyNoLane();
  if (why.ok()) {
    why = absl::UnavailableError(
        placement_.lanes().empty()
            ? "the pipeline is just coming up"
            : absl::StrCat("no pipeline of the model ", call.model->info.name(), " serves at this router just now"));
  }
  return absl::IsUnavailable(why) ? common::WithRetryInfo(why, absl::Seconds(1)) : why;
}

void Arrivals::Join(const TurnPtr& live, Turn& call) const {
  if (live->prompt != call.prompt) {
    return Refuse(call, common::InvalidFieldError("request_id", "names a turn with another input"));
  }
  if (const absl::Status same = CheckSameSpec(live->spec, call.spec); !same.ok()) return Refuse(call, same);
  if (!call.initial_state.empty() && call.initial_state != live->initial_state) {
    return Refuse(call, common::InvalidFieldError("initial_state", "the turn began with another one"));
  }
  if (!live->answer.has_value() && call.resume_from > live->resume_from) {
    // How many tokens it has is not known yet, and a wrong guess must not end it.
    return Refuse(call, common::WithRetryInfo(absl::AbortedError("the turn is just being opened by another call"),
                                              context_.options.retry_delay));
  }
  if (live->answer.has_value() && call.resume_from > live->durable) {
    return Refuse(call, absl::OutOfRangeError(absl::StrCat("resume_from ", call.resume_from, " is beyond the ",
                                                           live->durable, " tokens of the turn")));
  }
  streams_->End(*live, absl::AbortedError("a later call with the same request_id took over"));
  live->Touch();
  live->call = call.call;
  live->kind = std::move(call.kind);
  live->trace = std::move(call.trace);
  live->resume_from = call.resume_from;
  live->sent = call.resume_from;
  live->waits_for_room = false;
  live->stalled_since = absl::InfiniteFuture();
  turns_->AddCall(live);
}

bool Arrivals::MakeRoom(const Turn& newcomer) const {
  const absl::optional<WaitingLine::Leaver> leaver = line_->ChooseLeaver(newcomer);
  if (!leaver.has_value()) return false;
  ends_->Fail(*leaver->turn, common::WithRetryInfo(absl::ResourceExhaustedError(absl::StrCat(
                                                       "too many requests of the tenant: ", leaver->waiting,
                                                       " wait, and others want to, too")),
                                                   ComeAgain(context_.world)));
  return true;
}

void Arrivals::StartWaiting() const {
  line_->OfferRoom([this](const TurnPtr& turn) { Start(turn); });
}

void Arrivals::RefuseOverdue() const {
  for (const TurnPtr& turn : line_->Overdue()) {
    ends_->Fail(*turn,
                common::WithRetryInfo(absl::ResourceExhaustedError(absl::StrCat(
                                          "the call waited for ", absl::FormatDuration(context_.options.max_wait),
                                          " to be started: ", line_->running(), " run and ", line_->size(), " wait")),
                                      absl::Seconds(1)));
  }
}

void Arrivals::Start(const TurnPtr& turn) const {
  if (turn->phase() == Phase::kYielded) {
    line_->UseKept(*turn);
    return slots_->Park(*turn);
  }
  turns_->Add(turn);
  if (!turn->session_id.empty()) {
    Session& session = sessions_->Of(turn->session_id);
    if (session.next == turn) session.next = nullptr;
    session.turn = turn;
    turn->session = &session;
  }
  if (!turn->kind->takes_slot()) return opener_.RunExclusive(turn);
  if (const Pool* pool = placement_.ChoosePool(*turn, turns_->tally().active()); pool != nullptr) {
    turn->set_pool(pool->name);
  }
  line_->UseKept(*turn);
  if (const absl::Status status = placement_.CheckServed(*turn); !status.ok()) {
    turn->set_phase(Phase::kComputed);
    return ends_->Fail(*turn, status);
  }
  if (turn->kind->generates()) context_.metrics->prompt_tokens.Increment(static_cast<double>(turn->prompt.size()));
  if (turn->session != nullptr) return opener_.Open(turn);
  if (turn->kind->generates()) turn->answer.emplace(turn->model->tokenizer, turn->spec);
  slots_->Park(*turn);
}

}  // namespace rwkv::router
