#include "services/router/turns/turn_table.h"

namespace rwkv::router {

void TurnTable::Seat(const TurnPtr& turn) {
  turn->sequence = next_sequence_++;
  by_sequence_[turn->sequence] = turn;
}

void TurnTable::Unseat(Turn& turn) {
  by_sequence_.erase(turn.sequence);
  turn.sequence = 0;
}

PoolUse TurnTable::ActiveByPool() const {
  PoolUse active;
  for (const auto& [id, turn] : running_) {
    if (turn->Active()) ++active[turn->pool];
  }
  return active;
}

std::map<std::string, int> TurnTable::HeldByTenant(const std::string& pool) const {
  std::map<std::string, int> held;
  for (const auto& [id, turn] : running_) {
    if (!turn->Active() || turn->yielding) continue;
    if (pool.empty() || turn->pool == pool) ++held[turn->tenant];
  }
  return held;
}

}  // namespace rwkv::router
