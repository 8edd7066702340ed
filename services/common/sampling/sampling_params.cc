#include "services/common/sampling/sampling_params.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "services/common/grpc_status.h"

namespace rwkv::common {
namespace {

// NaN is in no interval.
absl::Status CheckInterval(absl::string_view field, float value, float low, float high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return InvalidFieldError(absl::StrCat("sampling.", field),
                           absl::StrCat("must be in [", low, ", ", high, "], not ", value));
}

// (0, 1]
absl::Status CheckProbability(absl::string_view field, float value) {
  if (value > 0 && value <= 1) return absl::OkStatus();
  return InvalidFieldError(absl::StrCat("sampling.", field), absl::StrCat("must be in (0, 1], not ", value));
}

}  // namespace

absl::StatusOr<SamplingParams> SamplingParams::Create(const v1::Sampling& sampling, int64_t vocab_size,
                                                      absl::Span<const uint32_t> banned_token_ids) {
  SamplingParams params;
  params.vocab_size_ = vocab_size;
  if (sampling.has_temperature()) params.temperature_ = sampling.temperature();
  if (sampling.has_top_k()) params.top_k_ = sampling.top_k();
  if (sampling.has_top_p()) params.top_p_ = sampling.top_p();
  if (sampling.has_typical_p()) params.typical_p_ = sampling.typical_p();
  if (sampling.has_min_p()) params.min_p_ = sampling.min_p();
  if (sampling.has_presence_penalty()) params.presence_penalty_ = sampling.presence_penalty();
  if (sampling.has_frequency_penalty()) params.frequency_penalty_ = sampling.frequency_penalty();
  if (sampling.has_penalty_decay()) params.penalty_decay_ = sampling.penalty_decay();
  if (sampling.has_repetition_penalty()) params.repetition_penalty_ = sampling.repetition_penalty();
  params.seed_ = sampling.seed();
  params.top_logprobs_ = sampling.top_logprobs();

  const absl::Status checks[] = {
      CheckInterval("temperature", params.temperature_, 0, kMaxTemperature),
      params.top_k_ >= 0
          ? absl::OkStatus()
          : InvalidFieldError("sampling.top_k", absl::StrCat("must not be negative, but is ", params.top_k_)),
      CheckProbability("top_p", params.top_p_),
      CheckProbability("typical_p", params.typical_p_),
      CheckInterval("min_p", params.min_p_, 0, 1),
      CheckInterval("presence_penalty", params.presence_penalty_, -kMaxPenalty, kMaxPenalty),
      CheckInterval("frequency_penalty", params.frequency_penalty_, -kMaxPenalty, kMaxPenalty),
      CheckInterval("penalty_decay", params.penalty_decay_, 0, 1),
      CheckInterval("repetition_penalty", params.repetition_penalty_, kMinRepetitionPenalty, kMaxRepetitionPenalty),
  };
  for (const absl::Status& check : checks) {
    if (!check.ok()) return check;
  }
  if (params.top_logprobs_ > kMaxTopLogprobs) {
    return InvalidFieldError("sampling.top_logprobs",
                             absl::StrCat("must be at most ", kMaxTopLogprobs, ", not ", params.top_logprobs_));
  }
  switch (sampling.order()) {
    case v1::SAMPLING_ORDER_UNSPECIFIED:
    case v1::SAMPLING_ORDER_TEMPERATURE_FIRST:
      params.order_ = Order::kTemperatureFirst;
      break;
    case v1::SAMPLING_ORDER_RWKV_PIP:
      params.order_ = Order::kRwkvPip;
      break;
    default:
      return InvalidFieldError("sampling.order", absl::StrCat("unknown value ", static_cast<int>(sampling.order())));
  }

  if (sampling.logit_bias_size() > kMaxLogitBiases) {
    return InvalidFieldError(
        "sampling.logit_bias",
        absl::StrCat("has ", sampling.logit_bias_size(), " entries, at most ", kMaxLogitBiases, " are allowed"));
  }
  params.logit_bias_.assign(sampling.logit_bias().begin(), sampling.logit_bias().end());
  std::sort(params.logit_bias_.begin(), params.logit_bias_.end());
  for (const auto& [id, bias] : params.logit_bias_) {
    if (id >= vocab_size) {
      return InvalidFieldError("sampling.logit_bias",
                               absl::StrCat("token id ", id, " is not below the vocabulary's ", vocab_size));
    }
    if (!(std::abs(bias) <= kMaxLogitBias) && bias != -std::numeric_limits<float>::infinity()) {
      return InvalidFieldError("sampling.logit_bias", absl::StrCat("of token id ", id, " must be in [", -kMaxLogitBias,
                                                                   ", ", kMaxLogitBias, "] or -infinity, not ", bias));
    }
  }

  if (banned_token_ids.size() % 2 != 0) {
    return InvalidFieldError("banned_token_ids",
                             absl::StrCat("must be [begin, end) pairs, but has ", banned_token_ids.size(), " numbers"));
  }
  for (size_t i = 0; i < banned_token_ids.size(); i += 2) {
    IdRange range{banned_token_ids[i], banned_token_ids[i + 1]};
    if (range.begin > range.end) {
      return InvalidFieldError("banned_token_ids",
                               absl::StrCat("begin ", range.begin, " is above end ", range.end, " of its range"));
    }
    range.end = static_cast<uint32_t>(std::min<int64_t>(range.end, vocab_size));
    if (range.begin < range.end) params.banned_.push_back(range);
  }
  std::sort(params.banned_.begin(), params.banned_.end(),
            [](const IdRange& a, const IdRange& b) { return a.begin < b.begin; });
  std::vector<IdRange> merged;
  for (const IdRange& range : params.banned_) {
    if (!merged.empty() && range.begin <= merged.back().end) {
      merged.back().end = std::max(merged.back().end, range.end);
    } else {
      merged.push_back(range);
    }
  }
  params.banned_ = std::move(merged);
  return params;
}

v1::Sampling CompleteSampling(const v1::Sampling& sampling, uint64_t drawn_seed) {
  v1::Sampling complete = sampling;
  if (!complete.has_temperature()) complete.set_temperature(0);
  if (!complete.has_top_k()) complete.set_top_k(0);
  if (!complete.has_top_p()) complete.set_top_p(1);
  if (!complete.has_typical_p()) complete.set_typical_p(1);
  if (!complete.has_min_p()) complete.set_min_p(0);
  if (!complete.has_presence_penalty()) complete.set_presence_penalty(0);
  if (!complete.has_frequency_penalty()) complete.set_frequency_penalty(0);
  if (!complete.has_penalty_decay()) complete.set_penalty_decay(SamplingParams::kDefaultPenaltyDecay);
  if (!complete.has_repetition_penalty()) complete.set_repetition_penalty(1);
  if (!complete.has_seed()) complete.set_seed(drawn_seed);
  if (complete.order() == v1::SAMPLING_ORDER_UNSPECIFIED) complete.set_order(v1::SAMPLING_ORDER_TEMPERATURE_FIRST);
  return complete;
}

}  // namespace rwkv::common
