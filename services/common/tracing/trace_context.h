// Which trace something belongs to, as it travels: W3C Trace Context (https://www.w3.org/TR/trace-context/) in gRPC
// metadata, "traceparent: 00-<32 hex trace id>-<16 hex span id>-<2 hex flags>" and "tracestate".
#pragma once

#include <functional>
#include <string>

#include "absl/strings/string_view.h"
#include "grpcpp/client_context.h"

namespace rwkv::common {

inline constexpr char kTraceParentKey[] = "traceparent";
inline constexpr char kTraceStateKey[] = "tracestate";

// Whose child a new span is.
struct TraceContext {
  std::string trace_id;     // 16 bytes; empty: none.
  std::string span_id;      // 8 bytes
  bool sampled = false;     // Who began the trace wants its spans.
  std::string trace_state;  // As it came; passed on.

  bool valid() const { return !trace_id.empty(); }
};

// Not valid: not a traceparent of this or a later version, or ids of zeros. A tracestate beyond 512 bytes is dropped.
TraceContext ParseTraceParent(absl::string_view trace_parent, absl::string_view trace_state = "");
std::string FormatTraceParent(const TraceContext& context);

// What calls that this thread makes belong to, for as long as one of these lives. They nest.
class ScopedTrace {
 public:
  explicit ScopedTrace(const TraceContext& context);
  ~ScopedTrace();
  ScopedTrace(const ScopedTrace&) = delete;
  ScopedTrace& operator=(const ScopedTrace&) = delete;

 private:
  const TraceContext* const before_;
};

// Gives the context of this thread's ScopedTrace, if any is sampled, to a call that is about to be made.
void AddTrace(grpc::ClientContext* context);

}  // namespace rwkv::common
