#include "services/common/metrics.h"

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <utility>

#include "kernels/base/status_macros.h"
#include "prometheus/text_serializer.h"
#include "services/common/logging.h"
#include "services/common/process_metrics.h"

namespace rwkv::common {
namespace {

// prometheus-cpp answers misuse (a bad name, one name as two kinds) with exceptions; that is a bug of the caller.
template <typename Make>
auto& MakeOrDie(const std::string& name, Make make) {
  try {
    return make();
  } catch (const std::exception& e) {
    LogError("metric_misused", {{"metric", name}, {"error", e.what()}});
    std::abort();
  }
}

}  // namespace

Metrics::Metrics(const Labels& constant_labels)
    : constant_labels_(constant_labels), registry_(std::make_shared<prometheus::Registry>()) {}

absl::StatusOr<std::unique_ptr<Metrics>> Metrics::Create(absl::string_view listen_address,
                                                         const Labels& constant_labels) {
  std::unique_ptr<Metrics> metrics(new Metrics(constant_labels));
  metrics->Add(std::make_shared<ProcessMetrics>());
  if (listen_address.empty()) return metrics;
  RWKV_ASSIGN_OR_RETURN(metrics->server_,
                        HttpServer::Start(listen_address, [all = metrics.get()](absl::string_view path) {
                          std::unique_ptr<HttpServer::Page> page;
                          if (path != "/metrics") return page;
                          page = std::make_unique<HttpServer::Page>();
                          page->content_type = "text/plain; version=0.0.4; charset=utf-8";
                          page->body = prometheus::TextSerializer().Serialize(all->Collect());
                          return page;
                        }));
  metrics->address_ = metrics->server_->address();
  return metrics;
}

void Metrics::Add(std::shared_ptr<const prometheus::Collectable> source) {
  absl::MutexLock lock(&mu_);
  sources_.push_back(std::move(source));
}

void Metrics::Remove(const prometheus::Collectable* source) {
  absl::MutexLock lock(&mu_);
  sources_.erase(
      std::remove_if(sources_.begin(), sources_.end(), [source](const auto& other) { return other.get() == source; }),
      sources_.end());
}

std::vector<prometheus::MetricFamily> Metrics::Collect() const {
  std::vector<prometheus::MetricFamily> families = registry_->Collect();
  absl::MutexLock lock(&mu_);
  for (const auto& source : sources_) {
    for (prometheus::MetricFamily& family : source->Collect()) {
      for (prometheus::ClientMetric& metric : family.metric) {
        for (const auto& [name, value] : constant_labels_) metric.label.push_back({name, value});
      }
      families.push_back(std::move(family));
    }
  }
  return families;
}

prometheus::Counter& Metrics::Counter(const std::string& name, const std::string& help, const Labels& labels) {
  return MakeOrDie(name, [&]() -> prometheus::Counter& {
    return prometheus::BuildCounter().Name(name).Help(help).Labels(constant_labels_).Register(*registry_).Add(labels);
  });
}

prometheus::Gauge& Metrics::Gauge(const std::string& name, const std::string& help, const Labels& labels) {
  return MakeOrDie(name, [&]() -> prometheus::Gauge& {
    return prometheus::BuildGauge().Name(name).Help(help).Labels(constant_labels_).Register(*registry_).Add(labels);
  });
}

prometheus::Histogram& Metrics::Histogram(const std::string& name, const std::string& help,
                                          const prometheus::Histogram::BucketBoundaries& buckets,
                                          const Labels& labels) {
  return MakeOrDie(name, [&]() -> prometheus::Histogram& {
    return prometheus::BuildHistogram()
        .Name(name)
        .Help(help)
        .Labels(constant_labels_)
        .Register(*registry_)
        .Add(labels, buckets);
  });
}

prometheus::Histogram::BucketBoundaries Metrics::LatencyBuckets() {
  return {0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60};
}

prometheus::Histogram::BucketBoundaries Metrics::CountBuckets() {
  return {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096};
}

}  // namespace rwkv::common
