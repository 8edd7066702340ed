// Life of a serving process: listen, be healthy, wait for a signal, drain.
//
//   RWKV_ASSIGN_OR_RETURN(auto metrics, Metrics::Create(...));
//   RWKV_ASSIGN_OR_RETURN(auto server, RpcServer::Start(options, {&service}));   // health: NOT_SERVING
//   warm up
//   server->SetServing(true);
//   return server->ServeUntilSignal([&](absl::Time deadline) { finish or snapshot what runs });
//
// Every server also speaks grpc.health.v1.Health and reflection. The health of the service "live" is SERVING from the
// start to the last call: who restarts processes asks for that one. The others say whether there is work for it.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "grpcpp/generic/async_generic_service.h"
#include "grpcpp/health_check_service_interface.h"
#include "grpcpp/impl/service_type.h"
#include "grpcpp/security/server_credentials.h"
#include "grpcpp/server.h"
#include "services/common/metrics.h"
#include "services/common/tracing/tracer.h"

namespace rwkv::common {

// Thread-safe. Destroy it before the services it was given.
class RpcServer {
 public:
  struct Options {
    std::string name;                            // Of the process, for logs: "worker-0".
    std::string listen_address = "127.0.0.1:0";  // Port 0: a free one, see address().
    std::string health_address;                  // Health alone, never encrypted; port 0: a free one. Empty: none.
    std::shared_ptr<grpc::ServerCredentials> credentials;  // Null: not encrypted. security/security.h
    // Gets rwkv_server_ready and rwkv_server_draining, rwkv_build_info and grpc_server_handled_total. Outlives it.
    Metrics* metrics = nullptr;
    Tracer* tracer = nullptr;           // Makes a span of every call whose client names a trace. Null: none. Outlives it.
    bool begins_traces = false;         // Also of calls whose client names none.
    std::string metrics_address;        // Only written to the port file: Metrics::address().
    std::string port_file;              // Empty: none. Any old file there is removed first.
    bool bulk = false;                  // As ChannelOptions has it.
    int max_receive_bytes = 4 << 20;    // A larger message is RESOURCE_EXHAUSTED, a compressed one never read.
    int max_concurrent_streams = 1024;  // Per connection; more wait in the client.
    int max_threads = 1024;             // Of the synchronous API (one a call); more is RESOURCE_EXHAUSTED.
    absl::Duration drain_timeout = absl::Seconds(10);  // From the signal to the last call being cut off.
  };

  // Listens, answers calls, reports NOT_SERVING, and writes the port file (atomically): lines "grpc=HOST:PORT",
  // "metrics=HOST:PORT", "pid=N", and "health=HOST:PORT" if there is such a listener. `services` are borrowed.
  // kInvalidArgument: an address is not HOST:PORT. kUnavailable: cannot listen there (in use, not ours); names it.
  // Other codes: the port file cannot be written.
  static absl::StatusOr<std::unique_ptr<RpcServer>> Start(const Options& options,
                                                          const std::vector<grpc::Service*>& services);

  // Shutdown(now) if that has not happened.
  ~RpcServer();

  // "HOST:PORT" with the port really taken.
  const std::string& address() const { return address_; }

  // That of health alone; empty without.
  const std::string& health_address() const { return health_address_; }

  // Health of "" and of every service by its full name. Once a drain has begun it stays NOT_SERVING.
  void SetServing(bool serving) ABSL_LOCKS_EXCLUDED(mu_);

  // Health of the name kLive, SERVING from the start to the end: whether the process makes progress. Who asks this to
  // decide about a restart does not restart one that only waits for others.
  static constexpr char kLive[] = "live";
  void SetLive(bool live);

  // Waits for SIGTERM or SIGINT, then drains: NOT_SERVING, `on_drain(deadline)`, Shutdown(deadline), where the deadline
  // is drain_timeout from then. A second signal during the drain is ignored; the drain is bounded. An error: the process
  // cannot wait for signals.
  // The signals must have been blocked before any thread started: RunMain() does that.
  absl::Status ServeUntilSignal(const std::function<void(absl::Time deadline)>& on_drain = nullptr)
      ABSL_LOCKS_EXCLUDED(mu_);

  // Stops listening, lets running calls end until `deadline`, cancels the rest and waits for their handlers. Callable
  // from any thread but a handler's; a second call waits for the first.
  void Shutdown(absl::Time deadline) ABSL_LOCKS_EXCLUDED(mu_, shutdown_mu_);

 private:
  explicit RpcServer(const Options& options);

  // NOT_SERVING for good.
  void BeginDrain() ABSL_LOCKS_EXCLUDED(mu_);
  void SetHealth(bool serving) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status StartHealth();
  std::vector<grpc::HealthCheckServiceInterface*> Healths() const;

  const Options options_;
  std::string address_;
  std::string health_address_;
  std::vector<std::string> service_names_;
  std::unique_ptr<grpc::Server> server_;
  grpc::CallbackGenericService nothing_;         // Answers UNIMPLEMENTED: a server without any service does not start.
  std::unique_ptr<grpc::Server> health_server_;  // Null: none.
  prometheus::Gauge* ready_ = nullptr;           // Null: no metrics. As the next.
  prometheus::Gauge* draining_gauge_ = nullptr;
  absl::Mutex shutdown_mu_;  // Held during Shutdown(), so that a second call waits.
  absl::Mutex mu_;
  bool draining_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace rwkv::common
