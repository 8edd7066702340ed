// The turns that exist: by id from their start to their last message, by call while they have a client, by sequence
// while they are in a scheduler. What is counted of them, and whom the next sweep is to look at, are kept beside.
#pragma once

#include <cstdint>
#include <map>
#include <memory>

#include "services/router/core/turn.h"
#include "services/router/core/turn_marks.h"
#include "services/router/core/turn_tally.h"
#include "services/router/scheduler/scheduler.h"

namespace rwkv::router {

using TurnPtr = std::shared_ptr<Turn>;

// Part of the core: one thread at a time.
class TurnTable {
 public:
  using Running = std::map<uint64_t, TurnPtr>;   // By Turn::id: in the order of their arrival.
  using Seated = std::map<SequenceId, TurnPtr>;  // By Turn::sequence.

  TurnTable() = default;
  ~TurnTable();
  TurnTable(const TurnTable&) = delete;
  TurnTable& operator=(const TurnTable&) = delete;

  // For Turn::id, in the order of arrival.
  uint64_t NewId() { return next_id_++; }

  const Running& running() const { return running_; }
  void Add(const TurnPtr& turn);
  // For who is about to change it: the next sweep looks at it, as with the others. Null: there is none.
  TurnPtr Find(uint64_t id) const { return Find(running_, id); }
  // It is over.
  void Erase(const TurnPtr& turn);
  void Touch() const {
    for (const auto& [id, turn] : running_) turn->Touch();
  }

  void AddCall(const TurnPtr& turn) { by_call_[turn->call] = turn; }
  TurnPtr FindCall(CallId call) const { return Find(by_call_, call); }
  void EraseCall(CallId call) { by_call_.erase(call); }

  const Seated& seated() const { return by_sequence_; }
  // That the next one in a scheduler gets.
  SequenceId next_sequence() const { return next_sequence_; }
  void Seat(const TurnPtr& turn);
  TurnPtr FindSequence(SequenceId sequence) const { return Find(by_sequence_, sequence); }
  void Unseat(Turn& turn);
  // Whether its worker goes on without it, as its lane's count has it.
  static void CountGoing(Turn& turn, bool going);

  const TurnTally& tally() const { return tally_; }
  TurnMarks& marks() { return marks_; }

 private:
  template <typename Key>
  static TurnPtr Find(const std::map<Key, TurnPtr>& turns, Key key) {
    const auto it = turns.find(key);
    if (it == turns.end()) return nullptr;
    it->second->Touch();
    return it->second;
  }

  TurnMarks marks_;
  TurnTally tally_;
  Running running_;
  std::map<CallId, TurnPtr> by_call_;
  Seated by_sequence_;
  uint64_t next_id_ = 1;
  SequenceId next_sequence_ = 1;
};

}  // namespace rwkv::router
