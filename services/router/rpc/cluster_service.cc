#include "services/router/rpc/cluster_service.h"

#include <unistd.h>

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "kernels/base/status_macros.h"
#include "services/common/grpc_status.h"
#include "services/router/core/serving_model.h"
#include "services/router/pipeline/fleet.h"
#include "services/router/pipeline/lane_load.h"

namespace rwkv::router {
namespace {

constexpr absl::Duration kProbeTimeout = absl::Seconds(1);
constexpr absl::Duration kUsageTimeout = absl::Seconds(15);
constexpr char kServing[] = "serving";
constexpr char kNotServing[] = "not serving";
constexpr char kUnreachable[] = "unreachable";

// A router's epoch: who drives which workers, as these say.
using Lanes = std::map<std::pair<std::string, std::string>, std::vector<const Fleet::WorkerStatus*>>;

bool IsDriven(const Fleet::WorkerStatus& status) { return status.status.ok() && !status.worker.driven_by().empty(); }

Lanes LanesOf(const std::vector<Fleet::WorkerStatus>& workers) {
  Lanes lanes;
  for (const Fleet::WorkerStatus& worker : workers) {
    if (IsDriven(worker)) lanes[{worker.worker.driven_by(), worker.worker.epoch()}].push_back(&worker);
  }
  return lanes;
}

void FillLane(const std::pair<std::string, std::string>& name, const std::vector<const Fleet::WorkerStatus*>& stages,
              v1::LaneStatus* lane) {
  const v1::DescribeResponse& first = stages.front()->worker;
  lane->set_router(name.first);
  lane->set_epoch(name.second);
  lane->set_model(first.model().name());
  lane->set_fingerprint(first.model().fingerprint());
  lane->set_numeric_family(first.numeric_family());
  lane->set_slots(first.slots());
  for (const Fleet::WorkerStatus* const stage : stages) {
    lane->add_workers(stage->worker.name());
    lane->set_slots(std::min(lane->slots(), stage->worker.slots()));
  }
  lane->set_state(kServing);
}

void FillLoad(const LaneLoad& load, v1::LaneStatus* lane) {
  lane->set_turns(load.turns);
  lane->set_slots_used(load.slots_used);
  lane->set_slots_warm(load.slots_warm);
  lane->set_rows_waiting(load.rows_waiting);
}

// As `router` told the first worker of its lane.
LaneLoad LoadOf(const std::string& router, const v1::DescribeResponse& first) {
  for (const v1::RouterAnnouncement& announcement : first.routers()) {
    if (announcement.name() != router) continue;
    const v1::LaneLoad& load = announcement.lane();
    return {load.turns(), load.slots_used(), load.slots_warm(), load.rows_waiting()};
  }
  return {};
}

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
  process->set_model(worker.model().name());
  if (IsDriven(status)) process->set_driven_by(worker.driven_by());
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

void FillRouter(const v1::RouterAnnouncement& router, v1::ProcessStatus* process) {
  process->set_role("router");
  process->set_name(router.name());
  process->set_pid(router.pid());
  process->set_address(router.address());
  process->set_metrics_address(router.metrics_address());
  process->set_health(router.serving() && !router.draining() ? kServing : kNotServing);
  if (router.draining()) process->set_message("draining");
  process->set_running_turns(router.running_turns());
  process->set_waiting_turns(router.waiting_turns());
  process->set_tokens_per_second(router.tokens_per_second());
}

}  // namespace

ClusterService::ClusterService(std::string router, std::vector<std::string> state_stores,
                               DescribeStores describe_stores, TurnManager* turns, common::Executor* executor,
                               Tenancy* tenancy)
    : router_(std::move(router)),
      state_stores_(std::move(state_stores)),
      describe_stores_(std::move(describe_stores)),
      turns_(turns),
      executor_(executor),
      tenancy_(tenancy) {}

void ClusterService::SetAddresses(const std::string& address, const std::string& metrics_address) {
  absl::MutexLock lock(&mu_);
  address_ = address;
  metrics_address_ = metrics_address;
}

void ClusterService::FillWorkers(absl::Time deadline, v1::GetStatusResponse* response) {
  std::vector<Fleet::WorkerStatus> workers = turns_->fleet().Probe(deadline);
  for (const v1::RouterAnnouncement& router : turns_->fleet().OtherRouters()) {
    FillRouter(router, response->add_processes());
  }
  // This router's lanes first, then others', then who is in none.
  const auto order = [this](const Fleet::WorkerStatus& a) {
    return std::make_tuple(!IsDriven(a), IsDriven(a) && a.worker.driven_by() != router_,
                           IsDriven(a) ? a.worker.driven_by() : "", IsDriven(a) ? a.worker.epoch() : "",
                           a.worker.first_layer());
  };
  std::stable_sort(workers.begin(), workers.end(),
                   [&order](const auto& a, const auto& b) { return order(a) < order(b); });
  const Lanes lanes = LanesOf(workers);
  for (Fleet::WorkerStatus& worker : workers) {
    const auto lane = lanes.find({worker.worker.driven_by(), worker.worker.epoch()});
    if (IsDriven(worker) && lane != lanes.end() && worker.stage_count == 0) {  // Of another router's lane.
      worker.stage_count = static_cast<int>(lane->second.size());
      worker.stage_index =
          static_cast<int>(std::find(lane->second.begin(), lane->second.end(), &worker) - lane->second.begin());
    }
    FillWorker(worker, response->add_processes());
  }

  std::map<std::string, TurnManager::LaneState> own;
  for (TurnManager::LaneState& lane : turns_->Lanes(deadline)) {
    if (!lane.plan.stages.empty()) own[lane.plan.stages.front().address] = std::move(lane);
  }
  for (const bool other : {false, true}) {
    for (const auto& [name, stages] : lanes) {
      if ((name.first != router_) != other) continue;
      v1::LaneStatus& lane = *response->add_lanes();
      FillLane(name, stages, &lane);
      if (other) {
        FillLoad(LoadOf(name.first, stages.front()->worker), &lane);
        continue;
      }
      const auto it = own.find(stages.front()->address);
      if (it == own.end()) continue;
      if (it->second.closing) lane.set_state("closing");
      FillLoad(it->second.load, &lane);
    }
  }
}

void ClusterService::FillStores(absl::Time deadline, v1::GetStatusResponse* response) {
  const std::vector<absl::StatusOr<v1::StateCatalogDescribeResponse>> answers = describe_stores_(deadline);
  for (size_t i = 0; i < state_stores_.size(); ++i) {
    v1::ProcessStatus& store = *response->add_processes();
    store.set_role("state_store");
    store.set_address(state_stores_[i]);
    if (answers[i].ok()) {
      store.set_name(answers[i]->name());
      store.set_pid(answers[i]->pid());
      store.set_metrics_address(answers[i]->metrics_address());
      store.set_health(kServing);
    } else {
      store.set_health(kUnreachable);
      store.set_message(common::ToStatusProto(answers[i].status()).message());
    }
  }
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

  const TurnManager::Counts counts = turns_->counts();
  router->set_running_turns(static_cast<uint32_t>(counts.running));
  router->set_waiting_turns(static_cast<uint32_t>(counts.waiting));
  router->set_tokens_per_second(counts.tokens_per_second);
  FillWorkers(deadline, response);

  FillStores(absl::Now() + kProbeTimeout, response);

  response->set_pipeline_state(state.text);
  if (const std::shared_ptr<const ServingModel> model = turns_->model()) *response->mutable_model() = model->info;
  response->set_tokens_per_second(counts.tokens_per_second);
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

grpc::ServerUnaryReactor* ClusterService::GetTenantUsage(grpc::CallbackServerContext* context,
                                                         const v1::GetTenantUsageRequest* request,
                                                         v1::GetTenantUsageResponse* response) {
  auto* const reactor = context->DefaultReactor();
  const absl::StatusOr<Caller> caller = tenancy_->CallerOf(*context);
  const absl::StatusOr<std::shared_ptr<Crowd::Place>> place =
      caller.ok() ? tenancy_->EnterStore(*caller) : caller.status();
  if (!place.ok()) {
    reactor->Finish(common::ToGrpcStatus(place.status()));
    return reactor;
  }
  const auto ask = [this, caller = *caller, request, response]() -> absl::Status {
    RWKV_ASSIGN_OR_RETURN(const std::string tenant, tenancy_->WhoseUsage(caller, request->tenant()));
    RWKV_ASSIGN_OR_RETURN(const v1::GetUsageResponse usage, tenancy_->GetUsage(tenant, absl::Now() + kUsageTimeout));
    response->set_tenant(tenant);
    response->set_turns(usage.usage().turns());
    response->set_prompt_tokens(usage.usage().prompt_tokens());
    response->set_generated_tokens(usage.usage().generated_tokens());
    response->set_sessions(usage.sessions());
    response->set_stored_bytes(usage.stored_bytes());
    return absl::OkStatus();
  };
  if (!executor_->TryRun([reactor, ask, place = *place] {
        const absl::Status status = ask();
        if (place != nullptr) place->Leave();  // First: whoever hears of the end may come again at once.
        reactor->Finish(common::ToGrpcStatus(status));
      })) {
    reactor->Finish(common::ToGrpcStatus(
        common::WithRetryInfo(absl::ResourceExhaustedError("too many calls wait"), absl::Milliseconds(200))));
  }
  return reactor;
}

}  // namespace rwkv::router
