// Slots whose turn is over wait a moment for the next one of the same tenant. A client that has its answer mostly asks
// again at once; had a flood taken the slot meanwhile, some turn of the flood would have to save its state and go, and
// both land between the tokens of everybody else. Pure.
#pragma once

#include <algorithm>
#include <cstddef>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace rwkv::router {

class KeptSlots {
 public:
  void Keep(const std::string& pool, const std::string& tenant, absl::Time until) {
    slots_.push_back({pool, tenant, until});
  }
  // A turn of the tenant has got a slot there. True: one that was kept.
  bool Use(absl::string_view pool, absl::string_view tenant) {
    const auto mine = std::find_if(slots_.begin(), slots_.end(),
                                   [&](const Slot& slot) { return slot.pool == pool && slot.tenant == tenant; });
    if (mine == slots_.end()) return false;
    slots_.erase(mine);
    return true;
  }
  // True: some were kept until then.
  bool Expire(absl::Time now) {
    const size_t before = slots_.size();
    slots_.erase(std::remove_if(slots_.begin(), slots_.end(), [&](const Slot& slot) { return slot.until <= now; }),
                 slots_.end());
    return slots_.size() < before;
  }
  bool empty() const { return slots_.empty(); }
  // Those that are not for `tenant`, by pool.
  std::map<std::string, int> ForOthersThan(absl::string_view tenant) const {
    std::map<std::string, int> kept;
    for (const Slot& slot : slots_) {
      if (slot.tenant != tenant) ++kept[slot.pool];
    }
    return kept;
  }

 private:
  struct Slot {
    std::string pool;
    std::string tenant;
    absl::Time until;
  };
  std::vector<Slot> slots_;  // As many as there are slots at most.
};

}  // namespace rwkv::router
