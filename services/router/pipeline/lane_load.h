// What a pipeline has to do.
#pragma once

#include <cstdint>

namespace rwkv::router {

struct LaneLoad {
  int turns = 0;
  int slots_used = 0;
  int slots_warm = 0;        // They keep the state of a turn that is over, and whoever comes may have them.
  int64_t rows_waiting = 0;  // Tokens that are known and not computed yet.

  friend bool operator==(const LaneLoad& a, const LaneLoad& b) {
    return a.turns == b.turns && a.slots_used == b.slots_used && a.slots_warm == b.slots_warm &&
           a.rows_waiting == b.rows_waiting;
  }
  friend bool operator!=(const LaneLoad& a, const LaneLoad& b) { return !(a == b); }
};

}  // namespace rwkv::router
