// In which stage of its way a turn stands, for its trace.
#pragma once

#include "services/router/core/turn.h"

namespace rwkv::router {

// Costs nothing if it is not traced.
void TraceStage(const Turn& turn);

}  // namespace rwkv::router
