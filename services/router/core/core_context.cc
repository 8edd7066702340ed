#include "services/router/core/core_context.h"

#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"
#include "services/common/grpc_status.h"
#include "services/router/core/log_writer.h"

namespace rwkv::router {
namespace {

constexpr absl::Duration kAskAgainForLease = absl::Seconds(1);

}  // namespace

CoreContext::CoreContext(const TurnOptions& options, World* world, state_store::CatalogClient* catalog,
                         RouterMetrics* metrics)
    : options(options), world(world), catalog(catalog), metrics(metrics) {}

absl::Time CoreContext::StoreDeadline() const {
  return world->CallClock() + (draining ? std::min(options.store_timeout, absl::Seconds(2)) : options.store_timeout);
}

absl::Status CoreContext::StoreError(const absl::Status& status) const {
  if (absl::IsAborted(status) && !common::GetRetryDelay(status).has_value()) {
    return common::WithRetryInfo(status, options.retry_delay);  // Read again, then go on.
  }
  // Whoever has the session may give it back long before its lease runs out, as soon as a snapshot is there.
  if (common::GetErrorReason(status) == "LEASE_HELD") {
    return common::WithRetryInfo(status, std::min(*common::GetRetryDelay(status), kAskAgainForLease));
  }
  if (!MayHaveHappened(status)) return status;
  return common::WithRetryInfo(
      absl::UnavailableError(absl::StrCat("the state store cannot be reached: ", status.message())), absl::Seconds(1));
}

absl::Status CoreContext::DrainingStatus() const {
  return common::WithRetryInfo(
      absl::UnavailableError("the router is going away; a named turn can be resumed with its request_id"),
      absl::Seconds(1));
}

double CoreContext::WeightOf(absl::string_view tenant) const {
  return options.tenant_weight ? options.tenant_weight(std::string(tenant)) : 1;
}

}  // namespace rwkv::router
