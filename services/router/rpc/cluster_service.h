// rwkv.v1.Cluster: who is there, and how they are.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "rwkv/v1/cluster.grpc.pb.h"
#include "rwkv/v1/state_store.pb.h"
#include "services/common/executor.h"
#include "services/router/driver/turn_manager.h"
#include "services/router/tenants/tenancy.h"

namespace rwkv::router {

class ClusterService final : public v1::Cluster::CallbackService {
 public:
  // What each store says of itself, or why it does not answer, in the order of their addresses.
  using DescribeStores =
      std::function<std::vector<absl::StatusOr<v1::StateCatalogDescribeResponse>>(absl::Time deadline)>;

  // Pointers are borrowed. `describe_stores` may block until its deadline.
  ClusterService(std::string router, std::vector<std::string> state_stores, DescribeStores describe_stores,
                 TurnManager* turns, common::Executor* executor, Tenancy* tenancy);

  // Where this process answers, known only after it listens.
  void SetAddresses(const std::string& address, const std::string& metrics_address) ABSL_LOCKS_EXCLUDED(mu_);

  grpc::ServerUnaryReactor* GetStatus(grpc::CallbackServerContext* context, const v1::GetStatusRequest* request,
                                      v1::GetStatusResponse* response) override;
  grpc::ServerUnaryReactor* GetTenantUsage(grpc::CallbackServerContext* context,
                                           const v1::GetTenantUsageRequest* request,
                                           v1::GetTenantUsageResponse* response) override;

 private:
  // Routers, workers and lanes.
  void FillWorkers(absl::Time deadline, v1::GetStatusResponse* response);
  void FillStores(absl::Time deadline, v1::GetStatusResponse* response);
  void FillNow(v1::GetStatusResponse* response) ABSL_LOCKS_EXCLUDED(mu_);

  const std::string router_;
  const std::vector<std::string> state_stores_;
  const DescribeStores describe_stores_;
  TurnManager* const turns_;
  common::Executor* const executor_;
  Tenancy* const tenancy_;
  absl::Mutex mu_;
  std::string address_ ABSL_GUARDED_BY(mu_);
  std::string metrics_address_ ABSL_GUARDED_BY(mu_);
};

}  // namespace rwkv::router
