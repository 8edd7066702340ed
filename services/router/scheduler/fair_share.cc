#include "services/router/scheduler/fair_share.h"

#include <algorithm>
#include <limits>

namespace rwkv::router {
namespace {

// Beyond so many, those that are idle and have nothing to make up for are forgotten.
constexpr size_t kKept = 64;
constexpr double kNobody = std::numeric_limits<double>::infinity();

}  // namespace

double FairShare::Smallest() const {
  double smallest = kNobody;
  for (const auto& [name, flow] : flows_) {
    if (flow.work > 0) smallest = std::min(smallest, flow.counter);
  }
  return smallest;
}

void FairShare::ForgetIdle() {
  for (auto it = flows_.begin(); it != flows_.end();) {
    const Flow& flow = it->second;
    it = flow.work == 0 && flow.counter <= floor_ ? flows_.erase(it) : std::next(it);
  }
}

void FairShare::Begin(absl::string_view name, double weight) {
  if (flows_.size() > kKept) ForgetIdle();
  Flow& flow = flows_[std::string(name)];
  flow.weight = weight;
  if (flow.work == 0) {
    if (const double smallest = Smallest(); smallest != kNobody) floor_ = std::max(floor_, smallest);
    flow.counter = std::max(flow.counter, floor_);
  }
  ++flow.work;
}

void FairShare::End(absl::string_view name) {
  const auto found = flows_.find(name);
  if (found == flows_.end() || found->second.work == 0) return;
  // The last to go leaves its counter behind: whoever comes then begins there, not at the start of all times.
  floor_ = std::max(floor_, Smallest());
  --found->second.work;
}

void FairShare::Charge(absl::string_view name, double tokens) {
  Flow& flow = flows_[std::string(name)];
  flow.counter += tokens / flow.weight;
}

double FairShare::counter(absl::string_view flow) const {
  const auto found = flows_.find(flow);
  return found == flows_.end() ? floor_ : found->second.counter;
}

}  // namespace rwkv::router
