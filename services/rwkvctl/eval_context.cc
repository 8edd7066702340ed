#include "services/rwkvctl/eval_context.h"

#include <algorithm>
#include <cmath>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/string_view.h"
#include "services/rwkvctl/eval_tokens.h"
#include "services/rwkvctl/table.h"

namespace rwkv::rwkvctl {
namespace {

constexpr uint64_t kFirstBucketEnd = 64;

// Windows of `options.tokens`, each after id 0.
absl::StatusOr<std::vector<TokenIds>> CutIntoWindows(const EvalModel& model, absl::string_view text,
                                                     const ContextOptions& options) {
  absl::StatusOr<TokenIds> tokens = EncodeDocument(model, text);
  if (!tokens.ok()) return tokens.status();
  std::vector<TokenIds> windows;
  for (size_t first = 0; first + options.tokens <= tokens->size() && windows.size() < options.windows;
       first += options.tokens) {
    TokenIds& window = windows.emplace_back(1, 0);
    window.insert(window.end(), tokens->begin() + first, tokens->begin() + first + options.tokens);
  }
  if (windows.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("the text has ", tokens->size(), " tokens, a window needs ", options.tokens));
  }
  return windows;
}

struct Mean {
  double value = 0;
  double standard_error = 0;  // 0 of one value.
};

Mean MeanOf(const std::vector<double>& values) {
  const auto count = static_cast<double>(values.size());
  Mean mean;
  for (const double value : values) mean.value += value / count;
  if (values.size() == 1) return mean;
  double squares = 0;
  for (const double value : values) squares += (value - mean.value) * (value - mean.value);
  mean.standard_error = std::sqrt(squares / (count - 1) / count);
  return mean;
}

// `means` [bucket][window]
void FindRise(const std::vector<std::vector<double>>& means, ContextResult* result) {
  for (size_t to = 1; to < means.size(); ++to) {
    for (size_t from = 0; from < to; ++from) {
      std::vector<double> differences = means[to];
      for (size_t w = 0; w < differences.size(); ++w) differences[w] -= means[from][w];
      const Mean rise = MeanOf(differences);
      if (rise.value <= result->rise_nats) continue;
      result->rise_nats = rise.value;
      result->rise_standard_error = rise.standard_error;
    }
  }
}

}  // namespace

absl::StatusOr<ContextResult> EvaluateContext(const EvalModel& model, const std::string& text,
                                              const ContextOptions& options, ProgressBar& progress) {
  absl::StatusOr<std::vector<TokenIds>> windows = CutIntoWindows(model, text, options);
  if (!windows.ok()) return windows.status();
  ContextResult result;
  result.tokens = options.tokens;
  for (uint64_t begin = 0, end = kFirstBucketEnd; begin < options.tokens; begin = end, end *= 2) {
    ContextBucket& bucket = result.buckets.emplace_back();
    bucket.begin = begin;
    bucket.end = std::min<uint64_t>(end, options.tokens);
  }
  std::vector<std::vector<double>> means(result.buckets.size());  // By bucket, then window.
  for (const TokenIds& window : *windows) {
    absl::StatusOr<std::vector<float>> logprobs = ScoreDocument(model, window);
    if (!logprobs.ok()) return logprobs.status();
    for (size_t b = 0; b < result.buckets.size(); ++b) {
      const ContextBucket& bucket = result.buckets[b];
      double nats = 0;
      for (uint64_t i = bucket.begin; i < bucket.end; ++i) nats -= (*logprobs)[i];
      means[b].push_back(nats / static_cast<double>(bucket.end - bucket.begin));
    }
    progress.Update(++result.windows, windows->size());
  }
  for (size_t b = 0; b < result.buckets.size(); ++b) {
    const Mean mean = MeanOf(means[b]);
    result.buckets[b].nats_per_token = mean.value;
    result.buckets[b].standard_error = mean.standard_error;
  }
  FindRise(means, &result);
  return result;
}

Json ContextToJson(const ContextResult& result) {
  Json buckets = Json::array();
  for (const ContextBucket& bucket : result.buckets) {
    buckets.push_back({{"begin", bucket.begin},
                       {"end", bucket.end},
                       {"nats_per_token", bucket.nats_per_token},
                       {"standard_error", bucket.standard_error}});
  }
  return {
      {"tokens", result.tokens},
      {"windows", result.windows},
      {"buckets", std::move(buckets)},
      {"rise_nats", result.rise_nats},
      {"rise_standard_error", result.rise_standard_error},
  };
}

std::string ContextToTable(const ContextResult& result) {
  std::vector<std::vector<std::string>> rows = {{"POSITIONS", "NATS/TOKEN", "+-"}};
  for (const ContextBucket& bucket : result.buckets) {
    rows.push_back({absl::StrCat(bucket.begin, "..", bucket.end - 1), absl::StrFormat("%.4f", bucket.nats_per_token),
                    absl::StrFormat("%.4f", bucket.standard_error)});
  }
  return absl::StrCat(FormatTable(rows), "\n", result.windows, " windows of ", result.tokens, " tokens; ",
                      result.rise_nats > 0 ? absl::StrFormat("rises by at most %.4f +- %.4f nats", result.rise_nats,
                                                             result.rise_standard_error)
                                           : "never rises",
                      "\n");
}

}  // namespace rwkv::rwkvctl
