// RWKV-7a and 7b: a small matrix of each row's own, applied to the row:
//   y[t][j] = sum_i x[t][i] * E[t][i][j]
// The channel mix gates its hidden units with it: x = (normalised input) s1, hidden = hidden * (y s2 + s0), and E[t] is
// the token's row of a table.
// Source: BlinkDL/RWKV-LM RWKV-v7/rwkv_v7a_demo.py, channel mixing: s_emb, with the table merged at load.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/base/stream.h"

namespace rwkv::kernels {

struct DeepEmbedArgs {
  int64_t rows = 0;                 // >= 1
  int64_t width = 0;                // n >= 1; 32 in published models
  const float* matrices = nullptr;  // [rows, n, n]
  const float* x = nullptr;         // [rows, n]
  float* y = nullptr;               // [rows, n], out; overlaps no input
};

// kInvalidArgument: size < 1, null or misaligned pointer. Stateless and thread-safe, but for the stream. Held to
// reference::DeepEmbed by conformance.
using DeepEmbedOp = absl::Status(const DeepEmbedArgs& args, Stream& stream);

absl::Status Validate(const DeepEmbedArgs& args);

}  // namespace rwkv::kernels
