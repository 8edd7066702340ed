#include "services/router/scheduler/fair_slots.h"

#include <algorithm>
#include <deque>
#include <limits>
#include <tuple>

namespace rwkv::router {

std::map<std::string, int> FairAllocation(int slots, const std::map<std::string, int>& demand, TenantWeight weight) {
  std::map<std::string, int> allocation;
  for (; slots > 0; --slots) {
    const std::string* next = nullptr;
    double least = std::numeric_limits<double>::infinity();
    for (const auto& [tenant, wanted] : demand) {
      const int has = allocation[tenant];
      const double with_one_more = (has + 1) / weight(tenant);
      if (has >= wanted || with_one_more >= least) continue;
      least = with_one_more;
      next = &tenant;
    }
    if (next == nullptr) break;
    ++allocation[*next];
  }
  return allocation;
}

std::vector<uint64_t> ChooseFairYields(const std::vector<FairHolder>& holders, const std::map<std::string, int>& held,
                                       const std::vector<std::string>& waiting, TenantWeight weight,
                                       absl::Duration quantum, absl::Time now) {
  std::map<std::string, int> demand = held, has = held;
  int slots = 0;
  for (const auto& [tenant, count] : held) slots += count;
  for (const std::string& tenant : waiting) ++demand[tenant];
  std::map<std::string, int> fair = FairAllocation(slots, demand, weight);

  // Of each tenant those that have had theirs longest first.
  std::vector<FairHolder> sorted = holders;
  std::sort(sorted.begin(), sorted.end(), [](const FairHolder& a, const FairHolder& b) {
    return std::tie(a.since, a.turn_id) < std::tie(b.since, b.turn_id);
  });
  std::map<std::string, std::deque<const FairHolder*>> of;
  for (const FairHolder& holder : sorted) of[holder.tenant].push_back(&holder);

  std::vector<uint64_t> chosen;
  for (const std::string& tenant : waiting) {
    const FairHolder* taken = nullptr;
    if (has[tenant] < fair[tenant]) {
      // From who is furthest above its share.
      int most = 0;
      for (const auto& [other, theirs] : of) {
        const int above = has[other] - fair[other];
        if (theirs.empty() || above <= most) continue;
        most = above;
        taken = theirs.front();
      }
      if (taken != nullptr) {
        --has[taken->tenant];
        ++has[tenant];
      }
    } else {
      // Taking turns: with its own, or, of whom there is no slot for, with everybody.
      const bool has_none = has[tenant] == 0;
      for (const auto& [other, theirs] : of) {
        if (theirs.empty() || (other != tenant && !has_none) || now - theirs.front()->since < quantum) continue;
        if (taken == nullptr || theirs.front()->since < taken->since) taken = theirs.front();
      }
      if (taken != nullptr) {
        --has[taken->tenant];
        ++has[tenant];
      }
    }
    if (taken == nullptr) continue;
    of[taken->tenant].pop_front();
    chosen.push_back(taken->turn_id);
  }
  return chosen;
}

std::vector<size_t> FairOrder(const std::map<std::string, int>& held, const std::vector<std::string>& waiting,
                              TenantWeight weight) {
  std::map<std::string, std::deque<size_t>> lines;
  for (size_t i = 0; i < waiting.size(); ++i) lines[waiting[i]].push_back(i);
  std::map<std::string, int> has = held;
  std::vector<size_t> order;
  while (!lines.empty()) {
    auto next = lines.begin();
    for (auto line = lines.begin(); line != lines.end(); ++line) {
      const auto key = [&](const auto& l) {
        return std::make_pair((has[l->first] + 1) / weight(l->first), l->second.front());
      };
      if (key(line) < key(next)) next = line;
    }
    order.push_back(next->second.front());
    next->second.pop_front();
    ++has[next->first];
    if (next->second.empty()) lines.erase(next);
  }
  return order;
}

}  // namespace rwkv::router
