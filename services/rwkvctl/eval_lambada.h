// rwkvctl eval lambada: does the model know the last word of a passage? As RWKV's own evaluation does it: id 0 comes
// first, the last word with the blank before it is the target, and it is right when each of its tokens is the argmax.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "services/rwkvctl/eval_tokens.h"
#include "services/rwkvctl/json.h"
#include "services/rwkvctl/progress_bar.h"

namespace rwkv::rwkvctl {

struct LambadaExample {
  std::string context;
  std::string target;  // " word"
};

struct LambadaResult {
  uint64_t examples = 0;
  uint64_t correct = 0;
  double nats = 0;  // -sum of log p(target | context)

  double Accuracy() const { return static_cast<double>(correct) / static_cast<double>(examples); }
  double Perplexity() const;  // Per word.
};

// One {"text": "..."} a line; empty lines are skipped. kInvalidArgument names the line; no line at all is one, too.
absl::StatusOr<std::vector<LambadaExample>> ParseLambada(absl::string_view jsonl);

// `parallel` examples at a time, >= 1; the result is the same, bit for bit, whatever it is.
absl::StatusOr<LambadaResult> EvaluateLambada(const EvalModel& model, const std::vector<LambadaExample>& examples,
                                              uint32_t parallel, ProgressBar& progress);

// {"examples", "correct", "accuracy", "perplexity"}
Json LambadaToJson(const LambadaResult& result);
std::string LambadaToTable(const LambadaResult& result);

}  // namespace rwkv::rwkvctl
