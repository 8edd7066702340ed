#include "services/router/vllm_metrics.h"

#include <cstdint>
#include <limits>
#include <map>
#include <utility>

namespace rwkv::router {
namespace {

using prometheus::ClientMetric;
using prometheus::MetricFamily;
using prometheus::MetricType;

class View {
 public:
  View(std::vector<MetricFamily> families, std::string model) : model_(std::move(model)) {
    for (MetricFamily& family : families) families_.emplace(family.name, std::move(family));
  }

  // The sum of a counter or gauge over the label sets that have `label`=`value`; all of them if `label` is empty.
  double Value(const std::string& name, const std::string& label = "", const std::string& value = "") const {
    double sum = 0;
    const auto found = families_.find(name);
    if (found == families_.end()) return 0;
    for (const ClientMetric& metric : found->second.metric) {
      if (label.empty() || Has(metric, label, value)) sum += metric.counter.value + metric.gauge.value;
    }
    return sum;
  }

  void Add(const std::string& name, MetricType type, double value,
           const std::vector<ClientMetric::Label>& labels = {}) {
    ClientMetric metric = Labelled(labels);
    (type == MetricType::Counter ? metric.counter.value : metric.gauge.value) = value;
    if (out_.empty() || out_.back().name != name) out_.push_back({name, "As vLLM's metric of that name.", type, {}});
    out_.back().metric.push_back(std::move(metric));
  }

  void AddHistogram(const std::string& name, const std::string& ours) {
    const auto found = families_.find(ours);
    if (found == families_.end() || found->second.metric.empty()) return;
    ClientMetric metric = Labelled({});
    metric.histogram = found->second.metric.front().histogram;
    out_.push_back({name, "As vLLM's metric of that name.", MetricType::Histogram, {std::move(metric)}});
  }

  // A histogram of as many ones as `ours` has values.
  void AddOnes(const std::string& name, const std::string& ours) {
    const auto found = families_.find(ours);
    if (found == families_.end() || found->second.metric.empty()) return;
    ClientMetric metric = Labelled({});
    const uint64_t count = found->second.metric.front().histogram.sample_count;
    metric.histogram.sample_count = count;
    metric.histogram.sample_sum = static_cast<double>(count);
    ClientMetric::Bucket ones, all;
    ones.upper_bound = 1;
    all.upper_bound = std::numeric_limits<double>::infinity();
    ones.cumulative_count = all.cumulative_count = count;
    metric.histogram.bucket = {ones, all};
    out_.push_back({name, "As vLLM's metric of that name.", MetricType::Histogram, {std::move(metric)}});
  }

  std::vector<MetricFamily> Take() { return std::move(out_); }

 private:
  static bool Has(const ClientMetric& metric, const std::string& label, const std::string& value) {
    for (const ClientMetric::Label& have : metric.label) {
      if (have.name == label) return have.value == value;
    }
    return false;
  }
  ClientMetric Labelled(const std::vector<ClientMetric::Label>& labels) const {
    ClientMetric metric;
    metric.label = {{"model_name", model_}, {"engine", "0"}};
    metric.label.insert(metric.label.end(), labels.begin(), labels.end());
    return metric;
  }

  const std::string model_;
  std::map<std::string, MetricFamily> families_;
  std::vector<MetricFamily> out_;
};

}  // namespace

std::vector<MetricFamily> VllmMetrics::Collect() const {
  View view(registry_->Collect(), model_());
  const auto tokens = [&view](const char* kind) { return view.Value("rwkv_router_tokens_total", "kind", kind); };
  const auto slots = [&view](const char* state) { return view.Value("rwkv_router_slots", "state", state); };
  const auto finished = [&view](const char* reason) {
    return view.Value("rwkv_router_turns_finished_total", "reason", reason);
  };
  constexpr MetricType kGauge = MetricType::Gauge, kCounter = MetricType::Counter;
  view.Add("vllm:num_requests_running", kGauge, view.Value("rwkv_router_running_turns"));
  view.Add("vllm:num_requests_waiting", kGauge, view.Value("rwkv_router_waiting_turns"));
  // A warm slot is there for whoever needs it.
  const double all = slots("used") + slots("warm") + slots("free");
  view.Add("vllm:kv_cache_usage_perc", kGauge, all > 0 ? slots("used") / all : 0);
  view.Add("vllm:prompt_tokens_total", kCounter, tokens("prompt") + tokens("reused"));
  view.Add("vllm:generation_tokens_total", kCounter, tokens("generated"));
  view.Add("vllm:prefix_cache_queries_total", kCounter, tokens("prompt") + tokens("reused"));
  view.Add("vllm:prefix_cache_hits_total", kCounter, tokens("reused"));
  view.Add("vllm:num_preemptions_total", kCounter, view.Value("rwkv_router_yielded_turns_total"));
  const char* const kSuccess = "vllm:request_success_total";
  view.Add(kSuccess, kCounter, finished("stop_token") + finished("stop_string"), {{"finished_reason", "stop"}});
  view.Add(kSuccess, kCounter, finished("length"), {{"finished_reason", "length"}});
  view.Add(kSuccess, kCounter, finished("cancelled"), {{"finished_reason", "abort"}});
  view.Add(kSuccess, kCounter, finished("error"), {{"finished_reason", "error"}});
  view.AddHistogram("vllm:time_to_first_token_seconds", "rwkv_router_ttft_seconds");
  view.AddHistogram("vllm:inter_token_latency_seconds", "rwkv_router_inter_token_seconds");
  view.AddHistogram("vllm:request_queue_time_seconds", "rwkv_router_queue_seconds");
  view.AddHistogram("vllm:e2e_request_latency_seconds", "rwkv_router_call_seconds");
  view.AddHistogram("vllm:request_prefill_time_seconds", "rwkv_router_prefill_seconds");
  view.AddHistogram("vllm:request_decode_time_seconds", "rwkv_router_decode_seconds");
  view.AddHistogram("vllm:request_prompt_tokens", "rwkv_router_call_prompt_tokens");
  view.AddHistogram("vllm:request_generation_tokens", "rwkv_router_call_generated_tokens");
  view.AddHistogram("vllm:request_max_num_generation_tokens",
                    "rwkv_router_call_generated_tokens");  // One answer a call.
  view.AddHistogram("vllm:request_params_max_tokens", "rwkv_router_call_max_tokens");
  view.AddHistogram("vllm:request_time_per_output_token_seconds", "rwkv_router_call_token_seconds");
  view.AddHistogram("vllm:request_inference_time_seconds", "rwkv_router_call_inference_seconds");
  view.AddOnes("vllm:request_params_n", "rwkv_router_call_prompt_tokens");
  view.AddHistogram("vllm:iteration_tokens_total", "rwkv_router_batch_rows");
  return view.Take();
}

}  // namespace rwkv::router
