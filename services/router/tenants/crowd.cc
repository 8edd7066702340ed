#include "services/router/tenants/crowd.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "services/common/grpc_status.h"

namespace rwkv::router {
namespace {

constexpr absl::Duration kWindow = absl::Seconds(1);
// More are refused in a window than this and as many as got in: all are told to stay away for longer. Fewer than half
// of both: for less.
constexpr int kAnyway = 16;

}  // namespace

void Crowd::Place::Leave() {
  if (!left_.exchange(true)) crowd_->Leave(tenant_);
}

void Crowd::Leave(const std::string& tenant) {
  absl::MutexLock lock(&mu_);
  --in_;
  const auto party = parties_.find(tenant);
  if (--party->second.in == 0) parties_.erase(party);
}

std::shared_ptr<Crowd::Place> Crowd::LetIn(const std::string& tenant) {
  Party& party = parties_[tenant];
  ++in_;
  ++party.in;
  ++party.entered;
  return std::shared_ptr<Place>(new Place(this, tenant));
}

bool Crowd::HasItsShare(const std::string& tenant, int in) const {
  const auto share = [this](const std::string& name, int calls) {
    return calls / (options_.weight ? options_.weight(name) : 1);
  };
  const double would_have = share(tenant, in + 1);
  return std::none_of(parties_.begin(), parties_.end(), [&](const auto& other) {
    return other.first != tenant && share(other.first, other.second.in) > would_have;
  });
}

absl::Duration Crowd::Pause(Party& party) {
  const absl::Time now = clock_->Now();
  ++party.refused;
  if (now - party.since >= kWindow) {
    if (party.refused > party.entered + kAnyway) {
      party.pause = std::min(2 * party.pause, kMaxPause);
    } else if (2 * party.refused < party.entered + kAnyway) {
      party.pause = std::max(party.pause / 2, kMinPause);
    }
    party.since = now;
    party.entered = party.refused = 0;
  }
  // Not all in the same instant, which those who decode would feel.
  return party.pause / 2 + party.pause * (static_cast<double>(options_.random() % 1000) / 1000);
}

absl::StatusOr<std::shared_ptr<Crowd::Place>> Crowd::Enter(const std::string& tenant) {
  absl::Status status;
  {
    absl::MutexLock lock(&mu_);
    if (in_ < options_.capacity) return LetIn(tenant);
    const auto party = parties_.find(tenant);
    const int in = party == parties_.end() ? 0 : party->second.in;
    if (in == 0 || !HasItsShare(tenant, in)) return LetIn(tenant);
    status = common::WithRetryInfo(
        absl::ResourceExhaustedError(tenant.empty() ? absl::StrCat("too many requests: ", in_, " run or wait")
                                                    : absl::StrCat("too many requests: ", in_, " run or wait, ", in,
                                                                   " of them of tenant ", tenant)),
        Pause(party->second));
  }
  if (options_.refused) options_.refused(status);
  return status;
}

std::shared_ptr<Crowd::Place> Crowd::EnterAgain(const std::string& tenant) {
  absl::MutexLock lock(&mu_);
  return LetIn(tenant);
}

}  // namespace rwkv::router
