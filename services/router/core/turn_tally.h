// How many turns have a part of the slots, by pool and by tenant. Counted as turns change, so that asking takes as long
// as there are pools or tenants, not as there are turns.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "services/router/core/turn_lane.h"

namespace rwkv::router {

// Part of the core: one thread at a time.
class TurnTally {
 public:
  using Held = std::map<std::string, int>;  // By tenant; none is 0.

  // A turn of the tenant has a part of the pool's slots (+1), or not any more (-1).
  void CountActive(const std::string& pool, int by);
  // And a right to it.
  void CountHeld(const std::string& pool, const std::string& tenant, int by);
  // What is counted elsewhere has changed.
  void Bump() { ++version_; }

  // Another whenever any of it is.
  uint64_t version() const { return version_; }
  const PoolUse& active() const { return active_; }  // None is 0.
  int active(const std::string& pool) const;
  // Slots that turns have a right to; of one pool, or with an empty name of all.
  const Held& held(const std::string& pool) const;
  // Those that give theirs away.
  int yielding(const std::string& pool) const;
  int yielding() const;

 private:
  static void Count(Held& counts, const std::string& name, int by);

  PoolUse active_;
  std::map<std::string, Held> held_;  // By pool; under an empty name of all.
  uint64_t version_ = 0;
};

}  // namespace rwkv::router
