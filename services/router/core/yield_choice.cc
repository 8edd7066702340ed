#include "services/router/core/yield_choice.h"

#include <algorithm>

#include "absl/strings/string_view.h"

namespace rwkv::router {
namespace {

// `coming` slots go to those of `line` that are next. They have no need of another.
void GiveComing(int coming, TenantWeight weight, std::map<std::string, int>* held, std::vector<std::string>* line) {
  const std::vector<size_t> order = FairOrder(*held, *line, weight);
  std::vector<std::string> others;
  for (size_t i = 0; i < order.size(); ++i) {
    const std::string& tenant = (*line)[order[i]];
    if (i < static_cast<size_t>(coming)) {
      ++(*held)[tenant];
    } else {
      others.push_back(tenant);
    }
  }
  *line = std::move(others);
}

// No tenant of those that wait has fewer slots than its share.
bool HaveTheirShare(const std::map<std::string, int>& held, const std::vector<std::string>& line, TenantWeight weight) {
  std::map<std::string, int> demand = held;
  for (const std::string& tenant : line) ++demand[tenant];
  int slots = 0;
  for (const auto& [tenant, count] : held) slots += count;
  const std::map<std::string, int> fair = FairAllocation(slots, demand, weight);
  return std::all_of(fair.begin(), fair.end(), [&held](const auto& share) {
    const auto has = held.find(share.first);
    return share.second <= (has == held.end() ? 0 : has->second);
  });
}

}  // namespace

std::vector<uint64_t> ChooseYields(const SlotDemand& demand, int most, TenantWeight weight, absl::Duration quantum,
                                   absl::Time now) {
  std::map<std::string, int> held = demand.held;
  std::vector<std::string> line = demand.line;
  if (demand.coming > 0) GiveComing(demand.coming, weight, &held, &line);
  if (line.empty()) return {};
  // Behind a flood this is asked with every step and every refusal, and mostly nobody is to yield: nobody has had a
  // slot for long, and whoever waits has its share.
  const auto had_its_time = [&](const FairHolder& holder) { return now - holder.since >= quantum; };
  if (std::none_of(demand.holders.begin(), demand.holders.end(), had_its_time) && HaveTheirShare(held, line, weight)) {
    return {};
  }
  std::vector<std::string> next;
  for (const size_t i : FairOrder(held, line, weight)) {
    if (static_cast<int>(next.size()) >= most) break;
    next.push_back(line[i]);
  }
  return ChooseFairYields(demand.holders, held, next, weight, quantum, now);
}

}  // namespace rwkv::router
