// RWKV-7a and 7b: a small matrix of the token's own, E = reshape(table[token[t]], [n, n]), applied to a row:
//   y[t][j] = sum_i x[t][i] * E[i][j]
// The channel mix gates its hidden units with it: x = (normalised input) s1, hidden = hidden * (y s2 + s0).
// Source: BlinkDL/RWKV-LM RWKV-v7/rwkv_v7a_demo.py, channel mixing: s_emb, with the table merged at load.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/base/matrix.h"
#include "kernels/base/stream.h"

namespace rwkv::kernels {

struct DeepEmbedArgs {
  int64_t rows = 0;                 // >= 1
  int64_t width = 0;                // n >= 1; 32 in published models
  const int32_t* tokens = nullptr;  // [rows], each in [0, table.rows)
  MatrixView table;                 // [V, n * n]
  const float* x = nullptr;         // [rows, n]
  float* y = nullptr;               // [rows, n], out; overlaps no input
};

// kInvalidArgument: size < 1, null or misaligned pointer, a table of another width, token outside the vocabulary.
// kResourceExhausted: no memory for the stream's workspace. Stateless and thread-safe, but for the stream. Held to
// reference::DeepEmbed by conformance.
using DeepEmbedOp = absl::Status(const DeepEmbedArgs& args, Stream& stream);

absl::Status Validate(const DeepEmbedArgs& args);

}  // namespace rwkv::kernels
