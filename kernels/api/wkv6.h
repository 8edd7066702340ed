// The time-mix recurrence of RWKV-5 and 6. Per sequence and head, with wkv state S, one token does
//   y[i]    = sum_j S[i][j] * r[j] + (sum_j r[j] * k[j] * bonus[j]) * v[i]       read, before the update
//   S[i][j] = S[i][j] * w[j] + v[i] * k[j]                                       decay, write
// i: value channel, j: key channel. The decay w is the token's own in RWKV-6 and a constant of the model in RWKV-5.
// Source: arXiv:2404.05892; BlinkDL/RWKV-LM RWKV-v5/rwkv_v6_demo.py, time_mixing.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/api/sequence_span.h"
#include "kernels/base/stream.h"

namespace rwkv::kernels {

struct Wkv6Args {
  int64_t rows = 0;                     // >= 1, tokens of all spans
  int64_t heads = 0;                    // H >= 1
  int64_t head_size = 0;                // N >= 1
  const SequenceSpan* spans = nullptr;  // [span_count], see sequence_span.h
  int64_t span_count = 0;               // >= 1
  float* state_pool = nullptr;          // slot s: [H, N(i), N(j)] from state_pool + s * state_stride; updated in place
  int64_t state_stride = 0;             // floats, >= H * N * N
  int64_t state_slots = 0;              // >= 1
  const float* r = nullptr;             // [rows, H, N], receptance
  const float* w = nullptr;             // [rows, H, N] or [H, N], the decay itself, exp(-exp(.)), in [0, 1]
  bool constant_decay = false;          // w is [H, N], for every row.
  const float* k = nullptr;             // [rows, H, N]
  const float* v = nullptr;             // [rows, H, N]
  const float* bonus = nullptr;         // [H, N], time_faaaa (u)
  float* y = nullptr;                   // [rows, H, N], out; overlaps nothing
};

// kInvalidArgument: size < 1, null or misaligned pointer, spans that do not cover the rows in order, a slot outside the
// pool or given twice; no state has changed then. Stateless and thread-safe, but for the stream and the states it
// updates. Held to reference::Wkv6 by conformance.
using Wkv6Op = absl::Status(const Wkv6Args& args, Stream& stream);

absl::Status Validate(const Wkv6Args& args);

}  // namespace rwkv::kernels
