// Counts every call that a server answers, by method and code, under the names that gRPC's dashboards read.
#pragma once

#include "grpcpp/support/server_interceptor.h"
#include "services/common/metrics.h"

namespace rwkv::common {

// Of one server; `metrics` outlives it. A call that was refused before it reached a service counts nothing
// (rwkv_server_refused_calls_total does).
class CallMetrics final : public grpc::experimental::ServerInterceptorFactoryInterface {
 public:
  explicit CallMetrics(Metrics* metrics) : metrics_(metrics) {}
  grpc::experimental::Interceptor* CreateServerInterceptor(grpc::experimental::ServerRpcInfo* info) override;

 private:
  Metrics* const metrics_;
};

}  // namespace rwkv::common
