#include "services/state_store/rpc/rpc_metrics.h"

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "services/common/grpc_status.h"

namespace rwkv::state_store {

RpcMetrics::RpcMetrics(common::Metrics* metrics, std::initializer_list<const char*> methods) {
  for (const char* method : methods) {
    seconds_.push_back(&metrics->Histogram("rwkv_state_store_rpc_seconds", "Time to answer a call.",
                                           common::Metrics::LatencyBuckets(), {{"method", method}}));
  }
  for (size_t code = 0; code < errors_total_.size(); ++code) {
    errors_total_[code] =
        code == 0
            ? nullptr
            : &metrics->Counter(
                  "rwkv_state_store_errors_total", "Calls and items that failed.",
                  {{"code", absl::AsciiStrToLower(absl::StatusCodeToString(static_cast<absl::StatusCode>(code)))}});
  }
}

grpc::Status RpcMetrics::Answer(size_t method, absl::FunctionRef<absl::Status()> handle) const {
  const absl::Time start = absl::Now();
  const absl::Status status = handle();
  seconds_[method]->Observe(std::max(0.0, absl::ToDoubleSeconds(absl::Now() - start)));
  CountError(status);
  return common::ToGrpcStatus(status);
}

void RpcMetrics::CountError(const absl::Status& status) const {
  if (!status.ok()) errors_total_[static_cast<size_t>(status.code())]->Increment();
}

}  // namespace rwkv::state_store
