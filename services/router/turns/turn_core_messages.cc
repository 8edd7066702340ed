// What goes to clients: messages, the end of a turn, who reads too slowly.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "services/router/turns/turn_core.h"

namespace rwkv::router {
namespace {

// Messages that may wait in the stream of a call that generates nothing.
constexpr size_t kQueuedMessages = 4;

void SetDuration(absl::Duration duration, google::protobuf::Duration* proto) {
  duration = std::max(duration, absl::ZeroDuration());  // The wall clock may have jumped.
  proto->set_seconds(absl::IDivDuration(duration, absl::Seconds(1), &duration));
  proto->set_nanos(static_cast<int32_t>(absl::ToInt64Nanoseconds(duration)));
}

}  // namespace

bool TurnCore::IsFull(Turn& turn, size_t limit) {
  const absl::Time now = Now();
  const size_t queued = turn.kind->stream()->queued();
  if (queued < limit) {
    turn.stalled_since = absl::InfiniteFuture();
    return false;
  }
  if (turn.stalled_since == absl::InfiniteFuture() || queued < turn.stalled_at) turn.stalled_since = now;
  turn.stalled_at = queued;
  if (now - turn.stalled_since > options_.slow_client_timeout) {
    Fail(turn, absl::ResourceExhaustedError(absl::StrCat("the client took no message for ",
                                                         absl::FormatDuration(options_.slow_client_timeout),
                                                         "; a named turn can be resumed from ", turn.sent)));
    return true;
  }
  if (!turn.waits_for_room) {
    turn.waits_for_room = true;
    const CallId call = turn.call;
    turn.kind->stream()->OnRoom([this, call] {
      world_->Post([this, call] {
        const auto it = by_call_.find(call);
        if (it != by_call_.end()) it->second->waits_for_room = false;
      });
    });
  }
  return true;
}

void TurnCore::ObserveCall(const Turn& turn) {
  const auto seconds = [](absl::Time from, absl::Time to) { return std::max(0.0, absl::ToDoubleSeconds(to - from)); };
  metrics_->call_seconds.Observe(seconds(turn.arrival, Now()));
  metrics_->call_prompt_tokens.Observe(static_cast<double>(turn.prompt.size()));
  metrics_->call_generated_tokens.Observe(static_cast<double>(turn.answer->size()));
  metrics_->call_max_tokens.Observe(static_cast<double>(turn.spec.max_tokens()));
  if (!turn.first_token.has_value()) return;  // Another router drew them, or there are none.
  if (turn.first_rows.has_value()) {
    metrics_->call_inference_seconds.Observe(seconds(*turn.first_rows, *turn.last_token));
  }
  if (turn.answer->size() > 1) {
    metrics_->call_token_seconds.Observe(seconds(*turn.first_token, *turn.last_token) /
                                         static_cast<double>(turn.answer->size() - 1));
  }
  if (turn.first_rows.has_value()) metrics_->prefill_seconds.Observe(seconds(*turn.first_rows, *turn.first_token));
  metrics_->decode_seconds.Observe(seconds(*turn.first_token, *turn.last_token));
}

void TurnCore::Pump(Turn& turn) {
  ResponseStream<v1::GenerateResponse>* const stream = turn.kind->stream();
  if (stream == nullptr || !turn.answer.has_value()) return;
  const uint64_t ready = turn.HasLog() ? turn.durable : turn.answer->size();
  while (turn.sent < ready) {
    if (IsFull(turn, options_.max_stream_messages)) return;
    if (turn.sent == 0 && turn.first_token.has_value()) {
      metrics_->ttft_seconds.Observe(absl::ToDoubleSeconds(Now() - turn.arrival));
    }
    stream->Send(turn.answer->Message(turn.sent));
    ++turn.sent;
    turn.answer->Sent(turn.sent);
  }
  const bool ended = turn.answer->finished() && (!turn.HasLog() || turn.finish_durable);
  if (!ended || turn.sent < turn.answer->size()) {
    turn.stalled_since = absl::InfiniteFuture();
    return;
  }
  if (turn.answer->reason() == v1::FINISH_REASON_ERROR) {
    // An error drops what is in the stream: it waits until the client has the tokens.
    if (IsFull(turn, 1)) return;
    return EndCall(turn, turn.error);
  }
  v1::GenerateResponse message = FinishMessage(turn);
  if (turn.trace != nullptr) turn.trace->OnFinish(message.finish());
  stream->Send(std::move(message));
  ObserveCall(turn);
  EndCall(turn, absl::OkStatus());
}

v1::GenerateResponse TurnCore::FinishMessage(const Turn& turn) const {
  v1::GenerateResponse message;
  message.set_index(turn.answer->size());
  message.set_text(turn.answer->last_text());
  v1::Finish& finish = *message.mutable_finish();
  finish.set_reason(turn.answer->reason());
  finish.set_prompt_tokens(static_cast<uint32_t>(turn.prompt.size()));
  finish.set_generated_tokens(static_cast<uint32_t>(turn.answer->size()));
  finish.set_session_id(turn.session_id);
  if (turn.HasLog()) {
    finish.set_request_id(turn.request_id);
    finish.set_session_tokens(turn.KnownEnd());
  }
  finish.set_seed(turn.spec.sampling().seed());
  finish.set_reused_tokens(turn.reused_tokens);
  if (turn.answer->stop_token_id().has_value()) finish.set_stop_token_id(*turn.answer->stop_token_id());
  finish.set_stop_string(turn.answer->stop_string());
  // A turn that is told again from the log has no times.
  if (turn.first_rows.has_value()) {
    const absl::Time prefilled = turn.first_token.value_or(Now());
    SetDuration(*turn.first_rows - turn.arrival, finish.mutable_queue_time());
    SetDuration(prefilled - *turn.first_rows, finish.mutable_prefill_time());
    SetDuration(turn.last_token.value_or(prefilled) - prefilled, finish.mutable_decode_time());
  }
  return message;
}

bool TurnCore::HasRoom(Turn& turn, size_t queued) {
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

}  // namespace rwkv::router
