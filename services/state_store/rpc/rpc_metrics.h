// Time and errors of the calls of one service.
#pragma once

#include <array>
#include <initializer_list>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "grpcpp/support/status.h"
#include "services/common/metrics.h"

namespace rwkv::state_store {

// Thread-safe.
class RpcMetrics {
 public:
  // `methods`: their names; a call says which by its index. `metrics` outlives it.
  RpcMetrics(common::Metrics* metrics, std::initializer_list<const char*> methods);

  // Runs `handle`, counts its time and its error, and gives its status its form on the wire.
  grpc::Status Answer(size_t method, absl::FunctionRef<absl::Status()> handle) const;

  // An error that is no call's own: that of an item.
  void CountError(const absl::Status& status) const;

 private:
  std::vector<prometheus::Histogram*> seconds_;        // By method.
  std::array<prometheus::Counter*, 17> errors_total_;  // By code, 0 to 16.
};

}  // namespace rwkv::state_store
