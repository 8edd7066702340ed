#include "services/router/rpc/turn_spans.h"

#include <utility>

#include "services/common/tracing/trace_context.h"

namespace rwkv::router {
namespace {

double Seconds(const google::protobuf::Duration& duration) {
  return static_cast<double>(duration.seconds()) + duration.nanos() * 1e-9;
}

}  // namespace

std::shared_ptr<TurnTrace> TurnSpans::Of(common::Tracer* tracer, const grpc::ServerContextBase& context) {
  if (tracer == nullptr) return nullptr;
  std::shared_ptr<common::Span> call = tracer->SpanOf(&context);
  if (call == nullptr) return nullptr;
  return std::make_shared<TurnSpans>(tracer, std::move(call));
}

// Names as the GenAI conventions of OpenTelemetry and vLLM have them. No text, and no name of a session.
std::shared_ptr<TurnTrace> TurnSpans::Of(common::Tracer* tracer, const grpc::ServerContextBase& context,
                                         const v1::GenerateRequest& request) {
  std::shared_ptr<TurnTrace> trace = Of(tracer, context);
  if (trace == nullptr) return nullptr;
  common::Span& call = *tracer->SpanOf(&context);
  call.Set("gen_ai.operation.name", "text_completion");
  if (!request.request_id().empty()) call.Set("gen_ai.request.id", request.request_id());
  if (!request.model().empty()) call.Set("gen_ai.request.model", request.model());
  call.Set("gen_ai.request.max_tokens", static_cast<int64_t>(request.max_tokens()));
  if (request.sampling().has_temperature()) {
    call.Set("gen_ai.request.temperature", static_cast<double>(request.sampling().temperature()));
  }
  if (request.sampling().has_top_p()) {
    call.Set("gen_ai.request.top_p", static_cast<double>(request.sampling().top_p()));
  }
  return trace;
}

void TurnSpans::Enter(absl::string_view stage) {
  if (stage == stage_) return;
  stage_ = std::string(stage);
  span_ = nullptr;  // It ends before the next begins.
  if (!stage.empty()) span_ = tracer_->Begin(stage, common::Span::kInternal, call_->context());
}

TurnTrace::Within TurnSpans::ForStore() const {
  return [context = span_ != nullptr ? span_->context() : call_->context()](const std::function<void()>& work) {
    const common::ScopedTrace scope(context);
    work();
  };
}

void TurnSpans::OnFinish(const v1::Finish& finish) {
  call_->Set("gen_ai.usage.input_tokens", static_cast<int64_t>(finish.prompt_tokens()));
  call_->Set("gen_ai.usage.output_tokens", static_cast<int64_t>(finish.generated_tokens()));
  call_->Set("gen_ai.response.finish_reason", v1::FinishReason_Name(finish.reason()));
  call_->Set("rwkv.reused_tokens", static_cast<int64_t>(finish.reused_tokens()));
  const double queue = Seconds(finish.queue_time()), prefill = Seconds(finish.prefill_time());
  call_->Set("gen_ai.latency.time_in_queue", queue);
  call_->Set("gen_ai.latency.time_to_first_token", queue + prefill);
  call_->Set("gen_ai.latency.e2e", queue + prefill + Seconds(finish.decode_time()));
}

}  // namespace rwkv::router
