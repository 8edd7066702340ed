// The turns that exist: by id from their start to their last message, by call while they have a client, by sequence
// while they are in a scheduler.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "services/router/scheduler/scheduler.h"
#include "services/router/turns/turn.h"
#include "services/router/turns/turn_lane.h"

namespace rwkv::router {

using TurnPtr = std::shared_ptr<Turn>;

// Part of the core: one thread at a time.
class TurnTable {
 public:
  using Running = std::map<uint64_t, TurnPtr>;   // By Turn::id: in the order of their arrival.
  using Seated = std::map<SequenceId, TurnPtr>;  // By Turn::sequence.

  // For Turn::id, in the order of arrival.
  uint64_t NewId() { return next_id_++; }

  const Running& running() const { return running_; }
  void Add(const TurnPtr& turn) { running_[turn->id] = turn; }
  // Null, as from the others: there is none.
  TurnPtr Find(uint64_t id) const { return Find(running_, id); }
  // It is over. The next one.
  Running::const_iterator Erase(Running::const_iterator turn) { return running_.erase(turn); }

  void AddCall(const TurnPtr& turn) { by_call_[turn->call] = turn; }
  TurnPtr FindCall(CallId call) const { return Find(by_call_, call); }
  void EraseCall(CallId call) { by_call_.erase(call); }

  const Seated& seated() const { return by_sequence_; }
  // That the next one in a scheduler gets.
  SequenceId next_sequence() const { return next_sequence_; }
  void Seat(const TurnPtr& turn);
  TurnPtr FindSequence(SequenceId sequence) const { return Find(by_sequence_, sequence); }
  void Unseat(Turn& turn);

  // Turns that have a part of the slots.
  PoolUse ActiveByPool() const;
  // Slots that turns have a right to, by tenant; of one pool, or with an empty name of all.
  std::map<std::string, int> HeldByTenant(const std::string& pool) const;

 private:
  template <typename Key>
  static TurnPtr Find(const std::map<Key, TurnPtr>& turns, Key key) {
    const auto it = turns.find(key);
    return it == turns.end() ? nullptr : it->second;
  }

  Running running_;
  std::map<CallId, TurnPtr> by_call_;
  Seated by_sequence_;
  uint64_t next_id_ = 1;
  SequenceId next_sequence_ = 1;
};

}  // namespace rwkv::router
