#include "services/router/core/client_streams.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "services/common/logging.h"
#include "services/router/core/response_stream.h"
#include "services/router/core/world.h"

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

void ClientStreams::End(Turn& turn, const absl::Status& status) {
  turns_->EraseCall(turn.call);
  turn.Touch();
  Close(turn, status);
}

void ClientStreams::Close(Turn& turn, const absl::Status& status) const {
  if (!turn.kind->IsOpen()) return;
  context_.metrics->CountError(status);
  if (absl::IsInternal(status) || absl::IsDataLoss(status) || absl::IsUnknown(status)) {
    common::LogError("call_failed", {{"session", turn.session_id}, {"status", status}});
  }
  turn.kind->Close(status);
}

void ClientStreams::Stall(Turn& turn, size_t queued) {
  if (turn.stalled_since == absl::InfiniteFuture() || queued < turn.stalled_at) turn.stalled_since = context_.Now();
  turn.stalled_at = queued;
}

bool ClientStreams::IsStuck(const Turn& turn) const {
  return context_.Now() - turn.stalled_since > context_.options.slow_client_timeout;
}

absl::Status ClientStreams::StuckStatus(const Turn& turn) const {
  return absl::ResourceExhaustedError(absl::StrCat("the client took no message for ",
                                                   absl::FormatDuration(context_.options.slow_client_timeout),
                                                   "; a named turn can be resumed from ", turn.sent));
}

bool ClientStreams::HasRoom(Turn& turn, size_t queued) {
  if (queued >= kQueuedMessages) {
    Stall(turn, queued);
    return false;
  }
  turn.stalled_since = absl::InfiniteFuture();
  return true;
}

bool ClientStreams::IsFull(Turn& turn, size_t limit) {
  const size_t queued = turn.kind->stream()->queued();
  // It says when there is room for a few: what room there is before is not worth a look.
  if (queued < limit && !turn.waits_for_room) {
    turn.stalled_since = absl::InfiniteFuture();
    return false;
  }
  Stall(turn, queued);
  if (IsStuck(turn) || turn.waits_for_room) return true;
  turn.waits_for_room = true;
  turn.kind->stream()->OnRoom([this, call = turn.call] {
    context_.world->Post([this, call] {
      if (const TurnPtr of_call = turns_->FindCall(call); of_call != nullptr) of_call->waits_for_room = false;
    });
  });
  return true;
}

void ClientStreams::Observe(const Turn& turn) const {
  const RouterMetrics& metrics = *context_.metrics;
  const auto seconds = [](absl::Time from, absl::Time to) { return std::max(0.0, absl::ToDoubleSeconds(to - from)); };
  metrics.call_seconds.Observe(seconds(turn.arrival, context_.Now()));
  metrics.call_prompt_tokens.Observe(static_cast<double>(turn.prompt.size()));
  metrics.call_generated_tokens.Observe(static_cast<double>(turn.answer->size()));
  metrics.call_max_tokens.Observe(static_cast<double>(turn.spec.max_tokens()));
  if (!turn.first_token.has_value()) return;  // Another router drew them, or there are none.
  if (turn.first_rows.has_value()) {
    metrics.call_inference_seconds.Observe(seconds(*turn.first_rows, *turn.last_token));
  }
  if (turn.answer->size() > 1) {
    metrics.call_token_seconds.Observe(seconds(*turn.first_token, *turn.last_token) /
                                       static_cast<double>(turn.answer->size() - 1));
  }
  if (turn.first_rows.has_value()) metrics.prefill_seconds.Observe(seconds(*turn.first_rows, *turn.first_token));
  metrics.decode_seconds.Observe(seconds(*turn.first_token, *turn.last_token));
}

absl::Status ClientStreams::Pump(Turn& turn) {
  ResponseStream<v1::GenerateResponse>* const stream = turn.kind->stream();
  if (stream == nullptr || !turn.answer.has_value()) return absl::OkStatus();
  const uint64_t ready = turn.HasLog() ? turn.durable : turn.answer->size();
  while (turn.sent < ready) {
    if (IsFull(turn, context_.options.max_stream_messages)) {
      return IsStuck(turn) ? StuckStatus(turn) : absl::OkStatus();
    }
    if (turn.sent == 0 && turn.first_token.has_value()) {
      context_.metrics->ttft_seconds.Observe(absl::ToDoubleSeconds(context_.Now() - turn.arrival));
    }
    stream->Send(turn.answer->Message(turn.sent));
    ++turn.sent;
    turn.answer->Sent(turn.sent);
  }
  const bool ended = turn.answer->finished() && (!turn.HasLog() || turn.finish_durable);
  if (!ended || turn.sent < turn.answer->size()) {
    turn.stalled_since = absl::InfiniteFuture();
    return absl::OkStatus();
  }
  if (turn.answer->reason() == v1::FINISH_REASON_ERROR) {
    // An error drops what is in the stream: it waits until the client has the tokens.
    if (IsFull(turn, 1)) return IsStuck(turn) ? StuckStatus(turn) : absl::OkStatus();
    End(turn, turn.error);
    return absl::OkStatus();
  }
  v1::GenerateResponse message = FinishMessage(turn);
  if (turn.trace != nullptr) turn.trace->OnFinish(message.finish());
  stream->Send(std::move(message));
  Observe(turn);
  End(turn, absl::OkStatus());
  return absl::OkStatus();
}

v1::GenerateResponse ClientStreams::FinishMessage(const Turn& turn) const {
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
    const absl::Time prefilled = turn.first_token.value_or(context_.Now());
    SetDuration(*turn.first_rows - turn.arrival, finish.mutable_queue_time());
    SetDuration(prefilled - *turn.first_rows, finish.mutable_prefill_time());
    SetDuration(turn.last_token.value_or(prefilled) - prefilled, finish.mutable_decode_time());
  }
  return message;
}

}  // namespace rwkv::router
