#include "services/router/core/turn_tally.h"

namespace rwkv::router {
namespace {

int Sum(const std::map<std::string, int>& counts) {
  int sum = 0;
  for (const auto& [name, count] : counts) sum += count;
  return sum;
}

}  // namespace

void TurnTally::Count(Held& counts, const std::string& name, int by) {
  const auto count = counts.try_emplace(name, 0).first;
  count->second += by;
  if (count->second == 0) counts.erase(count);
}

void TurnTally::CountActive(const std::string& pool, int by) {
  Count(active_, pool, by);
  Bump();
}

void TurnTally::CountHeld(const std::string& pool, const std::string& tenant, int by) {
  Count(held_[pool], tenant, by);
  if (!pool.empty()) Count(held_[""], tenant, by);
  Bump();
}

int TurnTally::active(const std::string& pool) const {
  const auto count = active_.find(pool);
  return count == active_.end() ? 0 : count->second;
}

const TurnTally::Held& TurnTally::held(const std::string& pool) const {
  static const Held* const kNone = new Held();
  const auto counts = held_.find(pool);
  return counts == held_.end() ? *kNone : counts->second;
}

int TurnTally::yielding(const std::string& pool) const { return active(pool) - Sum(held(pool)); }

int TurnTally::yielding() const { return Sum(active_) - Sum(held("")); }

}  // namespace rwkv::router
