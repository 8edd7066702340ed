// Which turns the next sweep is to look at: those that something happened to, those whose time has come, and, a few
// times a second, those that wait for what nobody tells of. So a sweep takes as long as there is to do, not as there
// are turns.
#pragma once

#include <cstdint>
#include <set>
#include <utility>

#include "absl/container/btree_map.h"
#include "absl/container/btree_set.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"

namespace rwkv::router {

// Part of the core: one thread at a time, no clock of its own. Turns by their id, in the order of their arrival.
class TurnMarks {
 public:
  void Mark(uint64_t turn) { marked_.insert(turn); }
  // The first that is marked behind `after`; it is marked no more. Unset: there is none. Whoever is marked meanwhile
  // and is not behind it waits for the next round.
  absl::optional<uint64_t> Take(uint64_t after);

  // Marked at `when`, the earliest time at which something happens to it by itself; once, in place of what was said of
  // it before. InfiniteFuture: never.
  void WakeAt(uint64_t turn, absl::Time when);
  // Marked with every tick from now on, or not any more.
  void Poll(uint64_t turn, bool polled);
  // Marks whoever is due. A clock that was set back wakes nobody early and stops no ticks.
  void MarkDue(absl::Time now, absl::Duration tick);

  // There is no such turn any more.
  void Forget(uint64_t turn);

 private:
  absl::btree_set<uint64_t> marked_;
  absl::btree_set<uint64_t> polled_;
  absl::btree_map<uint64_t, absl::Time> wake_of_;
  std::set<std::pair<absl::Time, uint64_t>> wakes_;
  absl::Time ticked_at_ = absl::InfinitePast();
};

}  // namespace rwkv::router
