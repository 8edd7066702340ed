#include "services/common/rpc_server.h"

#include <errno.h>
#include <signal.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "grpcpp/ext/proto_server_reflection_plugin.h"
#include "grpcpp/health_check_service_interface.h"
#include "grpcpp/impl/server_builder_option.h"
#include "grpcpp/impl/server_builder_plugin.h"
#include "grpcpp/impl/server_initializer.h"
#include "grpcpp/resource_quota.h"
#include "grpcpp/security/server_credentials.h"
#include "grpcpp/server_builder.h"
#include "kernels/base/status_macros.h"
#include "services/common/address.h"
#include "services/common/call_metrics.h"
#include "services/common/logging.h"
#include "services/common/metrics.h"
#include "services/common/version.h"

namespace rwkv::common {
namespace {

// Learns the full names of the services of a server: grpc::Service does not tell its own.
class ServiceNames : public grpc::ServerBuilderOption {
 public:
  explicit ServiceNames(std::vector<std::string>* names) : names_(names) {}
  void UpdateArguments(grpc::ChannelArguments* /*arguments*/) override {}
  void UpdatePlugins(std::vector<std::unique_ptr<grpc::ServerBuilderPlugin>>* plugins) override {
    plugins->push_back(std::make_unique<Plugin>(names_));
  }

 private:
  class Plugin : public grpc::ServerBuilderPlugin {
   public:
    explicit Plugin(std::vector<std::string>* names) : names_(names) {}
    std::string name() override { return "rwkv_service_names"; }
    void InitServer(grpc::ServerInitializer* /*initializer*/) override {}
    void Finish(grpc::ServerInitializer* initializer) override { *names_ = *initializer->GetServiceList(); }
    void ChangeArguments(const std::string& /*name*/, void* /*value*/) override {}

   private:
    std::vector<std::string>* const names_;
  };

  std::vector<std::string>* const names_;
};

constexpr int kMaxHealthRequestBytes = 4096;
constexpr int kMaxHealthStreams = 64;

// Of the health listener: reflection, once it is there at all, comes with every server.
class WithoutReflection : public grpc::ServerBuilderOption {
 public:
  void UpdateArguments(grpc::ChannelArguments* /*arguments*/) override {}
  void UpdatePlugins(std::vector<std::unique_ptr<grpc::ServerBuilderPlugin>>* plugins) override { plugins->clear(); }
};

absl::Status WritePortFile(const std::string& path, const std::string& content) {
  const std::string temporary = absl::StrCat(path, ".", getpid(), ".tmp");
  const auto failed = [&](absl::string_view what) {
    const int error = errno;
    std::remove(temporary.c_str());
    return absl::ErrnoToStatus(error, absl::StrCat("port file ", path, ": cannot ", what));
  };
  std::FILE* file = std::fopen(temporary.c_str(), "we");
  if (file == nullptr) return failed("create");
  const bool written = std::fwrite(content.data(), 1, content.size(), file) == content.size();
  if (std::fclose(file) != 0 || !written) return failed("write");
  if (std::rename(temporary.c_str(), path.c_str()) != 0) return failed("rename");
  return absl::OkStatus();
}

}  // namespace

RpcServer::RpcServer(const Options& options) : options_(options) {
  if (options.metrics == nullptr) return;
  ready_ = &options.metrics->Gauge("rwkv_server_ready", "1: takes work, as the health of the process says.");
  draining_gauge_ = &options.metrics->Gauge("rwkv_server_draining", "1: has been told to end.");
  options.metrics
      ->Gauge("rwkv_build_info", "1; what is running is in the labels.",
              {{"version", kVersion}, {"compiler", __VERSION__}})
      .Set(1);
}

absl::StatusOr<std::unique_ptr<RpcServer>> RpcServer::Start(const Options& options,
                                                            const std::vector<grpc::Service*>& services) {
  RWKV_ASSIGN_OR_RETURN(HostPort address, ParseHostPort(options.listen_address));
  if (!options.port_file.empty() && std::remove(options.port_file.c_str()) != 0 && errno != ENOENT) {
    return absl::ErrnoToStatus(errno, absl::StrCat("port file ", options.port_file, ": cannot remove the old one"));
  }
  std::unique_ptr<RpcServer> server(new RpcServer(options));

  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort(FormatHostPort(address),
                           options.credentials != nullptr ? options.credentials : grpc::InsecureServerCredentials(),
                           &port);
  builder.SetMaxReceiveMessageSize(options.max_receive_bytes);
  // A compressed message would be unpacked before its size is looked at, and some 400 KB may become 400 MB. Nobody here
  // compresses: a call that does is UNIMPLEMENTED, and nothing unpacks it.
  for (const grpc_compression_algorithm algorithm : {GRPC_COMPRESS_DEFLATE, GRPC_COMPRESS_GZIP}) {
    builder.SetCompressionAlgorithmSupportStatus(algorithm, false);
  }
  builder.AddChannelArgument(GRPC_ARG_ENABLE_PER_MESSAGE_DECOMPRESSION, 0);
  // Two servers on one port would share its connections by chance; the second one must fail instead.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, options.max_concurrent_streams);
  if (options.bulk) {
    builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_FRAME_SIZE, 1 << 20);
    builder.AddChannelArgument(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, 8 << 20);
    builder.AddChannelArgument(GRPC_ARG_HTTP2_WRITE_BUFFER_SIZE, 1 << 20);
    builder.AddChannelArgument(GRPC_ARG_TCP_READ_CHUNK_SIZE, 256 << 10);
    builder.AddChannelArgument(GRPC_ARG_TCP_MIN_READ_CHUNK_SIZE, 256 << 10);
    builder.AddChannelArgument(GRPC_ARG_TCP_MAX_READ_CHUNK_SIZE, 256 << 10);
    // Threads that wait for calls of the synchronous API. By default two; those beyond end when their call does, and the
    // next call of several at a time waits for a thread to be made.
    builder.SetSyncServerOption(grpc::ServerBuilder::SyncServerOption::MAX_POLLERS, 8);
  }
  // Notices a client whose machine is gone, and accepts the pings of MakeChannel() (by default a server hangs up on
  // clients that ping more than every five minutes).
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 20000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 10000);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 1000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  grpc::ResourceQuota quota("rwkv");
  quota.SetMaxThreads(options.max_threads);
  builder.SetResourceQuota(quota);
  builder.SetOption(std::make_unique<ServiceNames>(&server->service_names_));
  for (grpc::Service* service : services) builder.RegisterService(service);
  std::vector<std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface>> interceptors;
  if (options.metrics != nullptr) interceptors.push_back(std::make_unique<CallMetrics>(options.metrics));
  if (options.tracer != nullptr) interceptors.push_back(options.tracer->Interceptor(options.begins_traces));
  if (!interceptors.empty()) builder.experimental().SetInterceptorCreators(std::move(interceptors));
  server->server_ = builder.BuildAndStart();
  if (server->server_ == nullptr || port == 0) {
    return absl::UnavailableError(
        absl::StrCat("cannot listen on ", options.listen_address, " (in use, or no address of this machine)"));
  }
  if (!options.health_address.empty()) RWKV_RETURN_IF_ERROR(server->StartHealth());
  server->SetServing(false);
  server->SetLive(true);
  address.port = static_cast<uint16_t>(port);
  server->address_ = FormatHostPort(address);
  if (!options.port_file.empty()) {
    std::string ports =
        absl::StrCat("grpc=", server->address_, "\nmetrics=", options.metrics_address, "\npid=", getpid(), "\n");
    if (!server->health_address_.empty()) absl::StrAppend(&ports, "health=", server->health_address_, "\n");
    RWKV_RETURN_IF_ERROR(WritePortFile(options.port_file, ports));
  }
  LogInfo("listening", {{"address", server->address_},
                        {"tls", options.credentials != nullptr},
                        {"health", server->health_address_},
                        {"metrics", options.metrics_address}});
  return server;
}

absl::Status RpcServer::StartHealth() {
  RWKV_ASSIGN_OR_RETURN(HostPort address, ParseHostPort(options_.health_address));
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort(FormatHostPort(address), grpc::InsecureServerCredentials(), &port);
  builder.SetMaxReceiveMessageSize(kMaxHealthRequestBytes);
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, kMaxHealthStreams);
  builder.SetOption(std::make_unique<WithoutReflection>());
  builder.RegisterCallbackGenericService(&nothing_);
  health_server_ = builder.BuildAndStart();
  if (health_server_ == nullptr || port == 0) {
    return absl::UnavailableError(
        absl::StrCat("cannot listen on ", options_.health_address, " (in use, or no address of this machine)"));
  }
  address.port = static_cast<uint16_t>(port);
  health_address_ = FormatHostPort(address);
  return absl::OkStatus();
}

RpcServer::~RpcServer() {
  if (server_ != nullptr) Shutdown(absl::Now());
}

void RpcServer::SetServing(bool serving) {
  absl::MutexLock lock(&mu_);
  if (!draining_) SetHealth(serving);
}

void RpcServer::SetLive(bool live) {
  for (grpc::HealthCheckServiceInterface* const health : Healths()) health->SetServingStatus(kLive, live);
}

void RpcServer::BeginDrain() {
  absl::MutexLock lock(&mu_);
  draining_ = true;
  if (draining_gauge_ != nullptr) draining_gauge_->Set(1);
  SetHealth(false);
}

std::vector<grpc::HealthCheckServiceInterface*> RpcServer::Healths() const {
  std::vector<grpc::HealthCheckServiceInterface*> healths = {server_->GetHealthCheckService()};
  if (health_server_ != nullptr) healths.push_back(health_server_->GetHealthCheckService());
  return healths;
}

void RpcServer::SetHealth(bool serving) {
  if (ready_ != nullptr) ready_->Set(serving ? 1 : 0);
  for (grpc::HealthCheckServiceInterface* const health : Healths()) {
    health->SetServingStatus("", serving);
    for (const std::string& name : service_names_) health->SetServingStatus(name, serving);
  }
}

absl::Status RpcServer::ServeUntilSignal(const std::function<void(absl::Time deadline)>& on_drain) {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  const int signal_fd = signalfd(-1, &signals, SFD_CLOEXEC);
  if (signal_fd < 0) return absl::ErrnoToStatus(errno, "signalfd");
  signalfd_siginfo info;
  while (read(signal_fd, &info, sizeof(info)) != sizeof(info)) {
    if (errno == EINTR) continue;
    const absl::Status status = absl::ErrnoToStatus(errno, "signalfd: read");
    close(signal_fd);
    return status;
  }
  close(signal_fd);

  const absl::Time start = absl::Now();
  const absl::Time deadline = start + options_.drain_timeout;
  LogInfo("draining", {{"cause", absl::StrCat("SIG", sigabbrev_np(static_cast<int>(info.ssi_signo)))}});
  BeginDrain();
  if (on_drain) on_drain(deadline);
  Shutdown(deadline);
  LogInfo("stopped", {{"drain_seconds", absl::ToDoubleSeconds(absl::Now() - start)}});
  return absl::OkStatus();
}

void RpcServer::Shutdown(absl::Time deadline) {
  BeginDrain();
  absl::MutexLock lock(&shutdown_mu_);
  server_->Shutdown(absl::ToChronoTime(deadline));
  server_->Wait();
  // Last, so that a probe finds the process alive as long as it drains.
  if (health_server_ != nullptr) {
    health_server_->Shutdown(absl::ToChronoTime(absl::Now()));
    health_server_->Wait();
  }
}

}  // namespace rwkv::common
