#include "services/router/core/turn.h"

namespace rwkv::router {

void Turn::Watch(TurnMarks* marks, TurnTally* tally) {
  if (Active()) Count(-1);
  marks_ = marks;
  tally_ = tally;
  if (Active()) Count(1);
  Touch();
}

void Turn::Count(int by) const {
  if (tally_ == nullptr) return;
  tally_->CountActive(pool_, by);
  if (!yielding_) tally_->CountHeld(pool_, tenant, by);
}

void Turn::set_phase(Phase phase) {
  const bool was_active = Active();
  phase_ = phase;
  if (was_active != Active()) Count(was_active ? -1 : 1);
  Touch();
}

void Turn::set_pool(const std::string& pool) {
  if (Active()) Count(-1);
  pool_ = pool;
  if (Active()) Count(1);
  Touch();
}

void Turn::set_yielding(bool yielding) {
  if (tally_ != nullptr && Active() && yielding != yielding_) tally_->CountHeld(pool_, tenant, yielding ? -1 : 1);
  yielding_ = yielding;
  Touch();
}

}  // namespace rwkv::router
