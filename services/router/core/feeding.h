// Tokens of a turn, given to the scheduler that it is in.
#pragma once

#include <cstdint>

#include "services/router/core/turn.h"
#include "services/router/scheduler/scheduler.h"

namespace rwkv::router {

// Those before `end`, at least one more than it was fed.
void Feed(Turn& turn, uint64_t end, Scheduler::FeedKind kind);
// All that its kind feeds at once, up to where the state of its input is to be kept; nothing if it was fed that.
void FeedKnown(Turn& turn);

}  // namespace rwkv::router
