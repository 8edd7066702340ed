#include "services/router/core/step_results.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "services/common/grpc_status.h"
#include "services/common/logging.h"
#include "services/router/core/going_on.h"

namespace rwkv::router {
namespace {

// Of a refusal, in the error that ends a turn.
constexpr size_t kMaxErrorBytes = 2048;

}  // namespace

void StepResults::OnStep(TurnLane& lane, const v1::StepResult& result) const {
  lane.scheduler.OnStepDone(result.step_id());
  lane.last_progress = context_.Now();
  context_.metrics->last_step_timestamp_seconds.Set(absl::ToDoubleSeconds(lane.last_progress - absl::UnixEpoch()));
  for (const v1::EntryResult& entry : result.entries()) {
    if (const TurnPtr turn = turns_.FindSequence(entry.sequence()); turn != nullptr) OnEntry(*turn, entry);
  }
}

void StepResults::OnEntry(Turn& turn, const v1::EntryResult& result) const {
  const absl::Status status = common::FromStatusProto(result.status());
  if (!status.ok()) return OnFailed(turn, status);
  if (result.position() > turn.planned_end) {
    return OnFailed(turn, absl::InternalError(absl::StrCat("a slot is at position ", result.position(),
                                                           " and was sent to ", turn.planned_end)));
  }
  turn.done_end = result.position();
  GoingOn::Settle(turn);
  turn.patience.Came(turn.done_end);
  turn.kind->OnResult(turn, result);
  if (result.has_token_id()) OnToken(turn, result);
}

void StepResults::OnToken(Turn& turn, const v1::EntryResult& result) const {
  // Of one that was told to stop: it counts all the same, since its slot has seen it.
  const bool wanted = turn.WantsToken() || (turn.stopped && turn.going_on.on && !turn.decided());
  if (!wanted || result.position() != turn.KnownEnd()) {
    return OnFailed(turn, absl::InternalError(absl::StrCat("a token for position ", result.position(), " came while ",
                                                           turn.KnownEnd(), " are known")));
  }
  const absl::Time now = context_.Now();
  if (turn.last_token.has_value()) {
    context_.metrics->inter_token_seconds.Observe(std::max(0.0, absl::ToDoubleSeconds(now - *turn.last_token)));
  }
  if (!turn.first_token.has_value()) turn.first_token = now;
  turn.last_token = now;
  context_.metrics->generated_tokens.Increment();
  gauges_->TokenDrawn();
  turn.answer->Push(result.token_id(), result.logprob(), {result.top_logprobs().begin(), result.top_logprobs().end()});
  if (turn.Going() && !GoingOn::FollowStop(turn, result.token_id())) slots_->Remove(turn);
  if (turn.answer->finished() && !turn.HasLog()) context_.metrics->CountFinish(turn.answer->reason());
}

void StepResults::OnFailed(Turn& turn, const absl::Status& status) const {
  common::LogWarning("step_entry_failed", {{"position", turn.done_end}, {"status", status}});
  slots_->Remove(turn);
  turn.no_warm = true;
  const Patience::Verdict verdict = turn.patience.EntryFailed(status.code());
  turn.not_before = context_.Now() + context_.options.retry_delay * std::min(turn.patience.failures(), 5);
  slots_->Park(turn);
  if (verdict == Patience::Verdict::kRefused) {
    const absl::string_view said = absl::string_view(status.message()).substr(0, kMaxErrorBytes);
    ends_->Refuse(turn, absl::Status(status.code(), absl::StrCat("the model does not go on after ",
                                                                 turn.patience.furthest(), " tokens: ", said)));
  } else if (verdict == Patience::Verdict::kGiveUp) {
    ends_->Fail(turn, status);
  }
}

void StepResults::OnLogits(const v1::LogitsRows& rows) const {
  if (const TurnPtr turn = turns_.FindSequence(rows.sequence()); turn != nullptr) turn->kind->OnLogits(*turn, rows);
}

void StepResults::OnStopped(const v1::SequenceStopped& stopped) const {
  const TurnPtr turn = turns_.FindSequence(stopped.sequence());
  if (turn == nullptr) return;
  const absl::Status status = GoingOn::Stopped(*turn, stopped.position());
  if (!status.ok()) OnFailed(*turn, status);
}

}  // namespace rwkv::router
