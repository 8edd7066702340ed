// Token ids to the first hidden state:
//   x[t] = LN(embedding[token[t]]; weight, bias)          ln0, see layer_norm.h; eps inside the root
// Without weight and bias the row is taken as it is (files whose table is already fused with ln0).
// Source: BlinkDL/RWKV-LM RWKV-v7/rwkv_v7_demo_rnn.py, forward; arXiv:2503.14456 appendix E.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/base/stream.h"
#include "kernels/base/weight.h"

namespace rwkv::kernels {

struct EmbedArgs {
  int64_t rows = 0;                   // tokens, >= 1
  const int32_t* tokens = nullptr;    // [rows], each in [0, V): device memory, so the caller has checked them
  const Weight* embedding = nullptr;  // [V, D], loaded by the device for WeightUse::kRows
  const float* weight = nullptr;      // [D], or null together with bias: no layer norm
  const float* bias = nullptr;        // [D]
  float epsilon = 1e-5f;              // >= 0
  float* x = nullptr;                 // [rows, D], out; overlaps no input
};

// kInvalidArgument: size < 1, null or misaligned pointer (nothing is written then). Stateless and thread-safe, but for
// the stream. Held to reference::Embed by conformance.
using EmbedOp = absl::Status(const EmbedArgs& args, Stream& stream);

// The part of the contract that every backend checks before it computes.
absl::Status Validate(const EmbedArgs& args);

}  // namespace rwkv::kernels
