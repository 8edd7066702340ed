// rwkvctl eval perplexity: how well the model predicts a text.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "services/rwkvctl/eval_tokens.h"
#include "services/rwkvctl/json.h"
#include "services/rwkvctl/progress_bar.h"

namespace rwkv::rwkvctl {

struct PerplexityResult {
  uint64_t tokens = 0;  // Of the text; id 0, which comes before them, is not predicted.
  uint64_t bytes = 0;
  double nats = 0;  // -sum of log p(token | all before it)

  double NatsPerToken() const { return nats / static_cast<double>(tokens); }
  double Perplexity() const;  // Per token.
  double BitsPerByte() const;
};

// Feeds the text as one document after id 0, in one recurrent stream. kInvalidArgument: it is empty; else the router's
// errors.
absl::StatusOr<PerplexityResult> EvaluatePerplexity(const EvalModel& model, const std::string& text,
                                                    ProgressBar& progress);

// {"tokens", "bytes", "nats_per_token", "perplexity", "bits_per_byte"}
Json PerplexityToJson(const PerplexityResult& result);
std::string PerplexityToTable(const PerplexityResult& result);

}  // namespace rwkv::rwkvctl
