// Who gives a slot away when others wait for one. Pure.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/time/time.h"

namespace rwkv::router {

// A turn that could give its slot away now and lose nothing but time.
struct SlotHolder {
  uint64_t turn_id = 0;
  absl::Time since;  // When it got the slot.
};

// The turns that give their slots away so that `wanted` others get one: those that have had theirs longest, and nobody
// who has had it for less than `quantum`.
std::vector<uint64_t> ChooseYields(std::vector<SlotHolder> holders, int wanted, absl::Duration quantum, absl::Time now);

}  // namespace rwkv::router
