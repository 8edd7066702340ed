#include "services/router/core/call_kind.h"

#include "services/router/core/turn.h"

namespace rwkv::router {

uint64_t CallKind::FeedAtOnce(const Turn& turn) const { return turn.FeedEnd(); }

}  // namespace rwkv::router
