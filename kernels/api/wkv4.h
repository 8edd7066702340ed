// The RWKV-4 time-mix recurrence. Per sequence and channel, with numerator aa and denominator bb of a weighted mean,
// both scaled by exp(-pp) where pp is the largest exponent so far, one token does
//   q   = max(pp, bonus + k)
//   wkv = (exp(pp - q) * aa + exp(bonus + k - q) * v) / (exp(pp - q) * bb + exp(bonus + k - q))
//   q'  = max(pp + decay, k)
//   aa  = exp(pp + decay - q') * aa + exp(k - q') * v
//   bb  = exp(pp + decay - q') * bb + exp(k - q')
//   pp  = q'
//   y   = r * wkv
// A fresh state is aa = bb = 0 and pp = -1e30: a true -inf would give NaN.
// Source: BlinkDL/ChatRWKV RWKV_in_150_lines.py, time_mixing.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/api/sequence_span.h"
#include "kernels/api/state_pool.h"
#include "kernels/base/stream.h"

namespace rwkv::kernels {

struct Wkv4Args {
  int64_t rows = 0;                     // >= 1, tokens of all spans
  int64_t width = 0;                    // A >= 1, channels
  const SequenceSpan* spans = nullptr;  // [span_count], see sequence_span.h
  int64_t span_count = 0;               // >= 1
  int64_t state_slots = 0;              // >= 1
  StatePool aa;                         // [A] a slot, like bb and pp; updated in place
  StatePool bb;
  StatePool pp;
  const float* decay = nullptr;  // [A], -exp(time_decay), below 0
  const float* bonus = nullptr;  // [A], time_first
  const float* r = nullptr;      // [rows, A], receptance after its sigmoid
  const float* k = nullptr;      // [rows, A]
  const float* v = nullptr;      // [rows, A]
  float* y = nullptr;            // [rows, A], out; may be r, k or v
};

// kInvalidArgument: size < 1, null or misaligned pointer, spans that do not cover the rows in order, a slot outside the
// pool or given twice; no state has changed then. Stateless and thread-safe, but for the stream and the states it
// updates. Held to reference::Wkv4 by conformance.
using Wkv4Op = absl::Status(const Wkv4Args& args, Stream& stream);

absl::Status Validate(const Wkv4Args& args);

}  // namespace rwkv::kernels
