#include "services/router/rpc/cluster_service.h"

#include <unistd.h>

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "services/common/grpc_status.h"
#include "services/router/pipeline/fleet.h"
#include "services/router/turns/serving_model.h"

namespace rwkv::router {
namespace {

constexpr absl::Duration kProbeTimeout = absl::Seconds(1);
constexpr char kServing[] = "serving";
constexpr char kNotServing[] = "not serving";
constexpr char kUnreachable[] = "unreachable";

void FillWorker(const Fleet::WorkerStatus& status, v1::ProcessStatus* process) {
  const v1::DescribeResponse& worker = status.worker;
  process->set_role("worker");
  process->set_address(status.address);
  process->set_name(worker.name());
  process->set_pid(worker.pid());
  process->set_metrics_address(worker.metrics_address());
  process->set_stage_index(std::max(status.stage_index, 0));
  process->set_stage_count(status.stage_count);
  process->set_first_layer(worker.first_layer());
  process->set_end_layer(worker.end_layer());
  process->set_slots(worker.slots());
  process->set_kernels(worker.kernels());
  if (!status.status.ok()) {
    process->set_health(kUnreachable);
    process->set_message(common::ToStatusProto(status.status).message());
  } else if (worker.draining()) {
    process->set_health(kNotServing);
    process->set_message("draining");
  } else {
    process->set_health(kServing);
  }
}

}  // namespace

ClusterService::ClusterService(std::string router, std::string state_store_address, TurnManager* turns,
                               state_store::CatalogClient* catalog, common::Executor* executor)
    : router_(std::move(router)),
      state_store_address_(std::move(state_store_address)),
      turns_(turns),
      catalog_(catalog),
      executor_(executor) {}

void ClusterService::SetAddresses(const std::string& address, const std::string& metrics_address) {
  absl::MutexLock lock(&mu_);
  address_ = address;
  metrics_address_ = metrics_address;
}

void ClusterService::FillNow(v1::GetStatusResponse* response) {
  const absl::Time deadline = absl::Now() + kProbeTimeout;
  const Fleet::State state = turns_->fleet().state();
  v1::ProcessStatus* const router = response->add_processes();
  router->set_role("router");
  router->set_name(router_);
  router->set_pid(getpid());
  {
    absl::MutexLock lock(&mu_);
    router->set_address(address_);
    router->set_metrics_address(metrics_address_);
  }
  const bool draining = turns_->draining();
  router->set_health(state.serving && !draining ? kServing : kNotServing);
  if (draining) {
    router->set_message("draining");
  } else if (!state.serving) {
    router->set_message(common::ToStatusProto(state.status).message());
  }

  std::vector<Fleet::WorkerStatus> workers = turns_->fleet().Probe(deadline);
  std::stable_sort(workers.begin(), workers.end(), [](const auto& a, const auto& b) {
    return std::make_pair(a.stage_index < 0, a.stage_index) < std::make_pair(b.stage_index < 0, b.stage_index);
  });
  for (const Fleet::WorkerStatus& worker : workers) FillWorker(worker, response->add_processes());

  v1::ProcessStatus* const store = response->add_processes();
  store->set_role("state_store");
  store->set_address(state_store_address_);
  const absl::StatusOr<v1::StateCatalogDescribeResponse> described =
      catalog_->Describe(v1::StateCatalogDescribeRequest(), absl::Now() + kProbeTimeout);
  if (described.ok()) {
    store->set_name(described->name());
    store->set_pid(described->pid());
    store->set_metrics_address(described->metrics_address());
    store->set_health(kServing);
  } else {
    store->set_health(kUnreachable);
    store->set_message(common::ToStatusProto(described.status()).message());
  }

  response->set_pipeline_state(state.text);
  if (const std::shared_ptr<const ServingModel> model = turns_->model()) *response->mutable_model() = model->info;
  const TurnManager::Counts counts = turns_->counts();
  response->set_running_turns(static_cast<uint32_t>(counts.running));
  response->set_waiting_turns(static_cast<uint32_t>(counts.waiting));
}

grpc::ServerUnaryReactor* ClusterService::GetStatus(grpc::CallbackServerContext* context,
                                                    const v1::GetStatusRequest* request,
                                                    v1::GetStatusResponse* response) {
  auto* const reactor = context->DefaultReactor();
  if (!executor_->TryRun([this, reactor, response] {
        FillNow(response);
        reactor->Finish(grpc::Status::OK);
      })) {
    reactor->Finish(common::ToGrpcStatus(
        common::WithRetryInfo(absl::ResourceExhaustedError("too many calls wait"), absl::Milliseconds(200))));
  }
  return reactor;
}

}  // namespace rwkv::router
