#include <unistd.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/flags/flag.h"
#include "absl/random/random.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "kernels/base/status_macros.h"
#include "services/common/address.h"
#include "services/common/channel.h"
#include "services/common/clock.h"
#include "services/common/executor.h"
#include "services/common/grpc_status.h"
#include "services/common/logging.h"
#include "services/common/main_loop.h"
#include "services/common/metrics.h"
#include "services/common/rpc_server.h"
#include "services/common/security/access.h"
#include "services/common/security/security.h"
#include "services/common/security/server_flags.h"
#include "services/common/tracing/trace_flags.h"
#include "services/common/tracing/tracer.h"
#include "services/common/watchdog.h"
#include "services/router/core/router_metrics.h"
#include "services/router/core/serving_model.h"
#include "services/router/driver/turn_manager.h"
#include "services/router/pipeline/fleet.h"
#include "services/router/pipeline/found_workers.h"
#include "services/router/prefix_cache/prefix_ends.h"
#include "services/router/router_tokenizer.h"
#include "services/router/rpc/cluster_service.h"
#include "services/router/rpc/generation_service.h"
#include "services/router/rpc/sessions_service.h"
#include "services/router/tenants/tenancy.h"
#include "services/router/vllm_metrics.h"
#include "services/state_store/client/state_store_client.h"
#include "services/tokenizer/tokenizer.h"
#include "services/worker/client/worker_client.h"

ABSL_FLAG(std::string, name, "router-0", "Name of this process, unique among routers: the holder of its leases.");
ABSL_FLAG(std::string, listen, "127.0.0.1:0", "HOST:PORT to serve on; port 0 picks a free one.");
ABSL_FLAG(std::string, metrics_listen, "127.0.0.1:0", "HOST:PORT of /metrics; empty: none.");
ABSL_FLAG(bool, vllm_metrics, true,
          "Give the metrics under vLLM's names too, for dashboards and autoscalers made for it.");
ABSL_FLAG(std::string, port_file, "", "File to write the addresses to once listening; empty: none.");
ABSL_FLAG(
    std::vector<std::string>, workers, {},
    "Where workers are, in any order: HOST:PORT, file:PATH (a HOST:PORT a line) or dns:NAME:PORT; the last two are "
    "looked "
    "at again and again. Those that fit make pipelines; several routers with the same workers share these. Required.");
ABSL_FLAG(std::vector<std::string>, state_store, {},
          "HOST:PORT of the state store; of several over one --catalog and --records all, by commas: calls go to any, "
          "and to another when one is lost. Required.");
ABSL_FLAG(
    std::vector<std::string>, tokenizer, {},
    "Tokenizer files: vocabularies in World format, 20B_tokenizer.json. The first that fits the model is used; none: "
    "token ids only.");
ABSL_FLAG(
    std::string, api_keys, "",
    "File of the hashes of the API keys that callers may show instead of a certificate; needs TLS. Read again when "
    "it changes. Empty: certificates only.");
ABSL_FLAG(std::string, tenants, "",
          "File of the tenants there are and what each may have (services/router/tenants/tenants_file.h); needs TLS. "
          "Callers of no tenant in it are refused, but operators. Read again when it changes. Empty: no limits.");
ABSL_FLAG(double, trace_sample, 1,
          "With --otlp_traces_endpoint: the share, 0 to 1, of calls without a trace of their client's that are traced. "
          "Those with one are as it says (traceparent).");
ABSL_FLAG(bool, allow_logits, false, "Serve Generation.Logits, a debugging call that sends whole rows of logits.");
ABSL_FLAG(int, max_running, 64, "Calls that hold, or are about to take, a slot. More wait.");
ABSL_FLAG(int, max_waiting, 256, "Calls that wait to be started. More are refused.");
ABSL_FLAG(absl::Duration, max_wait, absl::Seconds(60), "A call that waits to be started for longer is refused.");
ABSL_FLAG(absl::Duration, slot_quantum, absl::Seconds(5),
          "A turn that has had a slot for so long gives it to one that waits, and goes on when its turn comes again.");
ABSL_FLAG(int64_t, max_prompt_tokens, 65536, "Input tokens of one call. More are refused.");
ABSL_FLAG(int64_t, max_document_bytes, 16 << 20,
          "Text (and 4 bytes a token id) of one ScoreDocument. More is refused.");
ABSL_FLAG(absl::Duration, upload_piece_timeout, absl::Seconds(10),
          "Time for the next piece of a document, or of a state to import.");
ABSL_FLAG(absl::Duration, upload_timeout, absl::Minutes(5), "Time for all pieces of a document, or of a state.");
ABSL_FLAG(uint32_t, max_generated_tokens, 1 << 19, "Largest max_tokens of one call.");
ABSL_FLAG(int64_t, snapshot_interval_tokens, 1024, "A running turn's state is saved about this often.");
ABSL_FLAG(
    bool, prefix_cache, true,
    "Keep the states of beginnings that inputs share, and begin from them instead of reading again. Of one tenant "
    "only; their bound is the store's --prefix_cache_bytes.");
ABSL_FLAG(int64_t, prefix_min_tokens, 256,
          "A shorter beginning is not kept, unless a request marks it (GenerateRequest.prefix_ends). At least 16.");
ABSL_FLAG(
    int64_t, prefix_chunk_tokens, 512,
    "Beginnings are kept at multiples of so many tokens, besides marks, the end of the input and where inputs part; "
    "of a long input at larger multiples, so that there are at most 8.");
ABSL_FLAG(absl::Duration, lease_ttl, absl::Seconds(15),
          "Another router may take a session this long after this one died.");
ABSL_FLAG(absl::Duration, store_timeout, absl::Seconds(15), "Of any state store call of a turn, retries included.");
ABSL_FLAG(absl::Duration, progress_timeout, absl::Seconds(30),
          "Steps are in flight and none comes back for this long: the pipeline is taken for hung and opened anew.");
ABSL_FLAG(absl::Duration, outage_timeout, absl::Seconds(60), "A started turn waits this long for a lost pipeline.");
ABSL_FLAG(absl::Duration, slow_client_timeout, absl::Seconds(30),
          "A client that takes nothing for this long is cut off.");
ABSL_FLAG(absl::Duration, drain_timeout, absl::Seconds(10), "Time that running turns have to end after SIGTERM.");

namespace rwkv::router {
namespace {

// Of the state store, for calls that are not part of a turn.
constexpr int kRpcThreads = 8;
constexpr size_t kMaxQueuedRpcs = 256;
// Tokenizing, which must not wait for a store that is away.
constexpr int kTextThreads = 2;
constexpr size_t kMaxQueuedTexts = 1024;

uint64_t Random() {
  thread_local absl::BitGen generator;
  return absl::Uniform<uint64_t>(generator);
}

// Where this router answers, known only after it listens.
class OwnAddress {
 public:
  void Set(const std::string& address) {
    absl::MutexLock lock(&mu_);
    address_ = address;
  }
  std::string Get() const {
    absl::MutexLock lock(&mu_);
    return address_;
  }

 private:
  mutable absl::Mutex mu_;
  std::string address_ ABSL_GUARDED_BY(mu_);
};

absl::Status CheckFlags() {
  RWKV_RETURN_IF_ERROR(common::CheckServerFlags(absl::GetFlag(FLAGS_listen), absl::GetFlag(FLAGS_metrics_listen),
                                                absl::GetFlag(FLAGS_drain_timeout)));
  if (absl::GetFlag(FLAGS_name).empty()) return absl::InvalidArgumentError("--name is empty: it holds leases by it");
  if (absl::GetFlag(FLAGS_workers).empty()) return absl::InvalidArgumentError("--workers is required");
  if (absl::GetFlag(FLAGS_state_store).empty()) return absl::InvalidArgumentError("--state_store is required");
  for (const std::string& address : absl::GetFlag(FLAGS_state_store)) {
    RWKV_RETURN_IF_ERROR(common::Annotate(common::ParseHostPort(address).status(), "--state_store"));
  }
  if (absl::GetFlag(FLAGS_max_running) < 1 || absl::GetFlag(FLAGS_max_waiting) < 0) {
    return absl::InvalidArgumentError("--max_running has to be positive, --max_waiting not negative");
  }
  if (absl::GetFlag(FLAGS_max_prompt_tokens) < 1 || absl::GetFlag(FLAGS_max_document_bytes) < 1 ||
      absl::GetFlag(FLAGS_snapshot_interval_tokens) < 1 || absl::GetFlag(FLAGS_max_generated_tokens) < 1) {
    return absl::InvalidArgumentError(
        "--max_prompt_tokens, --max_document_bytes, --max_generated_tokens and --snapshot_interval_tokens have to be "
        "positive");
  }
  if (absl::GetFlag(FLAGS_prefix_min_tokens) < static_cast<int64_t>(kShortestPrefix) ||
      absl::GetFlag(FLAGS_prefix_chunk_tokens) < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("--prefix_min_tokens has to be at least ", kShortestPrefix, ", --prefix_chunk_tokens positive"));
  }
  const std::vector<std::pair<const char*, absl::Duration>> timeouts = {
      {"lease_ttl", absl::GetFlag(FLAGS_lease_ttl)},
      {"store_timeout", absl::GetFlag(FLAGS_store_timeout)},
      {"progress_timeout", absl::GetFlag(FLAGS_progress_timeout)},
      {"outage_timeout", absl::GetFlag(FLAGS_outage_timeout)},
      {"slow_client_timeout", absl::GetFlag(FLAGS_slow_client_timeout)},
      {"max_wait", absl::GetFlag(FLAGS_max_wait)},
      {"slot_quantum", absl::GetFlag(FLAGS_slot_quantum)},
      {"upload_piece_timeout", absl::GetFlag(FLAGS_upload_piece_timeout)},
      {"upload_timeout", absl::GetFlag(FLAGS_upload_timeout)}};
  for (const auto& [flag, timeout] : timeouts) {
    if (timeout > absl::ZeroDuration()) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("--", flag, ": ", absl::FormatDuration(timeout), " is not positive"));
  }
  return absl::OkStatus();
}

absl::Status Run() {
  const std::string name = absl::GetFlag(FLAGS_name);
  common::InitLogging(name);
  RWKV_RETURN_IF_ERROR(CheckFlags());
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<common::Metrics> metrics,
                        common::Metrics::Create(absl::GetFlag(FLAGS_metrics_listen), {{"process", name}}));
  common::Security::Options security_options = common::SecurityOptionsFromFlags(common::Role::kRouter);
  security_options.api_keys = absl::GetFlag(FLAGS_api_keys);
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<common::Security> security,
                        common::Security::Create(security_options, metrics.get()));
  common::Tracer::Options tracer_options = common::TracerOptionsFromFlags("rwkv-router", name);
  tracer_options.sample = absl::GetFlag(FLAGS_trace_sample);
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<common::Tracer> tracer,
                        common::Tracer::Create(tracer_options, metrics.get()));
  RouterMetrics router_metrics(metrics.get());
  common::SystemClock clock;
  std::vector<std::unique_ptr<tokenizer::Tokenizer>> owned_tokenizers;
  std::vector<const tokenizer::Tokenizer*> tokenizers;
  std::vector<std::string> unusable_tokenizers;
  for (const std::string& path : absl::GetFlag(FLAGS_tokenizer)) {
    RWKV_ASSIGN_OR_RETURN(RouterTokenizer opened, OpenRouterTokenizer(path));
    if (opened.tokenizer == nullptr) {
      common::LogWarning("tokenizer_unusable", {{"why", opened.unusable}});
      unusable_tokenizers.push_back(std::move(opened.unusable));
      continue;
    }
    tokenizers.push_back(opened.tokenizer.get());
    owned_tokenizers.push_back(std::move(opened.tokenizer));
  }

  const std::vector<std::string> store_addresses = absl::GetFlag(FLAGS_state_store);
  common::ChannelOptions to_store, to_records, to_workers;
  to_store.credentials = to_records.credentials = security->ForChannelTo(common::Role::kStore);
  to_records.bulk = true;
  to_workers.credentials = security->ForChannelTo(common::Role::kWorker);
  // Exports are bulk: they have a channel of their own.
  const std::unique_ptr<state_store::CatalogClient> catalog =
      state_store::NewCatalogClient(common::MakeChannels(store_addresses, to_store));
  const std::unique_ptr<state_store::RecordsClient> records =
      state_store::NewRecordsClient(common::MakeChannels(store_addresses, to_records));
  RWKV_ASSIGN_OR_RETURN(std::unique_ptr<WorkerSource> workers,
                        FindWorkers(absl::GetFlag(FLAGS_workers), [to_workers](const std::string& address) {
                          return worker::MakeWorkerClient(address, common::MakeChannel(address, to_workers));
                        }));

  std::unique_ptr<common::RpcServer> server;
  TurnManager::Options options;
  options.router = name;
  options.incarnation = absl::StrFormat("%016x", Random());
  options.max_running = absl::GetFlag(FLAGS_max_running);
  options.max_waiting = absl::GetFlag(FLAGS_max_waiting);
  options.max_wait = absl::GetFlag(FLAGS_max_wait);
  options.slot_quantum = absl::GetFlag(FLAGS_slot_quantum);
  options.limits.max_prompt_tokens = absl::GetFlag(FLAGS_max_prompt_tokens);
  options.limits.max_document_bytes = absl::GetFlag(FLAGS_max_document_bytes);
  options.limits.max_generated_tokens = absl::GetFlag(FLAGS_max_generated_tokens);
  options.unusable_tokenizers = std::move(unusable_tokenizers);
  options.allow_logits = absl::GetFlag(FLAGS_allow_logits);
  options.snapshot_interval_tokens = absl::GetFlag(FLAGS_snapshot_interval_tokens);
  options.prefix_cache.enabled = absl::GetFlag(FLAGS_prefix_cache);
  options.prefix_cache.min_tokens = static_cast<uint64_t>(absl::GetFlag(FLAGS_prefix_min_tokens));
  options.prefix_cache.chunk_tokens = static_cast<uint64_t>(absl::GetFlag(FLAGS_prefix_chunk_tokens));
  options.lease_ttl = absl::GetFlag(FLAGS_lease_ttl);
  options.store_timeout = absl::GetFlag(FLAGS_store_timeout);
  options.progress_timeout = absl::GetFlag(FLAGS_progress_timeout);
  options.outage_timeout = absl::GetFlag(FLAGS_outage_timeout);
  options.slow_client_timeout = absl::GetFlag(FLAGS_slow_client_timeout);
  options.on_serving = [&server](bool serving) { server->SetServing(serving); };
  Fleet::Options fleet_options;
  fleet_options.lane.router = options.router;
  fleet_options.lane.incarnation = options.incarnation;
  fleet_options.lane.state_store_address = absl::StrJoin(store_addresses, ",");
  Tenancy::Options tenancy_options;
  if (security->enabled()) {
    tenancy_options.identify = [&security](const grpc::ServerContextBase& context) {
      return security->Identify(context);
    };
  }
  tenancy_options.tenants_file = absl::GetFlag(FLAGS_tenants);
  tenancy_options.source = absl::StrCat(name, ":", options.incarnation);
  // Calls come once it is there.
  TurnManager* turns_of_tenancy = nullptr;
  tenancy_options.others = [&turns_of_tenancy] { return turns_of_tenancy->fleet().OtherRouters(); };
  tenancy_options.max_calls = options.max_running + options.max_waiting;
  tenancy_options.max_store_calls = kMaxQueuedRpcs / 2;
  tenancy_options.random = Random;
  tenancy_options.refused = [&router_metrics](const absl::Status& status) { router_metrics.CountError(status); };
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<Tenancy> tenancy,
                        Tenancy::Create(tenancy_options, catalog.get(), &clock, metrics.get()));
  const auto own_address = std::make_shared<OwnAddress>();
  fleet_options.announce = [own_address, metrics_address = metrics->address(), incarnation = options.incarnation,
                            &tenancy](v1::RouterAnnouncement* router) {
    router->set_pid(getpid());
    router->set_address(own_address->Get());
    router->set_metrics_address(metrics_address);
    router->set_incarnation(incarnation);
    tenancy->Announce(router);
  };
  options.tenant_weight = [&tenancy](const std::string& tenant) { return tenancy->WeightOf(tenant); };
  TurnManager turns(options, fleet_options, std::move(workers), catalog.get(), std::move(tokenizers), &router_metrics,
                    &clock, Random);
  turns_of_tenancy = &turns;

  common::Executor executor(kRpcThreads, kMaxQueuedRpcs);
  common::Executor texts(kTextThreads, kMaxQueuedTexts);
  const UploadLimits uploads = {absl::GetFlag(FLAGS_upload_piece_timeout), absl::GetFlag(FLAGS_upload_timeout)};
  GenerationService generation(&turns, &texts, uploads, tenancy.get(), tracer.get());
  SessionsService sessions(&turns, catalog.get(), records.get(), &executor, Random, uploads, tenancy.get(),
                           tracer.get());
  const auto describe_stores = [channels = common::MakeChannels(store_addresses, to_store)](absl::Time deadline) {
    return state_store::DescribeStores(channels, deadline);
  };
  ClusterService cluster(name, store_addresses, describe_stores, &turns, &executor, tenancy.get());
  common::RpcServer::Options server_options;
  server_options.name = name;
  server_options.listen_address = absl::GetFlag(FLAGS_listen);
  server_options.health_address = common::HealthAddressFromFlags();
  server_options.credentials = security->ForServer();
  server_options.metrics = metrics.get();
  server_options.tracer = tracer.get();
  server_options.begins_traces = true;
  server_options.metrics_address = metrics->address();
  server_options.port_file = absl::GetFlag(FLAGS_port_file);
  server_options.drain_timeout = absl::GetFlag(FLAGS_drain_timeout);
  RWKV_ASSIGN_OR_RETURN(server, common::RpcServer::Start(server_options, {&generation, &sessions, &cluster}));
  cluster.SetAddresses(server->address(), metrics->address());
  own_address->Set(server->address());
  const auto aliases = std::make_shared<const VllmMetrics>(&metrics->registry(), [&turns] {
    const std::shared_ptr<const ServingModel> model = turns.model();
    return model == nullptr ? std::string() : model->info.name();
  });
  if (absl::GetFlag(FLAGS_vllm_metrics)) metrics->Add(aliases);
  turns.Start();  // Health is SERVING while a pipeline is.
  auto watchdog = std::make_unique<common::Watchdog>(
      absl::Seconds(1), [&turns] { return turns.MakesProgress(); }, [&server](bool live) { server->SetLive(live); });
  const absl::Status status = server->ServeUntilSignal([&turns](absl::Time deadline) { turns.Drain(deadline); });
  watchdog = nullptr;
  metrics->Remove(aliases.get());
  turns.Stop();
  server = nullptr;  // Before the services; every call has ended.
  return status;
}

}  // namespace
}  // namespace rwkv::router

int main(int argc, char** argv) {
  return rwkv::common::RunMain(argc, argv, "Serves generation and sessions over a pipeline of workers.",
                               rwkv::router::Run);
}
