// Token shift: each of K outputs mixes a token's (layer-normed) input with that of the token before it, per channel:
//   y_m[t] = x[t] + (previous[t] - x[t]) * (mix_m + mix_delta_m[t])                 m = 0 .. K-1
// previous[t] is x[t-1] of the same sequence, and for the first row of a span the sequence's shift state, which becomes
// the span's last x. (RWKV-6 and 7: mix near 1 is the previous token. RWKV-4 and 5 store 1 - mix.)
// RWKV-6's data-dependent shift is two calls over the same rows: the first, which keeps the state, makes the input of
// the low-rank products that the second adds to its mixes.
// Source: BlinkDL/RWKV-LM RWKV-v7/rwkv_v7_demo_rnn.py, time_mixing and channel_mixing: x + (x_prev - x) * x_m;
// RWKV-v5/rwkv_v6_demo.py, time_mixing: x + sx * (time_maa_m + m).
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/api/sequence_span.h"
#include "kernels/base/stream.h"

namespace rwkv::kernels {

constexpr int64_t kMaxTokenShiftOutputs = 8;

struct TokenShiftArgs {
  int64_t rows = 0;                     // >= 1
  int64_t width = 0;                    // D >= 1
  const SequenceSpan* spans = nullptr;  // [span_count], see sequence_span.h
  int64_t span_count = 0;               // >= 1
  float* state_pool = nullptr;          // slot s: D floats from state_pool + s * state_stride; updated in place
  int64_t state_stride = 0;             // floats, >= D
  int64_t state_slots = 0;              // >= 1
  const float* x = nullptr;             // [rows, D]
  int64_t outputs = 0;                  // K in [1, kMaxTokenShiftOutputs]: 6 in a time mix, 1 in a channel mix
  const float* mix[kMaxTokenShiftOutputs] = {};        // K times [D]
  const float* mix_delta[kMaxTokenShiftOutputs] = {};  // K times [rows, D], or null: nothing is added to that mix
  bool keep_state = false;                             // The states stay as they are: another call follows.
  float* y[kMaxTokenShiftOutputs] = {};  // K times [rows, D], out; y[m] may be mix_delta[m], else overlap nothing
};

// kInvalidArgument: size < 1, null or misaligned pointer, spans that do not cover the rows in order, a slot outside the
// pool or given twice; no state has changed then. Stateless and thread-safe, but for the stream and the states it
// updates. Held to reference::TokenShift by conformance.
using TokenShiftOp = absl::Status(const TokenShiftArgs& args, Stream& stream);

absl::Status Validate(const TokenShiftArgs& args);

}  // namespace rwkv::kernels
