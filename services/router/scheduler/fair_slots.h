// Which turns hold the slots when there are too few, fairly between tenants. Pure.
//
// Slots are shared by weighted max-min: a tenant has as many as its weight entitles it to among those that want some, or
// as many as it wants. Who waits and whose tenant has fewer than that takes one from a tenant that has more, at once;
// turns of one tenant take turns among themselves, each with a slot for `quantum` at least, and so do tenants where
// there are fewer slots than tenants. So a tenant within its share loses no slot to another's flood.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace rwkv::router {

// A turn that could give its slot away now and lose nothing but time.
struct FairHolder {
  uint64_t turn_id = 0;
  absl::Time since;  // When it got the slot.
  std::string tenant;
};

using TenantWeight = absl::FunctionRef<double(absl::string_view tenant)>;

// How many of `slots` each tenant should have, that wants `demand[tenant]`. Ties go by name.
std::map<std::string, int> FairAllocation(int slots, const std::map<std::string, int>& demand, TenantWeight weight);

// The turns that give their slots away so that those of `waiting` (a tenant each, the longest waiting first) get one.
// `held`: slots of each tenant, those included that cannot be given away now.
std::vector<uint64_t> ChooseFairYields(const std::vector<FairHolder>& holders, const std::map<std::string, int>& held,
                                       const std::vector<std::string>& waiting, TenantWeight weight,
                                       absl::Duration quantum, absl::Time now);

// In which order those of `waiting` should get slots that are free: indices into it. The tenant with the fewest for its
// weight is next, of each the longest waiting.
std::vector<size_t> FairOrder(const std::map<std::string, int>& held, const std::vector<std::string>& waiting,
                              TenantWeight weight);

}  // namespace rwkv::router
