// What is asked: how long each prompt and answer is, in which conversation, and, in an open loop, when.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "services/rwkvctl/load/arrivals.h"
#include "services/rwkvctl/load/random.h"

namespace rwkv::rwkvctl {

// Both ends included.
struct LengthRange {
  uint32_t first = 0;
  uint32_t last = 0;
};

// "64" or "16..512", up to 4,194,304; kInvalidArgument or kOutOfRange for anything else, and for lengths below `min`.
absl::StatusOr<LengthRange> ParseLengthRange(absl::string_view text, uint32_t min);

// A line of a trace.
struct TraceRequest {
  absl::Duration due;
  uint32_t prompt_tokens = 0;
  uint32_t max_tokens = 0;
  absl::optional<size_t> conversation;  // Numbered as they first come.
};

struct Trace {
  std::vector<TraceRequest> requests;
  size_t conversations = 0;
};

// One {"offset": seconds, "prompt_tokens": N, "max_tokens": N, "session": "name"} a line, by rising offset; without
// "session" a request stands alone. Other fields and empty lines are skipped. kInvalidArgument names the line.
absl::StatusOr<Trace> ParseTrace(absl::string_view jsonl);

struct PlannedRequest {
  uint64_t index = 0;
  absl::optional<absl::Duration> due;  // Since the beginning; unset: as soon as somebody is free to send it.
  uint32_t prompt_tokens = 0;
  uint32_t max_tokens = 0;
  absl::optional<size_t> conversation;  // Of a trace.
};

struct WorkloadOptions {
  uint64_t seed = 0;
  absl::optional<ArrivalOptions> arrivals;  // Its seed is this one's. Unset: a closed loop, or a trace.
  absl::optional<Trace> trace;
  LengthRange prompt_tokens;  // Uniform; unused with a trace, as the next.
  LengthRange max_tokens;
  absl::optional<uint64_t> requests;        // At most so many.
  absl::optional<absl::Duration> duration;  // None that is due at or after this.
};

// The requests in their order. What request i is depends on the options and i alone. Not thread-safe.
class Workload {
 public:
  explicit Workload(WorkloadOptions options);

  absl::optional<PlannedRequest> Next();

 private:
  const WorkloadOptions options_;
  absl::optional<Arrivals> arrivals_;
  uint64_t next_ = 0;
};

// The prompt of request `index`: ids in [1, vocab_size), each as likely; 0 is the end of text. vocab_size >= 2.
std::vector<uint32_t> RandomPrompt(uint64_t seed, uint64_t index, uint32_t tokens, uint32_t vocab_size);

}  // namespace rwkv::rwkvctl
