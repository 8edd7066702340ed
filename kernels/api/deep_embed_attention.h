// RWKV-7b: causal attention over every token of the sequence so far, whose keys and values are rebuilt from a cache of
// short rows and tables of the token ids. Per sequence, for a row at position p and all cached t <= p:
//   K_t = (key_cache[t] k2) * k_emb[id_t],    K_t = K_t + (K_{t-1} - K_t) * x_k        K_{-1} = 0, unshifted K_{t-1}
//   V_t = tanh(value_cache[t] v2) * v_emb[id_t],  V_t = V_t + (V_{t-1} - V_t) * x_v
//   q   = q_p + (q_{p-1} - q_p) * x_q                                                  q_{-1} = 0, unshifted q_{p-1}
//   q, K_t, V_t = LN(q; lnq), LN(K_t; lnk), LN(V_t; lnv)
//   y  += sum_t softmax_t(64 tanh(q . K_t / 1024)) V_t
// A slot's state is a fixed set of float tensors: what is cached of `capacity` tokens at most, how many, and q_{p-1}.
// Source: BlinkDL/RWKV-LM RWKV-v7/rwkv_v7b_demo.py.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/api/state_tensor.h"
#include "kernels/api/step_rows.h"
#include "kernels/base/stream.h"
#include "kernels/base/weight.h"

namespace rwkv::kernels {

struct DeepEmbedAttentionArgs {
  const StepRows* step = nullptr;
  int64_t vocabulary = 0;  // V in [1, 2^24], so that a float holds every id exactly
  int64_t capacity = 0;    // tokens a slot's caches hold, in [1, 2^24], so that a float counts them exactly
  // Updated in place. A fresh state is zeros.
  StateTensor length;       // [1], tokens cached: a whole number, at most capacity - row_count of the slot's span
  StateTensor token_cache;  // [capacity], ids as floats, whole numbers below V
  StateTensor key_cache;    // [capacity, R]
  StateTensor value_cache;  // [capacity, R]
  StateTensor q_previous;   // [Q], q of the last row
  // Weights; R, Q and D are the sizes of k2 and v2.
  const Weight* k2 = nullptr;         // [Q, R]
  const Weight* v2 = nullptr;         // [D, R]
  const float* k_emb = nullptr;       // [V, Q], merged
  const float* v_emb = nullptr;       // [V, D], merged
  const float* x_q = nullptr;         // [Q]
  const float* x_k = nullptr;         // [Q]
  const float* x_v = nullptr;         // [D]
  const float* lnq_weight = nullptr;  // [Q]
  const float* lnq_bias = nullptr;    // [Q]
  const float* lnk_weight = nullptr;  // [Q]
  const float* lnk_bias = nullptr;    // [Q]
  const float* lnv_weight = nullptr;  // [D]
  const float* lnv_bias = nullptr;    // [D]
  float epsilon = 1e-5f;              // of the three layer norms, >= 0

  // Of the residual stream itself, without a layer norm.
  const float* q = nullptr;      // [rows, Q]  x qq
  const float* key = nullptr;    // [rows, R]  x k1, what is cached
  const float* value = nullptr;  // [rows, R]  x v1
  float* y = nullptr;            // [rows, D], added to; overlaps no input
};

// Nothing is added to padding rows. kInvalidArgument: size < 1, null or misaligned pointer, matrices that do not fit
// each other. kResourceExhausted: a sequence would be longer than the capacity (callers that know its position can
// refuse it before any layer has run), or no memory for the stream's scratch memory. kDataLoss: a state whose length or
// cached ids are no such numbers. No state has changed then. Stateless and thread-safe, but for the stream and the
// states it updates. Held to reference::DeepEmbedAttention by conformance.
using DeepEmbedAttentionOp = absl::Status(const DeepEmbedAttentionArgs& args, Stream& stream);

absl::Status Validate(const DeepEmbedAttentionArgs& args);
// The part that reads the states, where they are in host memory.
absl::Status ValidateCaches(const DeepEmbedAttentionArgs& args);

}  // namespace rwkv::kernels
