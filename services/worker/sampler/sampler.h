// Draws the next token from a row of logits.
//
// The model's own distribution is softmax(logits) over all V rows; every reported log-probability is of it. What is
// drawn from is made of it in these steps:
//
//   1. adjust    l[i] = logit[i] + logit_bias[i], then, for ids that were seen,
//                  l[i] = l[i] / repetition_penalty  if l[i] > 0, else l[i] * repetition_penalty
//                  l[i] -= presence_penalty + count[i] * frequency_penalty
//                each rounded to fp32 (count: see PenaltyState); banned ids become -inf. Ids at -inf take no further
//                part.
//   greedy       (temperature 0): the largest l, the smallest id on a tie. Nothing below is done.
//
//   SAMPLING_ORDER_TEMPERATURE_FIRST            SAMPLING_ORDER_RWKV_PIP
//   2. p = softmax(l / temperature)             2. p = softmax(l)
//   3. top_k                                    3. top_p, tokens as likely as the last one kept stay too
//   4. typical_p                                4. top_k
//   5. top_p                                    5. typical_p, min_p (not in the pip package)
//   6. min_p                                    6. p = p ^ (1 / temperature)
//
//   7. draw      u uniform in [0, 1) from Philox; walking the ids that are left upwards, the first whose running sum
//                of p exceeds u * sum(p).
//
// A cut looks at the ids that the cuts before it left, with p renormalised over them:
//   top_k        the k largest l.
//   typical_p    with surprise s = -ln p and entropy H = sum(p * s): the shortest run in order of |s - H| whose p
//                sum to typical_p or more.
//   top_p        the shortest run in order of falling p whose p sum to top_p or more.
//   min_p        those with p >= min_p * max(p).
// Equal keys are taken by rising id. top_k 0, typical_p 1, top_p 1 and min_p 0 cut nothing; no cut drops everything.
//
// RWKV_PIP is `sample_logits` of the PyPI package rwkv 0.8.32 (rwkv/utils.py), with two differences: a tie at the k-th
// place goes to the smaller id (there: as argsort leaves it), and top_p = 1 keeps everything (there, when the fp32
// running sum ends below 1, only the likeliest). Its `generate` does not count blanks, tabs and digits for the
// frequency penalty; here every token counts, since a worker knows no text.
//
// The same bits everywhere: p is kept in fixed point, at least 2^-45 of the likeliest (for V up to 65,536), so that its
// sums are exact in any order; exp and log are our own (glibc's choose an algorithm by CPU); orders are total; and the
// generator is keyed by (seed, position) alone.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "services/common/sampling/sampling_params.h"

namespace rwkv::worker {

using SamplingParams = common::SamplingParams;

// What a turn has generated so far, as the penalties see it. After each token all counts are multiplied by
// penalty_decay, then the token's own grows by one; a token counts as seen from then on. A state that has counted the
// same tokens under the same params is the same, bit for bit, whichever process counted them. Counting a token costs
// the same however many were seen: a prompt may be counted, too.
class PenaltyState {
 public:
  PenaltyState() = default;
  // As after `turn_tokens` were drawn.
  PenaltyState(const SamplingParams& params, absl::Span<const uint32_t> turn_tokens);

  // Takes no part, and no memory, if `params` has no penalty.
  void Count(const SamplingParams& params, uint32_t token);

  // Ids that were seen, in order of first appearance.
  const std::vector<uint32_t>& seen() const { return seen_; }
  // Of seen()[place].
  double count(size_t place) const { return shares_[place] * scale_; }

 private:
  std::vector<uint32_t> seen_;
  // Counts divided by scale_, which alone is multiplied by the decay, until it is so small that they take it in.
  std::vector<double> shares_;
  double scale_ = 1;
  absl::flat_hash_map<uint32_t, uint32_t> index_;  // Token to its place in seen_.
};

// What is taken from the logit of an id that was seen, `count` as its PenaltyState has it.
inline double PenaltyOf(const SamplingParams& params, double count) {
  return static_cast<double>(params.presence_penalty()) + count * static_cast<double>(params.frequency_penalty());
}

struct LogprobOf {
  uint32_t token = 0;
  float logprob = 0;  // Natural; of the model's own distribution.
};

struct SampledToken {
  uint32_t token = 0;
  float logprob = 0;
  std::vector<LogprobOf> top_logprobs;  // params.top_logprobs() likeliest (at most V), falling; ties by rising id.
};

// Holds scratch memory for one row. One thread at a time.
class Sampler {
 public:
  // Draws the token that will stand at `position` of the sequence's log, and counts it in `penalties`.
  //   logits  [V], V as given to SamplingParams::Create.
  // kInternal, with nothing counted: a logit is NaN or +inf, no id is left to draw, or another V.
  absl::StatusOr<SampledToken> Sample(absl::Span<const float> logits, const SamplingParams& params, uint64_t position,
                                      PenaltyState& penalties);

  // ln softmax(logits)[token] for token < V, the same bits as Sample reports. kInternal: a logit is NaN or +inf.
  static absl::StatusOr<float> Logprob(absl::Span<const float> logits, uint32_t token);

 private:
  // Step 1, on all V; adjusted_.
  absl::Span<const float> Adjust(absl::Span<const float> logits, const SamplingParams& params,
                                 const PenaltyState& penalties);
  // Steps 2 to 6.
  void CollectCandidates(absl::Span<const float> adjusted);
  void ComputeWeights(double temperature);
  void CutTopK(int64_t k);
  void CutTopP(double top_p, bool keep_ties);
  void CutTypical(double typical_p, double temperature);
  void CutMinP(double min_p);
  uint32_t Draw(uint64_t seed, uint64_t position) const;

  // Keeps the shortest run of candidates, in order of rising keys and then ids, whose measures (their weights, or 1
  // each) sum to `target` or more; with `keep_ties` also those whose key equals the last one's. key(i) is that of
  // ids_[i], `first_key` the smallest. 1 <= target <= sum.
  template <typename Key>
  void KeepShortestRun(Key key, double first_key, bool measure_weights, uint64_t target, bool keep_ties);
  double LargestLogit() const;  // Of the candidates.
  uint64_t TotalWeight() const;

  std::vector<float> adjusted_;  // [V]
  int weight_bits_ = 0;          // The likeliest has weight 2^weight_bits_; V of them do not overflow.
  // The ids that may still be drawn, ascending, and what belongs to each.
  std::vector<uint32_t> ids_;
  std::vector<float> logits_;                          // Adjusted.
  std::vector<uint64_t> weights_;                      // Proportional to p. Empty before ComputeWeights.
  std::vector<double> keys_;                           // Of CutTypical.
  std::vector<std::pair<double, uint32_t>> boundary_;  // Of KeepShortestRun: keys and places in ids_.
};

}  // namespace rwkv::worker
