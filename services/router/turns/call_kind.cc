#include "services/router/turns/call_kind.h"

#include "services/router/turns/turn.h"

namespace rwkv::router {

uint64_t CallKind::FeedAtOnce(const Turn& turn) const { return turn.FeedEnd(); }

}  // namespace rwkv::router
