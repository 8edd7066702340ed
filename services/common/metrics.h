// The metrics of one process, and the HTTP endpoint /metrics that Prometheus reads them from.
//
// Names follow rwkv_<service>_<what>_<unit>, base units (seconds, bytes), counters end in _total. Labels come from a
// closed set known at compile time; never a session, request or user. Resolve handles once, in a constructor.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "prometheus/collectable.h"
#include "prometheus/counter.h"
#include "prometheus/gauge.h"
#include "prometheus/histogram.h"
#include "prometheus/metric_family.h"
#include "prometheus/registry.h"
#include "services/common/http_server.h"

namespace rwkv::common {

// Thread-safe. Every handle it returns lives as long as it does.
class Metrics {
 public:
  using Labels = std::map<std::string, std::string>;

  // `listen_address`: "HOST:PORT"; port 0 picks a free one, see address(). Empty: no endpoint (tests).
  // `constant_labels` stand on every metric made by the helpers below, for example {{"process", "worker-0"}}.
  // kInvalidArgument: not HOST:PORT. kUnavailable: cannot listen there (in use, not ours); the message names it.
  static absl::StatusOr<std::unique_ptr<Metrics>> Create(absl::string_view listen_address,
                                                         const Labels& constant_labels = {});

  // Asking again for the same name and labels gives the same handle. A name that Prometheus does not allow, or one
  // name as two kinds, is our own bug and ends the process.
  prometheus::Counter& Counter(const std::string& name, const std::string& help, const Labels& labels = {});
  prometheus::Gauge& Gauge(const std::string& name, const std::string& help, const Labels& labels = {});
  // `buckets`: ascending upper bounds; the same for every label set of one name.
  prometheus::Histogram& Histogram(const std::string& name, const std::string& help,
                                   const prometheus::Histogram::BucketBoundaries& buckets, const Labels& labels = {});

  // Families that are made at every scrape; the constant labels are added to them. `source` is asked on the endpoint's
  // thread, and must not block.
  void Add(std::shared_ptr<const prometheus::Collectable> source) ABSL_LOCKS_EXCLUDED(mu_);

  // It is not asked any more when this returns.
  void Remove(const prometheus::Collectable* source) ABSL_LOCKS_EXCLUDED(mu_);

  // Everything, as at a scrape.
  std::vector<prometheus::MetricFamily> Collect() const ABSL_LOCKS_EXCLUDED(mu_);

  prometheus::Registry& registry() { return *registry_; }

  // "HOST:PORT" with the port really taken; empty without an endpoint.
  const std::string& address() const { return address_; }

  // Seconds: 0.5 ms, 1, 2.5, 5, ... up to 60 s.
  static prometheus::Histogram::BucketBoundaries LatencyBuckets();
  // Counts (batch rows, queue lengths): 1, 2, 4, ... up to 4,096.
  static prometheus::Histogram::BucketBoundaries CountBuckets();

 private:
  explicit Metrics(const Labels& constant_labels);

  const Labels constant_labels_;
  const std::shared_ptr<prometheus::Registry> registry_;
  mutable absl::Mutex mu_;
  std::vector<std::shared_ptr<const prometheus::Collectable>> sources_ ABSL_GUARDED_BY(mu_);
  std::unique_ptr<HttpServer> server_;  // Stops before the registry goes.
  std::string address_;
};

}  // namespace rwkv::common
