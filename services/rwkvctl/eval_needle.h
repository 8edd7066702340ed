// rwkvctl eval needle: a pass key said once, somewhere in a long text of no interest, and asked for at its end.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "services/rwkvctl/eval_tokens.h"
#include "services/rwkvctl/json.h"
#include "services/rwkvctl/progress_bar.h"

namespace rwkv::rwkvctl {

struct NeedleOptions {
  std::vector<uint32_t> lengths = {256, 512, 1024, 2048};  // Tokens up to the answer, id 0 included.
  std::vector<uint32_t> depths = {0, 25, 50, 75, 100};     // Where the key stands, in percent of the filler.
  uint32_t trials = 3;                                     // Keys per length and depth; >= 1.
  std::string haystack;  // The filler; empty: a few plain sentences. Repeated as needed.
};

struct NeedleCell {
  uint32_t length = 0;
  uint32_t depth = 0;
  uint32_t trials = 0;
  uint32_t correct = 0;
};

// By length, then depth. Right is an answer that begins with the key. The keys are the same in every run. `parallel`
// trials at a time, >= 1; the cells are the same whatever it is.
// kInvalidArgument: a length leaves no room for filler; else the router's errors.
absl::StatusOr<std::vector<NeedleCell>> EvaluateNeedle(const EvalModel& model, const NeedleOptions& options,
                                                       uint32_t parallel, ProgressBar& progress);

// {"cells": [{"length", "depth", "trials", "correct"}], "accuracy"}
Json NeedleToJson(const std::vector<NeedleCell>& cells);
// Accuracy in percent, a line per length, a column per depth.
std::string NeedleToTable(const std::vector<NeedleCell>& cells);

}  // namespace rwkv::rwkvctl
