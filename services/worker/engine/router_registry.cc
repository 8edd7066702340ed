#include "services/worker/engine/router_registry.h"

#include <algorithm>

namespace rwkv::worker {
namespace {

void Cut(std::string* text) { text->resize(std::min(text->size(), RouterRegistry::kMaxTextBytes)); }

}  // namespace

void RouterRegistry::Heard(const v1::RouterAnnouncement& router) {
  if (router.name().empty() || router.name().size() > kMaxTextBytes) return;
  const absl::Time now = clock_->Now();
  absl::MutexLock lock(&mu_);
  if (known_.size() >= kMaxRouters && known_.find(router.name()) == known_.end()) {
    const auto oldest = std::min_element(known_.begin(), known_.end(),
                                         [](const auto& a, const auto& b) { return a.second.heard < b.second.heard; });
    if (now - oldest->second.heard <= kLately) return;
    known_.erase(oldest);
  }
  Known& known = known_[router.name()];
  known.router = router;
  Cut(known.router.mutable_address());
  Cut(known.router.mutable_metrics_address());
  Cut(known.router.mutable_incarnation());
  auto& tenants = *known.router.mutable_tenants();
  if (tenants.size() > kMaxTenants) tenants.DeleteSubrange(kMaxTenants, tenants.size() - kMaxTenants);
  for (v1::TenantUse& tenant : tenants) Cut(tenant.mutable_tenant());
  known.heard = now;
}

std::vector<v1::RouterAnnouncement> RouterRegistry::Lately() const {
  const absl::Time now = clock_->Now();
  std::vector<v1::RouterAnnouncement> routers;
  absl::MutexLock lock(&mu_);
  for (const auto& [name, known] : known_) {
    if (now - known.heard <= kLately) routers.push_back(known.router);
  }
  return routers;
}

bool RouterRegistry::IsSilent(const std::string& name) const {
  const absl::Time now = clock_->Now();
  absl::MutexLock lock(&mu_);
  const auto it = known_.find(name);
  return it != known_.end() && now - it->second.heard > kSilence;
}

}  // namespace rwkv::worker
