// The core of RWKV-7's time mix, from its products to the input of the output projection, in one pass over the state.
// Per row and channel, with the low-rank products as they come out of their second matrix:
//   w    = exp(-e^(-1/2) * sigmoid(decay_bias + decay_lora))                       decay, in (0.5452, 1)
//   iclr = sigmoid(iclr_bias + iclr_lora)                                          in-context learning rate
//   v'   = v + (v_first - v) * sigmoid(value_gate_bias + value_gate_lora)          value residual; in layer 0 v' = v
//   kappa_hat = k * k_k / max(|k * k_k| over the head, 1e-12)                      removal key
//   k'   = k * (1 + (iclr - 1) * k_a),   a = -kappa_hat,   b = kappa_hat * iclr
// per sequence and head, with wkv state S, i being a value channel and j a key channel,
//   sa[i]   = sum_j S[i][j] * a[j]                            recall under the removal key
//   S[i][j] = S[i][j] * w[j] + v'[i] * k'[j] + sa[i] * b[j]   decay, write, correct
//   o[i]    = sum_j S[i][j] * r[j]                            read, after the update
// and per row and head
//   z = (o - mean) / sqrt(var + eps) * ln_weight + ln_bias    group norm ln_x, one group a head, biased variance
//   y = (z + (sum_j r[j] * k'[j] * bonus[j]) * v') * g        bonus, gate
// Source: arXiv:2503.14456 section 4; BlinkDL/RWKV-LM RWKV-v7/rwkv_v7_demo_rnn.py, time_mixing (0.606531 there).
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/api/state_tensor.h"
#include "kernels/api/step_rows.h"
#include "kernels/base/stream.h"

namespace rwkv::kernels {

// Channels are A = H * N. Vectors of weights are named as in the checkpoint behind the `//`.
struct Wkv7Args {
  const StepRows* step = nullptr;
  int64_t heads = 0;                  // H >= 1
  int64_t head_size = 0;              // N >= 1: 64 in published models; 8, 16, 32 and odd sizes work
  StateTensor state;                  // [H, N(i), N(j)] a slot; updated in place
  const float* decay_bias = nullptr;  // [A]  w0
  const float* iclr_bias = nullptr;   // [A]  a0
  const float* k_k = nullptr;         // [A]  k_k
  const float* k_a = nullptr;         // [A]  k_a
  const float* bonus = nullptr;       // [A]  r_k
  const float* ln_weight = nullptr;   // [A]  ln_x.weight
  const float* ln_bias = nullptr;     // [A]  ln_x.bias
  float epsilon = 64e-5f;             // 1e-5 * head_size_divisor^2, and the divisor is 8 whatever N is
  const float* r = nullptr;           // [rows, A]  receptance
  const float* k = nullptr;           // [rows, A]
  const float* v = nullptr;           // [rows, A]
  const float* g = nullptr;           // [rows, A]  sigmoid(x_g g1) g2
  const float* decay_lora = nullptr;  // [rows, A]  tanh(x_w w1) w2
  const float* iclr_lora = nullptr;   // [rows, A]  (x_a a1) a2
  // All three, or in layer 0 none: its v is what later layers get as v_first.
  const float* value_gate_bias = nullptr;  // [A]  v0
  const float* value_gate_lora = nullptr;  // [rows, A]  (x_v v1) v2
  const float* v_first = nullptr;          // [rows, A]
  float* y = nullptr;                      // [rows, A], out; overlaps nothing
};

// A key of zeros gives kappa_hat = 0, not NaN. kInvalidArgument: size < 1, null or misaligned pointer, one or two of
// the value residual's three inputs; no state has changed then. Stateless and thread-safe, but for the stream and the
// states it updates. Held to reference::Wkv7 by conformance.
using Wkv7Op = absl::Status(const Wkv7Args& args, Stream& stream);

absl::Status Validate(const Wkv7Args& args);

}  // namespace rwkv::kernels
