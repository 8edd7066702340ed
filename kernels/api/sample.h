// Draws a token from each of some rows of logits, so that only ids and the log-probabilities that somebody asked for
// leave the device. What is drawn, and every formula, is what services/worker/sampler/sampler.h says; the bits are those
// of that sampler, its plain twin. What it keeps between tokens comes as numbers: what the penalties take from a
// logit, and the random bits of the position.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/base/stream.h"

namespace rwkv::kernels {

constexpr int kMaxSampleLogprobs = 64;

// Of one id, or of a range: what a row changes its logits by.
struct SampleEdit {
  uint32_t id = 0;   // < V, or >= V: of nobody
  uint32_t end = 0;  // Of a range [id, end) that is never drawn; <= V.
  double value = 0;  // What is added to the logit (a bias, a float), or taken from it (a penalty).
};

// By what one row is drawn.
struct SampleRow {
  int64_t row = 0;                // of the logits
  float temperature = 0;          // 0: greedy
  float top_p = 1;                // 1: all
  float typical_p = 1;            // 1: all
  float min_p = 0;                // 0: all
  int32_t top_k = 0;              // 0: all
  float repetition_penalty = 1;   // Of ids that were seen.
  bool temperature_last = false;  // The order of RWKV_PIP.
  int32_t top_logprobs = 0;       // <= kMaxSampleLogprobs
  uint64_t random = 0;            // Uniform bits, of the seed and the position.
  // Its edits: biases [biases, seen), penalties of ids that were seen [seen, banned), banned ranges [banned, end). No
  // two of a kind name one id.
  int32_t biases = 0;
  int32_t seen = 0;
  int32_t banned = 0;
  int32_t end = 0;
};

struct SampleLogprob {
  uint32_t token = 0;
  float logprob = 0;
};

enum class SampleStatus : int32_t {
  kDrawn,
  kNotFinite,   // A logit is NaN or +inf.
  kNoLogit,     // Every logit is -inf.
  kOutOfRange,  // A penalty makes a logit NaN or infinite.
  kNoToken,     // Every token is banned or at -inf.
};

struct SampleResult {
  SampleStatus status = SampleStatus::kDrawn;  // If another, nothing else counts.
  uint32_t token = 0;
  float logprob = 0;
  int32_t top_count = 0;                       // The smaller of top_logprobs and V.
  SampleLogprob top[kMaxSampleLogprobs] = {};  // Falling; ties by rising id.
};

// Rows, edits and results may lie in pinned memory.
struct SampleArgs {
  int64_t count = 0;                  // rows that are drawn from, >= 1
  int64_t vocab = 0;                  // V >= 1
  const float* logits = nullptr;      // [rows, V]
  const SampleRow* rows = nullptr;    // [count]
  const SampleEdit* edits = nullptr;  // of all rows; null if none has any
  float* adjusted = nullptr;          // [count, V], scratch: logits after the edits
  SampleResult* results = nullptr;    // [count], out
};

// kInvalidArgument: size < 1, null or misaligned pointer (nothing is written then). Stateless and thread-safe, but for
// the stream.
using SampleOp = absl::Status(const SampleArgs& args, Stream& stream);

// The part of the contract that every backend checks before it computes.
absl::Status Validate(const SampleArgs& args);

}  // namespace rwkv::kernels
