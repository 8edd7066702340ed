#include "services/rwkvctl/eval_lambada.h"

#include <algorithm>
#include <cmath>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "services/common/parallel.h"
#include "services/rwkvctl/eval_tokens.h"
#include "services/rwkvctl/table.h"

namespace rwkv::rwkvctl {
namespace {

struct Answer {
  bool correct = false;
  double nats = 0;
};

absl::StatusOr<Answer> Try(const EvalModel& model, const LambadaExample& example) {
  absl::StatusOr<TokenIds> tokens = EncodeText(model, example.context);
  if (!tokens.ok()) return tokens.status();
  absl::StatusOr<TokenIds> target = EncodeText(model, example.target);
  if (!target.ok()) return target.status();
  tokens->insert(tokens->begin(), 0);
  absl::StatusOr<std::vector<v1::GenerateResponse>> likeliest =
      ContinueGreedily(model, *tokens, static_cast<uint32_t>(target->size()));
  if (!likeliest.ok()) return likeliest.status();
  Answer answer;
  answer.correct =
      std::equal(target->begin(), target->end(), likeliest->begin(), likeliest->end(),
                 [](uint32_t id, const v1::GenerateResponse& response) { return id == response.token_id(); });

  const size_t begin = tokens->size();
  tokens->insert(tokens->end(), target->begin(), target->end());
  absl::StatusOr<std::vector<float>> logprobs = ScoreTokens(model, *tokens, begin);
  if (!logprobs.ok()) return logprobs.status();
  for (const float logprob : *logprobs) answer.nats -= logprob;
  return answer;
}

}  // namespace

double LambadaResult::Perplexity() const { return std::exp(nats / static_cast<double>(examples)); }

absl::StatusOr<std::vector<LambadaExample>> ParseLambada(absl::string_view jsonl) {
  std::vector<LambadaExample> examples;
  int line = 0;
  for (const absl::string_view row : absl::StrSplit(jsonl, '\n')) {
    ++line;
    if (absl::StripAsciiWhitespace(row).empty()) continue;
    const Json json = Json::parse(row, nullptr, /*allow_exceptions=*/false);
    if (json.is_discarded()) return absl::InvalidArgumentError(absl::StrCat("line ", line, " is not JSON"));
    if (!json.is_object() || !json.contains("text") || !json["text"].is_string()) {
      return absl::InvalidArgumentError(absl::StrCat("line ", line, " is not an object with a string \"text\""));
    }
    const std::string text = json["text"].get<std::string>();
    const size_t blank = text.rfind(' ');
    if (blank == std::string::npos || blank == 0 || blank + 1 == text.size()) {
      return absl::InvalidArgumentError(absl::StrCat("line ", line, ": the text has no last word after a blank"));
    }
    examples.push_back({text.substr(0, blank), text.substr(blank)});
  }
  if (examples.empty()) return absl::InvalidArgumentError("there is no example");
  return examples;
}

absl::StatusOr<LambadaResult> EvaluateLambada(const EvalModel& model, const std::vector<LambadaExample>& examples,
                                              uint32_t parallel, ProgressBar& progress) {
  std::vector<Answer> answers(examples.size());
  absl::Status status = common::RunInParallel(
      examples.size(), parallel,
      [&](size_t i) {
        absl::StatusOr<Answer> answer = Try(model, examples[i]);
        if (answer.ok()) answers[i] = *answer;
        return answer.status();
      },
      [&](size_t done) { progress.Update(done, examples.size()); });
  if (!status.ok()) return status;
  LambadaResult result;
  result.examples = examples.size();
  for (const Answer& answer : answers) {
    result.correct += answer.correct;
    result.nats += answer.nats;
  }
  return result;
}

Json LambadaToJson(const LambadaResult& result) {
  return {
      {"examples", result.examples},
      {"correct", result.correct},
      {"accuracy", result.Accuracy()},
      {"perplexity", result.Perplexity()},
  };
}

std::string LambadaToTable(const LambadaResult& result) {
  return FormatTable(
      {{"EXAMPLES", "CORRECT", "ACCURACY", "PERPLEXITY"},
       {absl::StrCat(result.examples), absl::StrCat(result.correct),
        absl::StrFormat("%.2f %%", 100 * result.Accuracy()), absl::StrFormat("%.3f", result.Perplexity())}});
}

}  // namespace rwkv::rwkvctl
