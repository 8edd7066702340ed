#include "services/rwkvctl/eval_perplexity.h"

#include <cmath>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "rwkv/v1/generation.pb.h"
#include "services/rwkvctl/table.h"

namespace rwkv::rwkvctl {

double PerplexityResult::Perplexity() const { return std::exp(NatsPerToken()); }

double PerplexityResult::BitsPerByte() const { return nats / std::log(2.0) / static_cast<double>(bytes); }

absl::StatusOr<PerplexityResult> EvaluatePerplexity(const EvalModel& model, const std::string& text,
                                                    ProgressBar& progress) {
  if (text.empty()) return absl::InvalidArgumentError("the text is empty");
  v1::ScoreDocumentRequest document;
  document.set_initial_state(model.initial_state);
  document.add_token_ids(0);
  document.set_text(text);
  PerplexityResult result;
  result.bytes = text.size();
  absl::Status status = model.client.ScoreDocument(document, [&](const v1::ScoreDocumentResponse& response) {
    for (const float logprob : response.logprobs()) result.nats -= logprob;
    result.tokens += response.logprobs_size();
    progress.Update(result.tokens, response.token_count() - 1);
    return absl::OkStatus();
  });
  if (!status.ok()) return status;
  return result;
}

Json PerplexityToJson(const PerplexityResult& result) {
  return {
      {"tokens", result.tokens},
      {"bytes", result.bytes},
      {"nats_per_token", result.NatsPerToken()},
      {"perplexity", result.Perplexity()},
      {"bits_per_byte", result.BitsPerByte()},
  };
}

std::string PerplexityToTable(const PerplexityResult& result) {
  return FormatTable(
      {{"TOKENS", "BYTES", "NATS/TOKEN", "PERPLEXITY", "BITS/BYTE"},
       {absl::StrCat(result.tokens), absl::StrCat(result.bytes), absl::StrFormat("%.4f", result.NatsPerToken()),
        absl::StrFormat("%.3f", result.Perplexity()), absl::StrFormat("%.4f", result.BitsPerByte())}});
}

}  // namespace rwkv::rwkvctl
