#include "services/router/core/trace_stage.h"

#include "absl/strings/string_view.h"
#include "services/router/core/turn_trace.h"

namespace rwkv::router {
namespace {

using Phase = Turn::Phase;

absl::string_view StageOf(const Turn& turn) {
  switch (turn.phase()) {
    case Phase::kWaiting:
      return "queue";
    case Phase::kOpening:
      return "open";
    case Phase::kParked:
      return "park";
    case Phase::kLocating:
      return turn.stopped ? "" : "locate";  // Nobody wants to know any more.
    case Phase::kAttaching:
      return "attach";
    case Phase::kRunning:
      return turn.first_token.has_value() ? "decode" : "prefill";
    case Phase::kYielded:
      return "yield";
    case Phase::kComputed:
      return turn.kind->IsOpen() ? "commit" : "";
  }
  return "";
}

}  // namespace

void TraceStage(const Turn& turn) {
  if (turn.trace != nullptr) turn.trace->Enter(StageOf(turn));
}

}  // namespace rwkv::router
