// What the products of a mix read: layer norm, then token shift, which mixes a token's normalised input with that of
// the token before it, per channel, for each of K products:
//   n[t]   = LN(x[t]; ln)                                              without weight and bias: n = x
//   y_m[t] = n[t] + (n[t-1] - n[t]) * (mix_m + mix_delta_m[t])         m = 0 .. K-1
// n[t-1] is of the same sequence, and for the first row of a span the sequence's shift state, which becomes the span's
// last n. (RWKV-6 and 7: mix near 1 is the previous token. RWKV-4 and 5 store 1 - mix.)
// RWKV-6's data-dependent shift is two calls over the same rows: the first, which keeps the state, makes n and the
// input of the low-rank products that the second, over n, adds to its mixes.
// Source: BlinkDL/RWKV-LM RWKV-v7/rwkv_v7_demo_rnn.py, time_mixing and channel_mixing: x + (x_prev - x) * x_m;
// RWKV-v5/rwkv_v6_demo.py, time_mixing: x + sx * (time_maa_m + m).
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/api/state_tensor.h"
#include "kernels/api/step_rows.h"
#include "kernels/base/stream.h"

namespace rwkv::kernels {

constexpr int64_t kMaxMixOutputs = 6;

struct MixInputArgs {
  const StepRows* step = nullptr;
  int64_t width = 0;                      // D >= 1
  const float* x = nullptr;               // [rows, D]
  const float* weight = nullptr;          // [D], or null together with bias: no layer norm
  const float* bias = nullptr;            // [D]
  float epsilon = 1e-5f;                  // >= 0
  StateTensor shift;                      // [D] a slot; updated in place
  bool keep_state = false;                // The states stay as they are: another call follows.
  float* normed = nullptr;                // [rows, D], out: n; or null
  int64_t outputs = 0;                    // K in [1, kMaxMixOutputs]: 6 in a time mix of RWKV-7, 1 in its channel mix
  const float* mix[kMaxMixOutputs] = {};  // K times [D]
  const float* mix_delta[kMaxMixOutputs] = {};  // K times [rows, D], or null: nothing is added to that mix
  float* y[kMaxMixOutputs] = {};  // K times [rows, D], out; y[m] may be mix_delta[m], else all outputs overlap nothing
};

// kInvalidArgument: size < 1, null or misaligned pointer; no state has changed then. kResourceExhausted: no memory for
// the stream's scratch memory. Stateless and thread-safe, but for the stream and the states it updates. Held to
// reference::MixInput by conformance.
using MixInputOp = absl::Status(const MixInputArgs& args, Stream& stream);

// The part of the contract that every backend checks before it computes.
absl::Status Validate(const MixInputArgs& args);

}  // namespace rwkv::kernels
