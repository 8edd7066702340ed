#include "services/worker/sampler/sampler.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <limits>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/deterministic_math.h"
#include "services/worker/sampler/philox.h"
#include "services/worker/sampler/row_math.h"

namespace rwkv::worker {
namespace {

namespace deterministic = kernels::deterministic;

constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();

struct RowStatistics {
  double max = 0;
  double log_sum = 0;  // ln sum exp(logit - max)

  float Logprob(float logit) const { return static_cast<float>((static_cast<double>(logit) - max) - log_sum); }
};

absl::StatusOr<RowStatistics> Inspect(absl::Span<const float> logits) {
  RowStatistics statistics;
  statistics.max = MaxLogit(logits.data(), logits.size());
  if (std::isnan(statistics.max)) {
    size_t id = 0;
    while (logits[id] <= std::numeric_limits<float>::max()) ++id;
    return absl::InternalError(absl::StrCat("sampler: the logit of token ", id, " is ", logits[id]));
  }
  if (std::isinf(statistics.max)) return absl::InternalError("sampler: every logit is -inf");
  const int bits = deterministic::FixedPointBits(static_cast<int64_t>(logits.size()));
  const uint64_t sum = SumFixedPointExp(logits.data(), logits.size(), statistics.max, bits);
  statistics.log_sum = deterministic::Log(static_cast<double>(sum) / static_cast<double>(uint64_t{1} << bits));
  return statistics;
}

// The n largest logits, falling; ties by rising id.
std::vector<LogprobOf> TopLogprobs(absl::Span<const float> logits, const RowStatistics& statistics, size_t n) {
  n = std::min(n, logits.size());
  if (n == 0) return {};
  std::vector<uint32_t> best;  // Sorted. n is at most 64, and few tokens get past the last.
  best.reserve(n + 1);
  for (uint32_t id = 0; id < logits.size(); ++id) {
    if (best.size() == n && !(logits[id] > logits[best.back()])) continue;
    best.insert(
        std::upper_bound(best.begin(), best.end(), id, [&](uint32_t a, uint32_t b) { return logits[a] > logits[b]; }),
        id);
    if (best.size() > n) best.pop_back();
  }
  std::vector<LogprobOf> result;
  result.reserve(n);
  for (uint32_t id : best) result.push_back({id, statistics.Logprob(logits[id])});
  return result;
}

}  // namespace

PenaltyState::PenaltyState(const SamplingParams& params, absl::Span<const uint32_t> turn_tokens) {
  for (uint32_t token : turn_tokens) Count(params, token);
}

void PenaltyState::Count(const SamplingParams& params, uint32_t token) {
  constexpr double kSmallestScale = 0x1p-500;
  if (!params.has_penalty()) return;
  scale_ *= static_cast<double>(params.penalty_decay());
  if (scale_ < kSmallestScale) {
    for (double& share : shares_) share *= scale_;
    scale_ = 1;
  }
  const auto [it, inserted] = index_.try_emplace(token, static_cast<uint32_t>(seen_.size()));
  if (inserted) {
    seen_.push_back(token);
    shares_.push_back(0);
  }
  shares_[it->second] += 1 / scale_;
}

absl::StatusOr<float> Sampler::Logprob(absl::Span<const float> logits, uint32_t token) {
  if (token >= logits.size()) {
    return absl::InternalError(absl::StrCat("sampler: token ", token, " is not below the ", logits.size(), " logits"));
  }
  absl::StatusOr<RowStatistics> statistics = Inspect(logits);
  if (!statistics.ok()) return statistics.status();
  return statistics->Logprob(logits[token]);
}

absl::StatusOr<SampledToken> Sampler::Sample(absl::Span<const float> logits, const SamplingParams& params,
                                             uint64_t position, PenaltyState& penalties) {
  if (static_cast<int64_t>(logits.size()) != params.vocab_size()) {
    return absl::InternalError(
        absl::StrCat("sampler: ", logits.size(), " logits, but parameters for a vocabulary of ", params.vocab_size()));
  }
  absl::StatusOr<RowStatistics> statistics = Inspect(logits);
  if (!statistics.ok()) return statistics.status();

  absl::Span<const float> adjusted = logits;
  auto largest = static_cast<float>(statistics->max);
  if (!params.logit_bias().empty() || !penalties.seen().empty() || !params.banned().empty()) {
    adjusted = Adjust(logits, params, penalties);
    largest = MaxLogit(adjusted.data(), adjusted.size());
  }
  SampledToken sampled;
  if (std::isnan(largest)) return absl::InternalError("sampler: a penalty takes a logit out of range");
  if (largest == kNegativeInfinity) return absl::InternalError("sampler: every token is banned or at -inf");
  if (params.greedy()) {
    sampled.token = static_cast<uint32_t>(std::find(adjusted.begin(), adjusted.end(), largest) - adjusted.begin());
  } else {
    const double temperature = params.temperature();
    CollectCandidates(adjusted);
    switch (params.order()) {
      case SamplingParams::Order::kTemperatureFirst:
        CutTopK(params.top_k());  // Needs no weights, and spares the exponentials of what it drops.
        ComputeWeights(temperature);
        CutTypical(params.typical_p(), temperature);
        CutTopP(params.top_p(), /*keep_ties=*/false);
        CutMinP(params.min_p());
        break;
      case SamplingParams::Order::kRwkvPip:
        ComputeWeights(/*temperature=*/1);
        CutTopP(params.top_p(), /*keep_ties=*/true);
        CutTopK(params.top_k());
        CutTypical(params.typical_p(), /*temperature=*/1);
        CutMinP(params.min_p());
        if (temperature != 1) ComputeWeights(temperature);  // exp(l)^(1/T) = exp(l/T)
        break;
    }
    sampled.token = Draw(params.seed(), position);
  }
  sampled.logprob = statistics->Logprob(logits[sampled.token]);
  sampled.top_logprobs = TopLogprobs(logits, *statistics, params.top_logprobs());
  penalties.Count(params, sampled.token);
  return sampled;
}

absl::Span<const float> Sampler::Adjust(absl::Span<const float> logits, const SamplingParams& params,
                                        const PenaltyState& penalties) {
  adjusted_.assign(logits.begin(), logits.end());
  for (const auto& [id, bias] : params.logit_bias()) adjusted_[id] += bias;
  for (size_t place = 0; place < penalties.seen().size(); ++place) {
    const uint32_t token = penalties.seen()[place];
    if (token >= adjusted_.size()) continue;
    float& logit = adjusted_[token];
    if (params.repetition_penalty() != 1) {
      logit = logit > 0 ? logit / params.repetition_penalty() : logit * params.repetition_penalty();
    }
    logit = static_cast<float>(static_cast<double>(logit) - PenaltyOf(params, penalties.count(place)));
  }
  for (const SamplingParams::IdRange& range : params.banned()) {
    std::fill(adjusted_.begin() + range.begin, adjusted_.begin() + range.end, kNegativeInfinity);
  }
  return adjusted_;
}

void Sampler::CollectCandidates(absl::Span<const float> adjusted) {
  weight_bits_ = deterministic::FixedPointBits(static_cast<int64_t>(adjusted.size()));
  ids_.resize(adjusted.size());
  logits_.resize(adjusted.size());
  weights_.clear();
  size_t kept = 0;
  for (uint32_t id = 0; id < adjusted.size(); ++id) {
    ids_[kept] = id;
    logits_[kept] = adjusted[id];
    kept += adjusted[id] > kNegativeInfinity;
  }
  ids_.resize(kept);
  logits_.resize(kept);
}

void Sampler::ComputeWeights(double temperature) {
  weights_.resize(logits_.size());
  FixedPointExp(logits_.data(), logits_.size(), LargestLogit(), temperature, weight_bits_, weights_.data());
}

void Sampler::CutTopK(int64_t k) {
  if (k == 0 || k >= static_cast<int64_t>(ids_.size())) return;
  KeepShortestRun([this](size_t i) { return -static_cast<double>(logits_[i]); }, -LargestLogit(),
                  /*measure_weights=*/false, static_cast<uint64_t>(k), /*keep_ties=*/false);
}

void Sampler::CutTopP(double top_p, bool keep_ties) {
  if (top_p >= 1) return;
  KeepShortestRun([this](size_t i) { return -static_cast<double>(logits_[i]); }, -LargestLogit(),
                  /*measure_weights=*/true, deterministic::FractionOf(top_p, TotalWeight()), keep_ties);
}

void Sampler::CutTypical(double typical_p, double temperature) {
  if (typical_p >= 1) return;
  const uint64_t total = TotalWeight();
  const double max = LargestLogit();
  const double log_total =
      deterministic::Log(static_cast<double>(total) / static_cast<double>(uint64_t{1} << weight_bits_));
  // keys_ holds the surprises first.
  keys_.resize(ids_.size());
  uint64_t entropy_units = 0;
  for (size_t i = 0; i < ids_.size(); ++i) {
    keys_[i] = (max - static_cast<double>(logits_[i])) / temperature + log_total;
    if (weights_[i] != 0) entropy_units += deterministic::FixedPointEntropy(weights_[i], total, keys_[i]);
  }
  const double entropy = static_cast<double>(entropy_units) * 0x1p-52;
  for (double& key : keys_) key = std::abs(key - entropy);
  KeepShortestRun([this](size_t i) { return keys_[i]; }, *std::min_element(keys_.begin(), keys_.end()),
                  /*measure_weights=*/true, deterministic::FractionOf(typical_p, total), /*keep_ties=*/false);
}

void Sampler::CutMinP(double min_p) {
  if (min_p == 0) return;
  const double least = min_p * static_cast<double>(*std::max_element(weights_.begin(), weights_.end()));
  size_t kept = 0;
  for (size_t i = 0; i < ids_.size(); ++i) {
    ids_[kept] = ids_[i];
    logits_[kept] = logits_[i];
    weights_[kept] = weights_[i];
    kept += static_cast<double>(weights_[i]) >= least;
  }
  ids_.resize(kept);
  logits_.resize(kept);
  weights_.resize(kept);
}

template <typename Key>
void Sampler::KeepShortestRun(Key key, double first_key, bool measure_weights, uint64_t target, bool keep_ties) {
  // One pass finds the bucket of keys in which the run ends, and only that bucket is sorted. A bucket is 1/32 nat wide,
  // so that a real row of 65,536 logits puts some hundreds into one; the last takes all that is 64 nats away.
  constexpr int kBuckets = 2048;
  constexpr double kBucketsPerUnit = 32;
  const auto bucket = [&](size_t i) {
    return static_cast<int>(std::min<double>((key(i) - first_key) * kBucketsPerUnit, kBuckets - 1));
  };
  std::array<uint64_t, kBuckets> measures = {};
  if (measure_weights) {
    for (size_t i = 0; i < ids_.size(); ++i) measures[bucket(i)] += weights_[i];
  } else {
    for (size_t i = 0; i < ids_.size(); ++i) ++measures[bucket(i)];
  }
  int last_bucket = 0;
  while (measures[last_bucket] < target) target -= measures[last_bucket++];

  boundary_.clear();
  for (size_t i = 0; i < ids_.size(); ++i) {
    if (bucket(i) == last_bucket) boundary_.emplace_back(key(i), static_cast<uint32_t>(i));
  }
  std::sort(boundary_.begin(), boundary_.end());
  size_t end = 0;
  for (uint64_t sum = 0; sum < target; ++end) sum += measure_weights ? weights_[boundary_[end].second] : 1;
  const auto [last_key, last] = boundary_[end - 1];

  size_t kept = 0;
  const bool has_weights = !weights_.empty();
  for (size_t i = 0; i < ids_.size(); ++i) {
    const double own_key = key(i);  // Before its place is overwritten.
    if (own_key > last_key || (own_key == last_key && !keep_ties && i > last)) continue;
    ids_[kept] = ids_[i];
    logits_[kept] = logits_[i];
    if (has_weights) weights_[kept] = weights_[i];
    ++kept;
  }
  ids_.resize(kept);
  logits_.resize(kept);
  if (has_weights) weights_.resize(kept);
}

double Sampler::LargestLogit() const { return MaxLogit(logits_.data(), logits_.size()); }

uint64_t Sampler::TotalWeight() const {
  uint64_t total = 0;
  for (uint64_t weight : weights_) total += weight;
  return total;
}

uint32_t Sampler::Draw(uint64_t seed, uint64_t position) const {
  const uint64_t target = deterministic::ShareOf(PhiloxBits(seed, position), TotalWeight());
  uint64_t sum = 0;
  size_t i = 0;
  for (; i < ids_.size(); ++i) {
    sum += weights_[i];
    if (sum > target) break;
  }
  return ids_[i];
}

}  // namespace rwkv::worker
