// The RWKV-7 time-mix recurrence. Per sequence and head, with wkv state S, one token does
//   sa[i]   = sum_j S[i][j] * a[j]                           recall under the removal key
//   S[i][j] = S[i][j] * w[j] + v[i] * k[j] + sa[i] * b[j]    decay, write, correct
//   y[i]    = sum_j S[i][j] * r[j]                           read, after the update
// i: value channel, j: key channel; a = -kappa_hat, b = kappa_hat * iclr.
// Source: arXiv:2503.14456; BlinkDL/RWKV-LM RWKV-v7/rwkv_v7_demo_rnn.py, time_mixing.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/api/sequence_span.h"
#include "kernels/base/stream.h"

namespace rwkv::kernels {

struct Wkv7Args {
  int64_t rows = 0;                     // >= 1, tokens of all spans
  int64_t heads = 0;                    // H >= 1
  int64_t head_size = 0;                // N >= 1: 64 in published models; 8, 16, 32 and odd sizes work
  const SequenceSpan* spans = nullptr;  // [span_count], see sequence_span.h
  int64_t span_count = 0;               // >= 1
  float* state_pool = nullptr;          // slot s: [H, N(i), N(j)] from state_pool + s * state_stride; updated in place
  int64_t state_stride = 0;             // floats, >= H * N * N
  int64_t state_slots = 0;              // >= 1
  const float* r = nullptr;             // [rows, H, N], receptance
  const float* w = nullptr;             // [rows, H, N], the decay itself: no exp() left to do
  const float* k = nullptr;             // [rows, H, N]
  const float* v = nullptr;             // [rows, H, N]
  const float* a = nullptr;             // [rows, H, N]
  const float* b = nullptr;             // [rows, H, N]
  float* y = nullptr;                   // [rows, H, N], out; overlaps nothing
};

// kInvalidArgument: size < 1, null or misaligned pointer, spans that do not cover the rows in order, a slot outside the
// pool or given twice; no state has changed then. Stateless and thread-safe, but for the stream and the states it
// updates. Held to reference::Wkv7 by conformance.
using Wkv7Op = absl::Status(const Wkv7Args& args, Stream& stream);

absl::Status Validate(const Wkv7Args& args);

}  // namespace rwkv::kernels
