// RWKV-7: from the projections of a time mix to the inputs of its recurrence (wkv7.h). Per row and channel, with the
// low-rank products as they come out of their second matrix:
//   w     = exp(-e^(-1/2) * sigmoid(decay_bias + decay_lora))                      decay, in (0.5452, 1)
//   iclr  = sigmoid(iclr_bias + iclr_lora)                                         in-context learning rate
//   v     = v + (v_first - v) * sigmoid(value_gate_bias + value_gate_lora)         value residual; not in layer 0
//   kappa_hat = k * k_k / max(|k * k_k| over the head, 1e-12)                      removal key, from k as it came in
//   k     = k * (1 + (iclr - 1) * k_a)
//   a     = -kappa_hat,  b = kappa_hat * iclr
// Source: arXiv:2503.14456 section 4; BlinkDL/RWKV-LM RWKV-v7/rwkv_v7_demo_rnn.py, time_mixing (0.606531 there).
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/base/stream.h"

namespace rwkv::kernels {

// Channels are A = heads * head_size. Vectors of weights are named as in the checkpoint behind the `//`.
struct Wkv7PrepareArgs {
  int64_t rows = 0;                   // >= 1
  int64_t heads = 0;                  // H >= 1
  int64_t head_size = 0;              // N >= 1
  const float* decay_bias = nullptr;  // [A]  w0
  const float* iclr_bias = nullptr;   // [A]  a0
  const float* k_k = nullptr;         // [A]  k_k
  const float* k_a = nullptr;         // [A]  k_a
  const float* decay_lora = nullptr;  // [rows, A]  tanh(x_w w1) w2
  const float* iclr_lora = nullptr;   // [rows, A]  (x_a a1) a2
  // All three, or in layer 0 none: then v stays as it is (and is what later layers get as v_first).
  const float* value_gate_bias = nullptr;  // [A]  v0
  const float* value_gate_lora = nullptr;  // [rows, A]  (x_v v1) v2
  const float* v_first = nullptr;          // [rows, A]
  float* k = nullptr;                      // [rows, A], changed in place
  float* v = nullptr;                      // [rows, A], changed in place unless layer 0
  float* w = nullptr;                      // [rows, A], out; may be decay_lora
  float* a = nullptr;                      // [rows, A], out
  float* b = nullptr;                      // [rows, A], out; may be iclr_lora
};

// A key of zeros gives kappa_hat = 0, not NaN.
// kInvalidArgument: size < 1, null or misaligned pointer, one or two of the value residual's three inputs.
// Stateless and thread-safe, but for the stream. Held to reference::Wkv7Prepare by conformance.
using Wkv7PrepareOp = absl::Status(const Wkv7PrepareArgs& args, Stream& stream);

absl::Status Validate(const Wkv7PrepareArgs& args);

}  // namespace rwkv::kernels
