#include "services/router/core/feeding.h"

#include <algorithm>

#include "services/router/core/prefixes.h"
#include "services/router/core/turn_lane.h"

namespace rwkv::router {

void Feed(Turn& turn, uint64_t end, Scheduler::FeedKind kind) {
  turn.lane->scheduler.Feed(turn.sequence, static_cast<int64_t>(end - turn.fed_end), kind);
  turn.fed_end = end;
}

void FeedKnown(Turn& turn) {
  const uint64_t end = std::min(turn.kind->FeedAtOnce(turn), Prefixes::FeedEnd(turn));
  if (end <= turn.fed_end) return;
  Feed(turn, end, Scheduler::FeedKind::kPrefill);
}

}  // namespace rwkv::router
