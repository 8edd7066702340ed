#include "services/worker/worker.h"

#include <unistd.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "kernels/base/choosing_device.h"
#include "kernels/base/device.h"
#include "kernels/base/status_macros.h"
#include "kernels/dispatch/open_device.h"
#include "services/checkpoint/checkpoint.h"
#include "services/checkpoint/fingerprint.h"
#include "services/checkpoint/formats/tensor_record.h"
#include "services/checkpoint/model_config.h"
#include "services/common/address.h"
#include "services/common/channel.h"
#include "services/common/clock.h"
#include "services/common/grpc_status.h"
#include "services/common/logging.h"
#include "services/common/metrics.h"
#include "services/common/rpc_server.h"
#include "services/common/security/access.h"
#include "services/common/security/security.h"
#include "services/state_store/client/state_store_client.h"
#include "services/worker/engine/router_registry.h"
#include "services/worker/engine/snapshot_transfer.h"
#include "services/worker/engine/stage_engine.h"
#include "services/worker/engine/stage_runner.h"
#include "services/worker/engine/worker_metrics.h"
#include "services/worker/link/device_links.h"
#include "services/worker/link/grpc_link.h"
#include "services/worker/link/nccl.h"
#include "services/worker/link/nccl_link.h"
#include "services/worker/link/transfer.h"
#include "services/worker/model/block/stage_model.h"
#include "services/worker/model/layer_range.h"
#include "services/worker/model/model_info.h"
#include "services/worker/model/tuned_states.h"
#include "services/worker/model/weights.h"
#include "services/worker/rpc/worker_service.h"

namespace rwkv::worker {
namespace {

constexpr int kMaxSlots = 65'536;
constexpr int kMaxBatchTokens = 8'192;
constexpr int kMaxDeepEmbedContext = 1 << 20;
constexpr int kMinReceiveBytes = 4 << 20;
constexpr int64_t kMaxReceiveBytes = int64_t{1} << 30;

absl::Status CheckOptions(const Worker::Options& options) {
  if (options.model.empty()) return absl::InvalidArgumentError("--model: no checkpoint named");
  if (options.lora.empty() != (options.lora_alpha == 0)) {
    return absl::InvalidArgumentError(absl::StrCat("--lora and --lora_alpha: one without the other (",
                                                   checkpoint::Quoted(options.lora), ", ", options.lora_alpha,
                                                   "); alpha is what the adapter was trained with"));
  }
  if (!options.stage.empty() && !options.layers.empty()) {
    return absl::InvalidArgumentError("--stage and --layers: only one of them");
  }
  for (const std::string& address : options.state_store) {
    RWKV_RETURN_IF_ERROR(common::Annotate(common::ParseHostPort(address).status(), "--state_store"));
  }
  if (options.slots < 1 || options.slots > kMaxSlots) {
    return absl::InvalidArgumentError(absl::StrCat("--slots: ", options.slots, " is not in 1 .. ", kMaxSlots));
  }
  if (options.max_batch_tokens < 1 || options.max_batch_tokens > kMaxBatchTokens) {
    return absl::InvalidArgumentError(
        absl::StrCat("--max_batch_tokens: ", options.max_batch_tokens, " is not in 1 .. ", kMaxBatchTokens));
  }
  if (!(options.group_norm_epsilon > 0 && options.group_norm_epsilon <= 1)) {
    return absl::InvalidArgumentError(
        absl::StrCat("--group_norm_eps: ", options.group_norm_epsilon, " is not in (0, 1]"));
  }
  if (options.deep_embed_context < 1 || options.deep_embed_context > kMaxDeepEmbedContext) {
    return absl::InvalidArgumentError(
        absl::StrCat("--deep_embed_context: ", options.deep_embed_context, " is not in 1 .. ", kMaxDeepEmbedContext));
  }
  if (options.threads < 0 || options.threads > 1024) {
    return absl::InvalidArgumentError(absl::StrCat("--threads: ", options.threads, " is not in [0, 1024]"));
  }
  if (options.link != "auto" && options.link != "grpc" && options.link != "nccl") {
    return absl::InvalidArgumentError(
        absl::StrCat("--link: ", checkpoint::Quoted(options.link), " is none of auto, grpc, nccl"));
  }
  if (options.link_timeout <= absl::ZeroDuration() || options.link_timeout > absl::Minutes(30)) {
    return absl::InvalidArgumentError(
        absl::StrCat("--link_timeout: ", absl::FormatDuration(options.link_timeout), " is not in (0, 30m]"));
  }
  if (options.kept_state_bytes < 0) {
    return absl::InvalidArgumentError("--kept_state_bytes: must not be negative; 0: none");
  }
  if (options.max_snapshot_bytes_in_flight < 1) {
    return absl::InvalidArgumentError("--max_snapshot_bytes_in_flight: must be positive");
  }
  return absl::OkStatus();
}

absl::StatusOr<LayerRange> ChooseLayers(const Worker::Options& options, int layer_count) {
  if (!options.layers.empty()) return ParseLayerRange(options.layers, layer_count);
  if (!options.stage.empty()) return ParseStageOf(options.name, options.stage, layer_count);
  return LayerRange{0, layer_count};
}

absl::StatusOr<std::unique_ptr<kernels::Device>> OpenDevice(const Worker::Options& options,
                                                            const Worker::Platform& platform) {
  absl::StatusOr<std::unique_ptr<kernels::Device>> device = platform.open_device(options.device, options.threads);
  if (device.ok()) return device;
  return absl::Status(device.status().code(), absl::StrCat("--device: ", device.status().message()));
}

class WorkerImpl final : public Worker {
 public:
  ~WorkerImpl() override {
    // Streams end with the runner's epoch, so the server has nothing to wait for.
    if (runner_ != nullptr) runner_->Drain(absl::Now());
    if (server_ != nullptr) server_->Shutdown(absl::Now());
  }

  absl::Status Init(const Options& options, const Platform& platform);

  const std::string& address() const override { return server_->address(); }
  std::string metrics_address() const override { return metrics_->address(); }
  const v1::DescribeResponse& description() const override { return description_; }

  absl::Status ServeUntilSignal() override {
    return server_->ServeUntilSignal([this](absl::Time deadline) { runner_->Drain(deadline); });
  }

 private:
  // In order of dependence: what is below uses what is above.
  std::unique_ptr<common::Metrics> metrics_;
  std::unique_ptr<common::Security> security_;
  std::unique_ptr<common::Tracer> tracer_;  // Null: off.
  std::unique_ptr<WorkerMetrics> worker_metrics_;
  v1::DescribeResponse description_;
  std::unique_ptr<StageEngine> engine_;
  nccl::Nccl nccl_ = {};
  std::unique_ptr<DeviceLinks> device_links_;
  std::unique_ptr<GrpcLinkTransport> links_;
  std::unique_ptr<SnapshotTransfer> transfer_;
  common::SystemClock clock_;
  RouterRegistry routers_{&clock_};
  std::unique_ptr<StageRunner> runner_;
  std::unique_ptr<WorkerService> service_;
  std::unique_ptr<common::RpcServer> server_;

  absl::StatusOr<LinkChoice> ChooseLinks(const Options& options, const Platform& platform);
};

absl::StatusOr<LinkChoice> WorkerImpl::ChooseLinks(const Options& options, const Platform& platform) {
  LinkChoice choice;
  choice.kind = options.link == "auto" ? LinkKind::kAuto : options.link == "nccl" ? LinkKind::kDevice : LinkKind::kGrpc;
  if (choice.kind == LinkKind::kGrpc) return choice;
  kernels::Device& device = engine_->device();
  absl::Status status;
  if (device.identity().empty()) {
    status = absl::UnimplementedError(absl::StrCat(device.name(), " is no GPU"));
  } else {
    absl::StatusOr<nccl::Nccl> nccl = platform.load_nccl();
    status = nccl.status();
    if (nccl.ok()) {
      nccl_ = *nccl;
      absl::StatusOr<std::unique_ptr<DeviceLinks>> links =
          MakeNcclLinks(nccl_, device.identity(), [&device] { return device.MakeCurrent(); });
      status = links.status();
      if (links.ok()) device_links_ = *std::move(links);
    }
  }
  if (!status.ok() && choice.kind == LinkKind::kDevice) {
    return absl::FailedPreconditionError(absl::StrCat("--link=nccl: ", status.message()));
  }
  choice.device = device_links_.get();
  choice.why_none = std::string(status.message());
  common::LogInfo("links", {{"rows_by", device_links_ == nullptr ? "grpc" : device_links_->kind()},
                            {"version", device_links_ == nullptr ? 0 : device_links_->version()},
                            {"why_grpc", choice.why_none},
                            {"settings", absl::StrJoin(nccl::Environment(), " ")}});
  return choice;
}

absl::Status WorkerImpl::Init(const Options& options, const Platform& platform) {
  RWKV_RETURN_IF_ERROR(CheckOptions(options));
  RWKV_ASSIGN_OR_RETURN(std::unique_ptr<kernels::Device> device, OpenDevice(options, platform));
  RWKV_ASSIGN_OR_RETURN(std::shared_ptr<const checkpoint::Checkpoint> checkpoint,
                        options.lora.empty() ? checkpoint::Checkpoint::Open(options.model)
                                             : checkpoint::Checkpoint::OpenWithAdapter(
                                                   options.model, {options.lora, options.lora_alpha, ""}));
  RWKV_ASSIGN_OR_RETURN(const checkpoint::ModelConfig config,
                        checkpoint::ModelConfig::FromCheckpoint(*checkpoint, options.ignore_extra_tensors));
  for (const std::string& note : checkpoint::Notes(*checkpoint, config)) {
    common::LogWarning("checkpoint", {{"file", options.model}, {"note", note}});
  }
  RWKV_ASSIGN_OR_RETURN(const LayerRange layers, ChooseLayers(options, config.layer_count));
  RWKV_ASSIGN_OR_RETURN(metrics_, common::Metrics::Create(options.metrics_listen, {{"process", options.name}}));
  worker_metrics_ = std::make_unique<WorkerMetrics>(*metrics_);
  RWKV_ASSIGN_OR_RETURN(security_, common::Security::Create(options.security, metrics_.get()));
  RWKV_ASSIGN_OR_RETURN(tracer_, common::Tracer::Create(options.tracing, metrics_.get()));

  const absl::Time begin = absl::Now();
  RWKV_ASSIGN_OR_RETURN(std::shared_ptr<const StageWeights> weights,
                        StageWeights::Load(checkpoint, config, layers, *device));
  if (const auto* const choosing = dynamic_cast<const kernels::ChoosingDevice*>(device.get()); choosing != nullptr) {
    for (const std::string& choice : choosing->Choices()) {
      common::LogInfo("products_chosen", {{"device", device->name()}, {"choice", choice}});
    }
  }
  absl::StatusOr<TunedStates> tuned_states = LoadTunedStates(options.initial_states, config, layers);
  if (!tuned_states.ok()) {
    return absl::Status(tuned_states.status().code(),
                        absl::StrCat("--initial_states: ", tuned_states.status().message()));
  }
  StageModelOptions model_options;
  model_options.max_rows = options.max_batch_tokens;
  model_options.group_norm_epsilon = options.group_norm_epsilon;
  model_options.deep_embed_context = options.deep_embed_context;
  RWKV_ASSIGN_OR_RETURN(std::unique_ptr<StageModel> model,
                        CreateStageModel(std::move(weights), *device, model_options));

  RWKV_ASSIGN_OR_RETURN(*description_.mutable_model(), MakeModelInfo(*checkpoint, config));
  if (options.group_norm_epsilon != StageModelOptions().group_norm_epsilon) {
    // Stages that differ in it make no pipeline, and their states are not each other's.
    v1::ModelInfo& info = *description_.mutable_model();
    info.set_fingerprint(checkpoint::FingerprintWith(info.fingerprint(),
                                                     absl::StrCat("group_norm_epsilon=", options.group_norm_epsilon)));
  }
  for (const auto& [id, state] : *tuned_states) description_.mutable_model()->add_initial_states(id);
  description_.set_name(options.name);
  description_.set_pid(getpid());
  description_.set_metrics_address(metrics_->address());
  description_.set_first_layer(layers.begin);
  description_.set_end_layer(layers.end);
  description_.set_slots(options.slots);
  description_.set_max_batch_tokens(options.max_batch_tokens);
  const int threads = device->threads();
  description_.set_kernels(std::string(device->name()));
  description_.set_numeric_family(std::string(device->numeric_family()));
  description_.set_max_context_tokens(model->max_tokens());
  for (const StateTensorSpec& tensor : model->state_layout().tensors()) {
    v1::StateTensor& out = *description_.add_state_layout();
    out.set_name(tensor.name);
    for (int64_t dimension : tensor.shape) out.add_shape(dimension);
  }

  StageEngine::Options engine_options;
  engine_options.slots = options.slots;
  engine_options.max_batch_tokens = options.max_batch_tokens;
  engine_options.fingerprint = description_.model().fingerprint();
  RWKV_ASSIGN_OR_RETURN(engine_, StageEngine::Create(std::move(engine_options), std::move(device), std::move(model),
                                                     *std::move(tuned_states)));
  RWKV_RETURN_IF_ERROR(engine_->WarmUp());
  common::LogInfo("stage_ready", {{"model", description_.model().name()},
                                  {"fingerprint", description_.model().fingerprint()},
                                  {"layers", layers.ToString()},
                                  {"of", config.layer_count},
                                  {"device", description_.kernels()},
                                  {"threads", threads},
                                  {"numeric_family", description_.numeric_family()},
                                  {"no_gpu", options.device == "auto" ? kernels::WhyNoGpu() : ""},
                                  {"slots", options.slots},
                                  {"initial_states", description_.model().initial_states_size()},
                                  {"state_bytes", engine_->pool().bytes()},
                                  {"seconds", absl::ToDoubleSeconds(absl::Now() - begin)}});

  common::ChannelOptions to_worker, to_store;
  to_worker.credentials = security_->ForChannelTo(common::Role::kWorker);
  to_store.credentials = security_->ForChannelTo(common::Role::kStore);
  to_store.bulk = true;
  RWKV_ASSIGN_OR_RETURN(LinkChoice choice, ChooseLinks(options, platform));
  links_ = std::make_unique<GrpcLinkTransport>(
      engine_->link_shape(),
      [to_worker](const std::string& address) { return common::MakeChannel(address, to_worker); }, std::move(choice));
  SnapshotTransfer::Options transfer_options;
  transfer_options.max_save_bytes = options.max_snapshot_bytes_in_flight;
  transfer_ = std::make_unique<SnapshotTransfer>(transfer_options, worker_metrics_.get());
  StageRunnerOptions runner_options;
  runner_options.link_timeout = options.link_timeout;
  runner_options.tracer = tracer_.get();
  runner_options.kept_state_bytes = options.kept_state_bytes;
  runner_ = std::make_unique<StageRunner>(
      engine_.get(), links_.get(), transfer_.get(),
      [addresses = options.state_store, to_store]() -> std::shared_ptr<state_store::RecordsClient> {
        if (addresses.empty()) return nullptr;
        return state_store::NewRecordsClient(common::MakeChannels(addresses, to_store), /*home=*/{},
                                             /*share_memory=*/true);
      },
      worker_metrics_.get(), &routers_, runner_options);
  service_ = std::make_unique<WorkerService>(description_, runner_.get(), &routers_);

  common::RpcServer::Options server_options;
  server_options.name = options.name;
  server_options.listen_address = options.listen;
  server_options.health_address = options.health_listen;
  server_options.credentials = security_->ForServer();
  server_options.metrics = metrics_.get();
  server_options.metrics_address = metrics_->address();
  server_options.port_file = options.port_file;
  server_options.max_receive_bytes = static_cast<int>(
      std::max<int64_t>(kMinReceiveBytes, std::min(kMaxReceiveBytes, MaxTransferBytes(engine_->link_shape()))));
  server_options.drain_timeout = options.drain_timeout;
  RWKV_ASSIGN_OR_RETURN(server_, common::RpcServer::Start(server_options, {service_.get(), links_->service()}));
  server_->SetServing(true);
  return absl::OkStatus();
}

}  // namespace

Worker::Platform Worker::MachinesOwn() {
  return {[](const std::string& name, int threads) { return kernels::OpenDevice(name, threads); },
          [] { return nccl::Load(nccl::kLibrary); }};
}

absl::StatusOr<std::unique_ptr<Worker>> Worker::Start(const Options& options, const Platform& platform) {
  auto worker = std::make_unique<WorkerImpl>();
  RWKV_RETURN_IF_ERROR(worker->Init(options, platform));
  return absl::StatusOr<std::unique_ptr<Worker>>(std::move(worker));
}

}  // namespace rwkv::worker
