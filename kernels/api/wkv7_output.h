// RWKV-7: from the recurrence's read-out to the input of the output projection. Per row and head:
//   z = (y - mean) / sqrt(var + eps) * ln_weight + ln_bias         group norm ln_x, one group a head, biased variance
//   z = z + (sum_j r[j] * k[j] * bonus[j]) * v                     bonus for the current token, after the norm
//   out = z * g                                                    gate
// k and v as wkv7_prepare.h left them. Source: BlinkDL/RWKV-LM RWKV-v7/rwkv_v7_demo_rnn.py, time_mixing.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/base/stream.h"

namespace rwkv::kernels {

struct Wkv7OutputArgs {
  int64_t rows = 0;                  // >= 1
  int64_t heads = 0;                 // H >= 1
  int64_t head_size = 0;             // N >= 1
  const float* ln_weight = nullptr;  // [H, N]  ln_x.weight
  const float* ln_bias = nullptr;    // [H, N]  ln_x.bias
  const float* bonus = nullptr;      // [H, N]  r_k
  float epsilon = 64e-5f;            // 1e-5 * head_size_divisor^2, and the divisor is 8 whatever N is
  const float* y = nullptr;          // [rows, H, N], from Wkv7
  const float* r = nullptr;          // [rows, H, N]
  const float* k = nullptr;          // [rows, H, N]
  const float* v = nullptr;          // [rows, H, N]
  const float* g = nullptr;          // [rows, H, N]
  float* out = nullptr;              // [rows, H, N], out; may be y
};

// kInvalidArgument: size < 1, null or misaligned pointer, epsilon negative or NaN.
// Stateless and thread-safe, but for the stream. Held to reference::Wkv7Output by conformance.
using Wkv7OutputOp = absl::Status(const Wkv7OutputArgs& args, Stream& stream);

absl::Status Validate(const Wkv7OutputArgs& args);

}  // namespace rwkv::kernels
