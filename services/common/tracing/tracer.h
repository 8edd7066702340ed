// Spans, and the thread that sends them to a collector (OTLP over gRPC).
//
//   RWKV_ASSIGN_OR_RETURN(std::unique_ptr<Tracer> tracer, Tracer::Create(options, metrics));   // null: tracing is off
//   std::unique_ptr<Span> span = tracer->Begin("prefill", Span::kInternal, parent);            // null: not sampled
//   span->Set("rwkv.tokens", int64_t{5});
//   span = nullptr;                                                                             // or End()
//
// Whoever records never waits: spans go to a queue with a bound, and what does not fit, or what the collector does not
// take, is dropped and counted. Without a Tracer there is no thread, no queue and no interceptor.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "grpcpp/client_context.h"
#include "grpcpp/server_context.h"
#include "grpcpp/support/server_interceptor.h"
#include "opentelemetry/trace_service.grpc.pb.h"
#include "opentelemetry/trace_service.pb.h"
#include "services/common/metrics.h"
#include "services/common/tracing/trace_context.h"

namespace rwkv::common {

class Tracer;

// Something that takes its time, in one process. Thread-safe. Its tracer outlives it.
class Span {
 public:
  using Proto = opentelemetry::proto::collector::trace::v1::Span;
  static constexpr Proto::SpanKind kInternal = Proto::SPAN_KIND_INTERNAL;
  static constexpr Proto::SpanKind kServer = Proto::SPAN_KIND_SERVER;

  ~Span() { End(); }

  // What children name as their parent; sampled.
  const TraceContext& context() const { return context_; }

  // After End() nothing changes.
  void Set(absl::string_view key, absl::string_view value) ABSL_LOCKS_EXCLUDED(mu_);
  void Set(absl::string_view key, int64_t value) ABSL_LOCKS_EXCLUDED(mu_);
  void Set(absl::string_view key, double value) ABSL_LOCKS_EXCLUDED(mu_);
  void SetError(absl::string_view message) ABSL_LOCKS_EXCLUDED(mu_);

  // Once; at `time`, by default now.
  void End(absl::Time time = absl::InfinitePast()) ABSL_LOCKS_EXCLUDED(mu_);

 private:
  friend class Tracer;
  Span(Tracer* tracer, TraceContext context, Proto proto);
  opentelemetry::proto::collector::trace::v1::AnyValue* Add(absl::string_view key)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const TraceContext context_;
  absl::Mutex mu_;
  Tracer* tracer_ ABSL_GUARDED_BY(mu_);  // Null once it has ended.
  Proto proto_ ABSL_GUARDED_BY(mu_);
};

// Thread-safe.
class Tracer {
 public:
  struct Options {
    std::string endpoint;  // "HOST:PORT" or "http://HOST:PORT": plain; "https://HOST:PORT". Empty: tracing is off.
    double sample = 1;     // Share of the traces that begin here; others are as their beginning says.
    std::string service;   // "rwkv-router"
    std::string process;   // "router-0"
    size_t max_queued = 4096;
    size_t max_batch = 256;
    absl::Duration interval = absl::Seconds(1);  // What is there is sent this often, or when a batch is full.
    absl::Duration export_timeout = absl::Seconds(5);
    int max_tries = 3;                                 // Of a batch.
    absl::Duration flush_timeout = absl::Seconds(2);  // At the end, for what is left.
  };

  // Null: off. kInvalidArgument: the endpoint, or a share that is not in [0, 1]. A collector that is not there is no
  // error. `metrics` outlives it.
  static absl::StatusOr<std::unique_ptr<Tracer>> Create(const Options& options, Metrics* metrics);
  // Sends what is left, for flush_timeout at most.
  ~Tracer();
  Tracer(const Tracer&) = delete;
  Tracer& operator=(const Tracer&) = delete;

  // Null: not sampled. A `parent` that is not valid: it begins a trace.
  std::unique_ptr<Span> Begin(absl::string_view name, Span::Proto::SpanKind kind, const TraceContext& parent);

  // The span of a call that a server with Interceptor() handles; null: it has none. For as long as the call runs.
  std::shared_ptr<Span> SpanOf(const grpc::ServerContextBase* context) ABSL_LOCKS_EXCLUDED(calls_mu_);

  // Gives every call of a server a span. `roots`: also those whose client names none begin a trace. The tracer outlives
  // the server.
  std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface> Interceptor(bool roots);

 private:
  friend class Span;
  class Calls;
  class Call;

  Tracer(const Options& options, Metrics* metrics);
  void Record(Span::Proto&& span) ABSL_LOCKS_EXCLUDED(mu_);
  void Loop() ABSL_LOCKS_EXCLUDED(mu_);
  // False: try again.
  bool Send(const opentelemetry::proto::collector::trace::v1::ExportTraceServiceRequest& request, size_t spans)
      ABSL_LOCKS_EXCLUDED(mu_);
  bool Due() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return stopping_ || queue_.size() >= options_.max_batch; }
  bool Ended() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return ended_; }
  bool Stopping() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return stopping_; }

  const Options options_;
  prometheus::Counter& exported_;
  prometheus::Counter& dropped_;
  std::unique_ptr<opentelemetry::proto::collector::trace::v1::TraceService::Stub> stub_;

  absl::Mutex calls_mu_;
  absl::flat_hash_map<const grpc::ServerContextBase*, std::shared_ptr<Span>> calls_ ABSL_GUARDED_BY(calls_mu_);

  absl::Mutex mu_;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  bool ended_ ABSL_GUARDED_BY(mu_) = false;                            // The thread has nothing left to do.
  absl::Time stop_at_ ABSL_GUARDED_BY(mu_) = absl::InfiniteFuture();
  grpc::ClientContext* sending_ ABSL_GUARDED_BY(mu_) = nullptr;  // The call that is on its way.
  std::vector<Span::Proto> queue_ ABSL_GUARDED_BY(mu_);
  std::thread thread_;
};

// What calls that a handler makes are part of, also behind its return; not valid: its call is not traced, or `tracer` is
// null.
TraceContext TraceOf(Tracer* tracer, const grpc::ServerContextBase& context);

}  // namespace rwkv::common
