#include "services/rwkvctl/eval_context.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/string_view.h"
#include "services/rwkvctl/eval_tokens.h"
#include "services/rwkvctl/table.h"

namespace rwkv::rwkvctl {
namespace {

constexpr size_t kPieceBytes = 1 << 20;  // Of text, tokenized at a time; a window does not reach over its end.
constexpr uint64_t kFirstBucketEnd = 64;

// Windows of `options.tokens`, each after id 0.
absl::StatusOr<std::vector<TokenIds>> CutIntoWindows(router::RouterClient& client, absl::string_view text,
                                                     const ContextOptions& options) {
  std::vector<TokenIds> windows;
  size_t most = 0;
  for (size_t begin = 0; begin < text.size() && windows.size() < options.windows; begin += kPieceBytes) {
    absl::StatusOr<TokenIds> tokens = EncodeText(client, text.substr(begin, kPieceBytes));
    if (!tokens.ok()) return tokens.status();
    most = std::max(most, tokens->size());
    for (size_t first = 0; first + options.tokens <= tokens->size() && windows.size() < options.windows;
         first += options.tokens) {
      TokenIds& window = windows.emplace_back(1, 0);
      window.insert(window.end(), tokens->begin() + first, tokens->begin() + first + options.tokens);
    }
  }
  if (windows.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("the text has ", most, " tokens in a row, a window needs ", options.tokens));
  }
  return windows;
}

}  // namespace

double ContextResult::RiseNats() const {
  double lowest = std::numeric_limits<double>::infinity();
  double rise = 0;
  for (const ContextBucket& bucket : buckets) {
    rise = std::max(rise, bucket.nats_per_token - lowest);
    lowest = std::min(lowest, bucket.nats_per_token);
  }
  return rise;
}

absl::StatusOr<ContextResult> EvaluateContext(router::RouterClient& client, const std::string& text,
                                              const ContextOptions& options, ProgressBar& progress) {
  absl::StatusOr<std::vector<TokenIds>> windows = CutIntoWindows(client, text, options);
  if (!windows.ok()) return windows.status();
  ContextResult result;
  result.tokens = options.tokens;
  for (uint64_t begin = 0, end = kFirstBucketEnd; begin < options.tokens; begin = end, end *= 2) {
    ContextBucket& bucket = result.buckets.emplace_back();
    bucket.begin = begin;
    bucket.end = std::min<uint64_t>(end, options.tokens);
  }
  // Of a bucket's means over the windows.
  std::vector<double> sums(result.buckets.size());
  std::vector<double> squares(result.buckets.size());
  for (const TokenIds& window : *windows) {
    absl::StatusOr<std::vector<float>> logprobs = ScoreTokens(client, window, 1);
    if (!logprobs.ok()) return logprobs.status();
    for (size_t b = 0; b < result.buckets.size(); ++b) {
      const ContextBucket& bucket = result.buckets[b];
      double nats = 0;
      for (uint64_t i = bucket.begin; i < bucket.end; ++i) nats -= (*logprobs)[i];
      const double mean = nats / static_cast<double>(bucket.end - bucket.begin);
      sums[b] += mean;
      squares[b] += mean * mean;
    }
    progress.Update(++result.windows, windows->size());
  }
  const auto count = static_cast<double>(result.windows);
  for (size_t b = 0; b < result.buckets.size(); ++b) {
    const double mean = sums[b] / count;
    result.buckets[b].nats_per_token = mean;
    if (result.windows > 1) {
      const double variance = std::max(0.0, squares[b] - count * mean * mean) / (count - 1);
      result.buckets[b].standard_error = std::sqrt(variance / count);
    }
  }
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
      {"rise_nats", result.RiseNats()},
  };
}

std::string ContextToTable(const ContextResult& result) {
  std::vector<std::vector<std::string>> rows = {{"POSITIONS", "NATS/TOKEN", "+-"}};
  for (const ContextBucket& bucket : result.buckets) {
    rows.push_back({absl::StrCat(bucket.begin, "..", bucket.end - 1), absl::StrFormat("%.4f", bucket.nats_per_token),
                    absl::StrFormat("%.4f", bucket.standard_error)});
  }
  return absl::StrCat(
      FormatTable(rows), "\n", result.windows, " windows of ", result.tokens, " tokens; ",
      result.RiseNats() > 0 ? absl::StrFormat("rises by at most %.4f nats", result.RiseNats()) : "never rises", "\n");
}

}  // namespace rwkv::rwkvctl
