// A collector of traces inside a test: keeps what it is sent.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "grpcpp/server.h"
#include "opentelemetry/trace_service.grpc.pb.h"
#include "opentelemetry/trace_service.pb.h"

namespace rwkv::testing {

// Thread-safe.
class SpanCollector final : public opentelemetry::proto::collector::trace::v1::TraceService::Service {
 public:
  struct Received {
    std::string process;  // service.instance.id
    std::string service;  // service.name
    opentelemetry::proto::collector::trace::v1::Span span;

    // Of an attribute, as text; empty: there is none.
    std::string Attribute(const std::string& key) const;
  };

  SpanCollector();
  ~SpanCollector() override;

  const std::string& address() const { return address_; }  // "127.0.0.1:PORT"

  // Calls wait, unanswered, until it is switched off again.
  void Hang(bool hang) ABSL_LOCKS_EXCLUDED(mu_);
  // That have begun.
  int calls() const ABSL_LOCKS_EXCLUDED(mu_);

  std::vector<Received> spans() const ABSL_LOCKS_EXCLUDED(mu_);
  // Waits until `enough` says yes of all spans so far. False: it does not until `deadline`.
  bool WaitUntil(const std::function<bool(const std::vector<Received>&)>& enough, absl::Time deadline) const
      ABSL_LOCKS_EXCLUDED(mu_);

 private:
  grpc::Status Export(grpc::ServerContext* context,
                      const opentelemetry::proto::collector::trace::v1::ExportTraceServiceRequest* request,
                      opentelemetry::proto::collector::trace::v1::ExportTraceServiceResponse* response) override
      ABSL_LOCKS_EXCLUDED(mu_);

  mutable absl::Mutex mu_;
  bool hangs_ ABSL_GUARDED_BY(mu_) = false;
  int calls_ ABSL_GUARDED_BY(mu_) = 0;
  std::vector<Received> spans_ ABSL_GUARDED_BY(mu_);
  std::string address_;
  std::unique_ptr<grpc::Server> server_;
};

}  // namespace rwkv::testing
