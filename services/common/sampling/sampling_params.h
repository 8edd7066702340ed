// v1::Sampling, checked: what the router validates at its door is the very object that the sampler draws by.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "rwkv/v1/common.pb.h"

namespace rwkv::common {

// Immutable. Every value is in the range that common.proto states.
class SamplingParams {
 public:
  static constexpr float kMaxTemperature = 100;
  static constexpr float kMaxPenalty = 1000;  // Absolute value, of presence and frequency penalty.
  static constexpr float kMinRepetitionPenalty = 0.001f;
  static constexpr float kMaxRepetitionPenalty = 1000;
  static constexpr float kMaxLogitBias = 1000;  // Absolute value.
  static constexpr int kMaxLogitBiases = 1024;
  static constexpr uint32_t kMaxTopLogprobs = 64;
  static constexpr float kDefaultPenaltyDecay = 0.996f;

  enum class Order { kTemperatureFirst, kRwkvPip };

  // Ids [begin, end) that are never drawn.
  struct IdRange {
    uint32_t begin = 0;
    uint32_t end = 0;
  };

  // kInvalidArgument naming the field ("sampling.top_p") and the value.
  //   vocab_size        V of the model, >= 1; logit_bias may only name ids below it.
  //   banned_token_ids  [begin, end) pairs as in v1::AttachSequence; each begin <= end, cut at vocab_size.
  static absl::StatusOr<SamplingParams> Create(const v1::Sampling& sampling, int64_t vocab_size,
                                               absl::Span<const uint32_t> banned_token_ids = {});

  int64_t vocab_size() const { return vocab_size_; }
  bool greedy() const { return temperature_ == 0; }
  float temperature() const { return temperature_; }  // 0 is greedy.
  int32_t top_k() const { return top_k_; }            // 0: all.
  float top_p() const { return top_p_; }              // 1: all.
  float typical_p() const { return typical_p_; }      // 1: all.
  float min_p() const { return min_p_; }              // 0: all.
  float presence_penalty() const { return presence_penalty_; }
  float frequency_penalty() const { return frequency_penalty_; }
  float penalty_decay() const { return penalty_decay_; }
  float repetition_penalty() const { return repetition_penalty_; }  // 1: none.
  bool has_penalty() const { return presence_penalty_ != 0 || frequency_penalty_ != 0 || repetition_penalty_ != 1; }
  uint64_t seed() const { return seed_; }  // 0 if unset.
  uint32_t top_logprobs() const { return top_logprobs_; }
  Order order() const { return order_; }
  const std::vector<std::pair<uint32_t, float>>& logit_bias() const { return logit_bias_; }  // Ascending ids; or -inf.
  const std::vector<IdRange>& banned() const { return banned_; }                             // Ascending, disjoint.

 private:
  SamplingParams() = default;

  int64_t vocab_size_ = 0;
  float temperature_ = 0;
  int32_t top_k_ = 0;
  float top_p_ = 1;
  float typical_p_ = 1;
  float min_p_ = 0;
  float presence_penalty_ = 0;
  float frequency_penalty_ = 0;
  float penalty_decay_ = kDefaultPenaltyDecay;
  float repetition_penalty_ = 1;
  uint64_t seed_ = 0;
  uint32_t top_logprobs_ = 0;
  Order order_ = Order::kTemperatureFirst;
  std::vector<std::pair<uint32_t, float>> logit_bias_;
  std::vector<IdRange> banned_;
};

// The same request with every optional field set, as v1::AttachSequence wants it; `drawn_seed` is used if it names
// none.
v1::Sampling CompleteSampling(const v1::Sampling& sampling, uint64_t drawn_seed);

}  // namespace rwkv::common
