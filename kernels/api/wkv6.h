// The core of the time mix of RWKV-5 and 6, from its products to the input of the output projection. Per sequence and
// head, with wkv state S, one token does
//   o[i]    = sum_j S[i][j] * r[j] + (sum_j r[j] * k[j] * bonus[j]) * v[i]       read, before the update
//   S[i][j] = S[i][j] * w[j] + v[i] * k[j]                                       decay, write
// i: value channel, j: key channel. The decay w is the token's own in RWKV-6 and a constant of the model in RWKV-5.
// Then per row and head
//   y = ((o - mean) / sqrt(var + eps) * ln_weight + ln_bias) * gate   group norm ln_x, biased variance; without a gate
//                                                                     (RWKV-5.0) not multiplied
// Source: arXiv:2404.05892; BlinkDL/RWKV-LM RWKV-v5/rwkv_v6_demo.py, time_mixing: F.group_norm(x, eps = 64e-5) * g.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/api/state_tensor.h"
#include "kernels/api/step_rows.h"
#include "kernels/base/stream.h"

namespace rwkv::kernels {

struct Wkv6Args {
  const StepRows* step = nullptr;
  int64_t heads = 0;                 // H >= 1
  int64_t head_size = 0;             // N >= 1
  StateTensor state;                 // [H, N(i), N(j)] a slot; updated in place
  const float* bonus = nullptr;      // [H, N], time_faaaa (u)
  const float* ln_weight = nullptr;  // [H, N]  ln_x.weight
  const float* ln_bias = nullptr;    // [H, N]  ln_x.bias
  float epsilon = 64e-5f;       // 1e-5 * head_size_divisor^2, and the divisor is 8 whatever N is; rwkv.cpp: 1e-5 in v5
  const float* r = nullptr;     // [rows, H, N], receptance
  const float* w = nullptr;     // [rows, H, N] or [H, N], the decay itself, exp(-exp(.)), in [0, 1]
  bool constant_decay = false;  // w is [H, N], for every row.
  const float* k = nullptr;     // [rows, H, N]
  const float* v = nullptr;     // [rows, H, N]
  const float* gate = nullptr;  // [rows, H, N], after its activation, or null
  float* y = nullptr;           // [rows, H, N], out; overlaps nothing
};

// kInvalidArgument: size < 1, null or misaligned pointer, epsilon negative or NaN; no state has changed then.
// Stateless and thread-safe, but for the stream and the states it updates. Held to reference::Wkv6 by conformance.
using Wkv6Op = absl::Status(const Wkv6Args& args, Stream& stream);

absl::Status Validate(const Wkv6Args& args);

}  // namespace rwkv::kernels
