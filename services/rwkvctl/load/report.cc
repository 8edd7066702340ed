#include "services/rwkvctl/load/report.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "services/rwkvctl/table.h"

namespace rwkv::rwkvctl {
namespace {

double PerSecond(uint64_t count, absl::Duration elapsed) {
  const double seconds = absl::ToDoubleSeconds(elapsed);
  return seconds > 0 ? static_cast<double>(count) / seconds : 0;
}

bool IsWithin(const RequestOutcome& outcome, const LatencyLimits& limits) {
  if (outcome.tokens.empty()) return true;  // Nothing was asked for but the input.
  if (limits.ttft.has_value() && outcome.tokens.front() - outcome.due > *limits.ttft) return false;
  const auto gaps = static_cast<int64_t>(outcome.tokens.size()) - 1;
  return !limits.itl.has_value() || gaps == 0 || outcome.tokens.back() - outcome.tokens.front() <= *limits.itl * gaps;
}

Json HistogramToJson(const DurationHistogram& histogram) {
  Json json;
  json["count"] = histogram.count();
  json["mean"] = absl::ToDoubleSeconds(histogram.mean());
  json["p50"] = absl::ToDoubleSeconds(histogram.Quantile(0.5));
  json["p90"] = absl::ToDoubleSeconds(histogram.Quantile(0.9));
  json["p99"] = absl::ToDoubleSeconds(histogram.Quantile(0.99));
  json["max"] = absl::ToDoubleSeconds(histogram.max());
  return json;
}

std::vector<std::string> HistogramRow(const std::string& name, const DurationHistogram& histogram) {
  std::vector<std::string> row = {name};
  for (const absl::Duration value : {histogram.Quantile(0.5), histogram.Quantile(0.9), histogram.Quantile(0.99),
                                     histogram.max(), histogram.mean()}) {
    row.push_back(histogram.count() == 0 ? "-" : ShortDuration(value));
  }
  row.push_back(absl::StrCat(histogram.count()));
  return row;
}

}  // namespace

void LoadReport::Add(const RequestOutcome& outcome) {
  elapsed = std::max(elapsed, std::min(outcome.ended, measured.end) - measured.begin);
  for (size_t t = 0; t < outcome.tokens.size(); ++t) {
    if (!measured.Has(outcome.tokens[t])) continue;
    ++generated_tokens;
    if (t > 0) inter_token.Add(outcome.tokens[t] - outcome.tokens[t - 1]);
  }
  if (!measured.Has(outcome.ended)) return;
  for (const absl::Duration after : outcome.refused_after) refusal.Add(after);
  if (outcome.sent < absl::InfiniteDuration()) send_delay.Add(outcome.sent - outcome.due);
  if (!outcome.tokens.empty()) ttft.Add(outcome.tokens.front() - outcome.due);
  if (outcome.interrupted) {
    ++interrupted;
    return;
  }
  if (!outcome.status.ok()) {
    ++errors[absl::StatusCodeToString(outcome.status.code())];
    if (first_error.ok()) first_error = outcome.status;
    return;
  }
  ++completed;
  prompt_tokens += outcome.prompt_tokens;
  reused_tokens += outcome.reused_tokens;
  end_to_end.Add(outcome.ended - outcome.due);
  if (IsWithin(outcome, limits)) {
    ++good;
    good_tokens += outcome.tokens.size();
  }
}

uint64_t LoadReport::failed() const {
  uint64_t count = 0;
  for (const auto& [code, requests] : errors) count += requests;
  return count;
}

Json LoadReportToJson(const LoadReport& report) {
  Json json;
  json["elapsed_seconds"] = absl::ToDoubleSeconds(report.elapsed);
  Json requests;
  requests["completed"] = report.completed;
  requests["failed"] = report.failed();
  requests["interrupted"] = report.interrupted;
  requests["refusals"] = report.refusal.count();
  requests["per_second"] = PerSecond(report.completed, report.elapsed);
  json["requests"] = std::move(requests);
  json["errors"] = Json::object();
  for (const auto& [code, count] : report.errors) json["errors"][code] = count;
  Json tokens;
  tokens["prompt"] = report.prompt_tokens;
  tokens["reused"] = report.reused_tokens;
  tokens["generated"] = report.generated_tokens;
  tokens["prompt_per_second"] = PerSecond(report.prompt_tokens, report.elapsed);
  tokens["generated_per_second"] = PerSecond(report.generated_tokens, report.elapsed);
  json["tokens"] = std::move(tokens);
  json["ttft_seconds"] = HistogramToJson(report.ttft);
  json["inter_token_seconds"] = HistogramToJson(report.inter_token);
  json["end_to_end_seconds"] = HistogramToJson(report.end_to_end);
  json["refusal_seconds"] = HistogramToJson(report.refusal);
  json["send_delay_seconds"] = HistogramToJson(report.send_delay);
  Json goodput;
  if (report.limits.ttft.has_value()) goodput["ttft_limit_seconds"] = absl::ToDoubleSeconds(*report.limits.ttft);
  if (report.limits.itl.has_value()) goodput["itl_limit_seconds"] = absl::ToDoubleSeconds(*report.limits.itl);
  goodput["requests"] = report.good;
  goodput["requests_per_second"] = PerSecond(report.good, report.elapsed);
  goodput["tokens_per_second"] = PerSecond(report.good_tokens, report.elapsed);
  json["goodput"] = std::move(goodput);
  return json;
}

std::string LoadReportToTable(const LoadReport& report) {
  std::vector<std::vector<std::string>> times = {{"TIME", "P50", "P90", "P99", "MAX", "MEAN", "COUNT"}};
  times.push_back(HistogramRow("first token", report.ttft));
  times.push_back(HistogramRow("between tokens", report.inter_token));
  times.push_back(HistogramRow("whole answer", report.end_to_end));
  if (report.refusal.count() > 0) times.push_back(HistogramRow("until refused", report.refusal));
  times.push_back(HistogramRow("until sent", report.send_delay));

  const auto rate = [&](uint64_t count) { return absl::StrFormat("%.4g/s", PerSecond(count, report.elapsed)); };
  std::vector<std::vector<std::string>> counts = {{"COUNT", "", "RATE"}};
  const auto add = [&](const std::string& name, uint64_t count) {
    counts.push_back({name, absl::StrCat(count), rate(count)});
  };
  add("requests completed", report.completed);
  if (report.limits.ttft.has_value() || report.limits.itl.has_value()) {
    add("  within the limits", report.good);
    add("  their tokens", report.good_tokens);
  }
  for (const auto& [code, count] : report.errors) add(absl::StrCat("failed: ", code), count);
  if (report.refusal.count() > 0) add("refused (come again)", report.refusal.count());
  if (report.interrupted > 0) add("interrupted", report.interrupted);
  add("tokens generated", report.generated_tokens);
  add("tokens of prompts", report.prompt_tokens);
  if (report.reused_tokens > 0) add("tokens reused", report.reused_tokens);
  return absl::StrCat(FormatTable(times), "\n", FormatTable(counts), "\nin ", ShortDuration(report.elapsed), "\n");
}

std::string ShortDuration(absl::Duration duration) {
  const double seconds = absl::ToDoubleSeconds(duration);
  if (seconds == 0) return "0";
  if (std::abs(seconds) < 0.9995e-3) return absl::StrFormat("%.3g us", seconds * 1e6);
  if (std::abs(seconds) < 0.9995) return absl::StrFormat("%.3g ms", seconds * 1e3);
  if (std::abs(seconds) < 999.5) return absl::StrFormat("%.3g s", seconds);
  return absl::StrFormat("%.0f s", seconds);
}

}  // namespace rwkv::rwkvctl
