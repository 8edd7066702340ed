// RWKV-5 and 6: from the recurrence's read-out to the input of the output projection. Per row and head:
//   z = (y - mean) / sqrt(var + eps) * weight + bias         group norm ln_x, one group a head, biased variance
//   out = z * gate                                           without a gate (RWKV-5.0): out = z
// Source: BlinkDL/RWKV-LM RWKV-v5/rwkv_v6_demo.py, time_mixing: F.group_norm(x, eps = 64e-5) * g.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/base/stream.h"

namespace rwkv::kernels {

struct GroupNormArgs {
  int64_t rows = 0;               // >= 1
  int64_t heads = 0;              // H >= 1
  int64_t head_size = 0;          // N >= 1
  const float* y = nullptr;       // [rows, H, N]
  const float* weight = nullptr;  // [H, N]  ln_x.weight
  const float* bias = nullptr;    // [H, N]  ln_x.bias
  float epsilon = 64e-5f;       // 1e-5 * head_size_divisor^2, and the divisor is 8 whatever N is; rwkv.cpp: 1e-5 in v5
  const float* gate = nullptr;  // [rows, H, N], after its activation, or null
  float* out = nullptr;         // [rows, H, N], out; may be y or gate
};

// kInvalidArgument: size < 1, null or misaligned pointer, epsilon negative or NaN.
// Stateless and thread-safe, but for the stream. Held to reference::GroupNorm by conformance.
using GroupNormOp = absl::Status(const GroupNormArgs& args, Stream& stream);

absl::Status Validate(const GroupNormArgs& args);

}  // namespace rwkv::kernels
