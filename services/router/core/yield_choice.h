// Who of a pool gives its slot away to those that wait. Pure: which turns could is looked up by yields.h, how slots are
// shared between tenants is fair_slots.h's.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "services/router/scheduler/fair_slots.h"

namespace rwkv::router {

// What a pool has for those that wait.
struct SlotDemand {
  std::vector<FairHolder> holders;  // Who could give a slot away.
  std::map<std::string, int> held;  // Slots of each tenant, those included that cannot be given away now.
  int coming = 0;                   // Slots that come free without anybody else giving one away.
  std::vector<std::string> line;    // The tenants of those that want one, the longest waiting first.
};

// The turns that are to give their slot away, at most `most`; each may be saved, which takes its time.
std::vector<uint64_t> ChooseYields(const SlotDemand& demand, int most, TenantWeight weight, absl::Duration quantum,
                                   absl::Time now);

}  // namespace rwkv::router
