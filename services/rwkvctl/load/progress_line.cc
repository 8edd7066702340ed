#include "services/rwkvctl/load/progress_line.h"

#include "absl/strings/str_format.h"
#include "services/rwkvctl/load/report.h"

namespace rwkv::rwkvctl {
namespace {

constexpr char kWipe[] = "\r\x1b[K";

}  // namespace

LoadProgressLine::~LoadProgressLine() {
  if (is_terminal_ && last_.elapsed > absl::ZeroDuration()) out_ << kWipe << std::flush;
}

void LoadProgressLine::Update(const LoadProgress& now) {
  const double seconds = absl::ToDoubleSeconds(now.elapsed - last_.elapsed);
  const double rate = static_cast<double>(now.generated_tokens - last_.generated_tokens) / seconds;
  out_ << (is_terminal_ ? kWipe : "")
       << absl::StrFormat(
              "%.0f s: %d sent, %d in flight, %d completed, %d failed, %d refused, %.1f tokens/s, first token %s",
              absl::ToDoubleSeconds(now.elapsed), now.sent, now.in_flight(), now.completed, now.failed, now.refusals,
              rate, ShortDuration(now.ttft_p50))
       << (is_terminal_ ? "" : "\n") << std::flush;
  last_ = now;
}

}  // namespace rwkv::rwkvctl
