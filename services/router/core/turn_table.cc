#include "services/router/core/turn_table.h"

#include "services/router/core/turn_lane.h"

namespace rwkv::router {

TurnTable::~TurnTable() {
  for (const auto& [id, turn] : running_) turn->Watch(nullptr, nullptr);  // Others may hold them for longer.
}

void TurnTable::Add(const TurnPtr& turn) {
  running_[turn->id] = turn;
  turn->Watch(&marks_, &tally_);
  tally_.Bump();
}

void TurnTable::Erase(const TurnPtr& turn) {
  turn->Watch(nullptr, nullptr);
  marks_.Forget(turn->id);
  running_.erase(turn->id);
  tally_.Bump();
}

void TurnTable::Seat(const TurnPtr& turn) {
  turn->sequence = next_sequence_++;
  by_sequence_[turn->sequence] = turn;
}

void TurnTable::CountGoing(Turn& turn, bool going) {
  if (turn.lane == nullptr || going == turn.going_on.counted) return;
  turn.going_on.counted = going;
  turn.lane->going += going ? 1 : -1;
}

void TurnTable::Unseat(Turn& turn) {
  CountGoing(turn, false);
  by_sequence_.erase(turn.sequence);
  turn.sequence = 0;
}

}  // namespace rwkv::router
