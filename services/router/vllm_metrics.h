// Our metrics under the names that vLLM's dashboards, autoscalers and endpoint pickers read: a second view of the same
// handles, made at every scrape. Nothing is counted twice.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "prometheus/collectable.h"
#include "prometheus/metric_family.h"
#include "prometheus/registry.h"

namespace rwkv::router {

// Thread-safe. Names with ':' and the labels model_name and engine, as vLLM 0.10 has them; what it calls a cache is our
// slots: used for those that a call holds, and tokens not read again for hits.
class VllmMetrics final : public prometheus::Collectable {
 public:
  // `registry` holds RouterMetrics, and outlives it. `model` names what is served, at every scrape.
  VllmMetrics(const prometheus::Registry* registry, std::function<std::string()> model)
      : registry_(registry), model_(std::move(model)) {}

  std::vector<prometheus::MetricFamily> Collect() const override;

 private:
  const prometheus::Registry* const registry_;
  const std::function<std::string()> model_;
};

}  // namespace rwkv::router
