#include "services/router/turns/slot_sharing.h"

#include <algorithm>
#include <tuple>

namespace rwkv::router {

std::vector<uint64_t> ChooseYields(std::vector<SlotHolder> holders, int wanted, absl::Duration quantum,
                                   absl::Time now) {
  std::sort(holders.begin(), holders.end(), [](const SlotHolder& a, const SlotHolder& b) {
    return std::tie(a.since, a.turn_id) < std::tie(b.since, b.turn_id);
  });
  std::vector<uint64_t> chosen;
  for (const SlotHolder& holder : holders) {
    if (static_cast<int>(chosen.size()) >= wanted || now - holder.since < quantum) break;
    chosen.push_back(holder.turn_id);
  }
  return chosen;
}

}  // namespace rwkv::router
