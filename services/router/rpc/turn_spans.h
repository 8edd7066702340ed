// The spans of a traced turn: one for each stage it goes through, children of its call's.
#pragma once

#include <memory>
#include <string>

#include "absl/strings/string_view.h"
#include "grpcpp/server_context.h"
#include "rwkv/v1/generation.pb.h"
#include "services/common/tracing/tracer.h"
#include "services/router/core/turn_trace.h"

namespace rwkv::router {

class TurnSpans final : public TurnTrace {
 public:
  // Null: the call is not traced; also if `tracer` is null. The tracer outlives it.
  static std::shared_ptr<TurnTrace> Of(common::Tracer* tracer, const grpc::ServerContextBase& context);
  // Of a call that is, what was asked for.
  static std::shared_ptr<TurnTrace> Of(common::Tracer* tracer, const grpc::ServerContextBase& context,
                                       const v1::GenerateRequest& request);

  TurnSpans(common::Tracer* tracer, std::shared_ptr<common::Span> call) : tracer_(tracer), call_(std::move(call)) {}

  void Enter(absl::string_view stage) override;
  std::string trace_parent() const override { return common::FormatTraceParent(call_->context()); }
  std::string trace_state() const override { return call_->context().trace_state; }
  Within ForStore() const override;
  void OnFinish(const v1::Finish& finish) override;

 private:
  common::Tracer* const tracer_;
  const std::shared_ptr<common::Span> call_;
  std::string stage_;
  std::unique_ptr<common::Span> span_;  // Of the stage; null: none.
};

}  // namespace rwkv::router
