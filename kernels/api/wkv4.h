// The RWKV-4 time-mix recurrence. Per sequence and channel, with numerator aa and denominator bb of a weighted mean,
// both scaled by exp(-pp) where pp is the largest exponent so far, one token does
//   q   = max(pp, bonus + k)
//   wkv = (exp(pp - q) * aa + exp(bonus + k - q) * v) / (exp(pp - q) * bb + exp(bonus + k - q))
//   y   = r * wkv
//   q'  = max(pp + decay, k)
//   aa  = exp(pp + decay - q') * aa + exp(k - q') * v          bb likewise with 1 for v
//   pp  = q'
// A fresh state is aa = bb = 0 and pp = -1e30: a true -inf would give NaN.
// Source: BlinkDL/ChatRWKV RWKV_in_150_lines.py, time_mixing.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/api/state_tensor.h"
#include "kernels/api/step_rows.h"
#include "kernels/base/stream.h"

namespace rwkv::kernels {

struct Wkv4Args {
  const StepRows* step = nullptr;
  int64_t width = 0;  // A >= 1, channels
  StateTensor aa;     // [A] a slot, like bb and pp; updated in place
  StateTensor bb;
  StateTensor pp;
  const float* decay = nullptr;  // [A], -exp(time_decay), below 0
  const float* bonus = nullptr;  // [A], time_first
  const float* r = nullptr;      // [rows, A], receptance after its sigmoid
  const float* k = nullptr;      // [rows, A]
  const float* v = nullptr;      // [rows, A]
  float* y = nullptr;            // [rows, A], out; may be r, k or v
};

// kInvalidArgument: size < 1, null or misaligned pointer; no state has changed then. Stateless and thread-safe, but for
// the stream and the states it updates. Held to reference::Wkv4 by conformance.
using Wkv4Op = absl::Status(const Wkv4Args& args, Stream& stream);

absl::Status Validate(const Wkv4Args& args);

}  // namespace rwkv::kernels
