// rwkvctl eval context: does the loss fall, or at least not rise, with the position in the text?
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "services/rwkvctl/eval_tokens.h"
#include "services/rwkvctl/json.h"
#include "services/rwkvctl/progress_bar.h"

namespace rwkv::rwkvctl {

struct ContextOptions {
  uint32_t tokens = 8192;  // Length of a window, id 0 not counted; >= 1.
  uint32_t windows = 32;   // At most so many, from the start of the text on; >= 1.
};

// The tokens at positions [begin, end) of every window; position 0 is the first token after id 0.
struct ContextBucket {
  uint64_t begin = 0;
  uint64_t end = 0;
  double nats_per_token = 0;
  double standard_error = 0;  // Of that mean, from its spread over the windows; 0 with one window.
};

struct ContextResult {
  uint64_t tokens = 0;  // Of a window.
  uint64_t windows = 0;
  std::vector<ContextBucket> buckets;  // [0, 64), then each to twice the last one's end.
  // The most that a bucket lies above one before it, 0 if none does, and the standard error of that difference over the
  // windows, each compared with itself; 0 with one window.
  double rise_nats = 0;
  double rise_standard_error = 0;
};

// Cuts the text into windows of options.tokens, feeds each from a fresh state after id 0, and takes means.
// kInvalidArgument: the text, not empty, has not even one window; else the router's errors.
absl::StatusOr<ContextResult> EvaluateContext(const EvalModel& model, const std::string& text,
                                              const ContextOptions& options, ProgressBar& progress);

// {"tokens", "windows", "buckets": [{"begin", "end", "nats_per_token", "standard_error"}], "rise_nats",
//  "rise_standard_error"}
Json ContextToJson(const ContextResult& result);
std::string ContextToTable(const ContextResult& result);

}  // namespace rwkv::rwkvctl
