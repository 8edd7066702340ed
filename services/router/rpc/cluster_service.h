// rwkv.v1.Cluster: who is there, and how they are.
#pragma once

#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "rwkv/v1/cluster.grpc.pb.h"
#include "services/common/executor.h"
#include "services/router/turns/turn_manager.h"
#include "services/state_store/client/state_store_client.h"

namespace rwkv::router {

class ClusterService final : public v1::Cluster::CallbackService {
 public:
  // All borrowed.
  ClusterService(std::string router, std::string state_store_address, TurnManager* turns,
                 state_store::CatalogClient* catalog, common::Executor* executor);

  // Where this process answers, known only after it listens.
  void SetAddresses(const std::string& address, const std::string& metrics_address) ABSL_LOCKS_EXCLUDED(mu_);

  grpc::ServerUnaryReactor* GetStatus(grpc::CallbackServerContext* context, const v1::GetStatusRequest* request,
                                      v1::GetStatusResponse* response) override;

 private:
  // Routers, workers and lanes.
  void FillWorkers(absl::Time deadline, v1::GetStatusResponse* response);
  void FillNow(v1::GetStatusResponse* response) ABSL_LOCKS_EXCLUDED(mu_);

  const std::string router_;
  const std::string state_store_address_;
  TurnManager* const turns_;
  state_store::CatalogClient* const catalog_;
  common::Executor* const executor_;
  absl::Mutex mu_;
  std::string address_ ABSL_GUARDED_BY(mu_);
  std::string metrics_address_ ABSL_GUARDED_BY(mu_);
};

}  // namespace rwkv::router
