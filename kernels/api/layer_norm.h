// Layer norm over the last dimension:
//   y[t] = (x[t] - mean) / sqrt(var + eps) * weight + bias      var is the biased variance, mean((x - mean)^2)
// Source: PyTorch nn.LayerNorm; ln1, ln2 and ln_out of RWKV use eps = 1e-5.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/base/stream.h"

namespace rwkv::kernels {

struct LayerNormArgs {
  int64_t rows = 0;               // >= 1
  int64_t width = 0;              // D >= 1
  const float* x = nullptr;       // [rows, D]
  const float* weight = nullptr;  // [D]
  const float* bias = nullptr;    // [D]
  float epsilon = 1e-5f;          // >= 0
  float* y = nullptr;             // [rows, D], out; may be x itself, else overlaps no input
};

// kInvalidArgument: size < 1, null or misaligned pointer, epsilon negative or NaN.
// Stateless and thread-safe, but for the stream. Held to reference::LayerNorm by conformance.
using LayerNormOp = absl::Status(const LayerNormArgs& args, Stream& stream);

absl::Status Validate(const LayerNormArgs& args);

}  // namespace rwkv::kernels
