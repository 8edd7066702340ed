#include "services/common/tracing/trace_context.h"

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"

namespace rwkv::common {
namespace {

constexpr size_t kParentBytes = 55;        // Of version 00; later ones begin alike.
constexpr size_t kMaxTraceStateBytes = 512;  // What everybody has to pass on; more may be dropped.

thread_local const TraceContext* current_trace = nullptr;

// Lower case alone, as the standard has it.
bool IsHex(absl::string_view text) {
  return std::all_of(text.begin(), text.end(),
                     [](char c) { return absl::ascii_isdigit(c) || (c >= 'a' && c <= 'f'); });
}

bool IsZero(absl::string_view hex) { return hex.find_first_not_of('0') == absl::string_view::npos; }

}  // namespace

TraceContext ParseTraceParent(absl::string_view trace_parent, absl::string_view trace_state) {
  if (trace_parent.size() < kParentBytes || trace_parent[2] != '-' || trace_parent[35] != '-' ||
      trace_parent[52] != '-') {
    return {};
  }
  const absl::string_view version = trace_parent.substr(0, 2), trace = trace_parent.substr(3, 32),
                          span = trace_parent.substr(36, 16), flags = trace_parent.substr(53, 2);
  if (!IsHex(version) || version == "ff" || !IsHex(trace) || IsZero(trace) || !IsHex(span) || IsZero(span) ||
      !IsHex(flags)) {
    return {};
  }
  if (trace_parent.size() > kParentBytes && (version == "00" || trace_parent[kParentBytes] != '-')) return {};
  TraceContext context;
  context.trace_id = absl::HexStringToBytes(trace);
  context.span_id = absl::HexStringToBytes(span);
  context.sampled = (absl::HexStringToBytes(flags)[0] & 1) != 0;
  if (trace_state.size() <= kMaxTraceStateBytes) context.trace_state = std::string(trace_state);
  return context;
}

std::string FormatTraceParent(const TraceContext& context) {
  return absl::StrCat("00-", absl::BytesToHexString(context.trace_id), "-", absl::BytesToHexString(context.span_id),
                      context.sampled ? "-01" : "-00");
}

ScopedTrace::ScopedTrace(const TraceContext& context) : before_(current_trace) { current_trace = &context; }
ScopedTrace::~ScopedTrace() { current_trace = before_; }

void AddTrace(grpc::ClientContext* context) {
  if (current_trace == nullptr || !current_trace->valid() || !current_trace->sampled) return;
  context->AddMetadata(kTraceParentKey, FormatTraceParent(*current_trace));
  if (!current_trace->trace_state.empty()) context->AddMetadata(kTraceStateKey, current_trace->trace_state);
}

}  // namespace rwkv::common
