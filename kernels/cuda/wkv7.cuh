// RWKV-7's core: a block has one head of one sequence, keeps its state in registers and takes token after token.
#pragma once

#include "kernels/api/wkv7.h"
#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/head_state.cuh"

namespace rwkv::kernels::cuda {
inline namespace RWKV_CUDA_BUILD {

struct Wkv7Parameters {
  Wkv7Args args;
  StepRows step;
};

template <int kQuads>
struct Wkv7Shared {
  HeadVector<kQuads> r, w, k, a, b, v;
  HeadSums<kQuads> kappa, own, sums, squares;
};

template <int kQuads, bool kWhole>
RWKV_KERNEL(kHeadThreads<kQuads>)
Wkv7Kernel(Wkv7Parameters p) {
  BeginKernel();
  const Wkv7Args& args = p.args;
  const auto heads = static_cast<int>(args.heads);
  const int head = BlockIndexX() % heads;
  const SequenceSpan span = p.step.spans[BlockIndexX() / heads];
  HeadState<kQuads, kWhole> state(static_cast<int>(args.head_size), args.state.is_half);
  const int n = state.n;
  const int t = ThreadIndex();
  const int64_t width = int64_t{heads} * n;
  if (span.slot == kPaddingSlot) {
    for (int64_t row = span.row_begin; row < span.row_begin + span.row_count; ++row) {
      if (t < n) args.y[row * width + head * n + t] = 0.0f;
    }
    return;
  }
  state.Load(args.state, span.slot, head);
  auto& shared = BlockShared<Wkv7Shared<kQuads>>();
  if (!kWhole && t >= n && t < 16 * kQuads) {
    for (auto* vector : {&shared.r, &shared.w, &shared.k, &shared.a, &shared.b}) vector->Set(t, 0.0f);
  }
  const int64_t channel = int64_t{head} * n + t;                // of who prepares: a thread a channel
  const int64_t value_channel = int64_t{head} * n + state.row;  // of who reads: a thread a row
  const bool reads = state.part == 0 && state.row < n;
  for (int64_t row = span.row_begin; row < span.row_begin + span.row_count; ++row) {
    const int64_t at = row * width;
    float k = 0.0f;
    float kappa = 0.0f;
    if (t < n) {
      k = args.k[at + channel];
      kappa = k * args.k_k[channel];
    }
    const float norm = Sqrt(BlockSum(kappa * kappa, shared.kappa.values));
    float own = 0.0f;
    if (t < n) {
      const float iclr = Sigmoid(args.iclr_bias[channel] + args.iclr_lora[at + channel]);
      const float kappa_hat = kappa / (norm > 1e-12f ? norm : 1e-12f);
      float v = args.v[at + channel];
      if (args.v_first != nullptr) {
        const float gate = Sigmoid(args.value_gate_bias[channel] + args.value_gate_lora[at + channel]);
        v = Fma(args.v_first[at + channel] - v, gate, v);
      }
      k = k * Fma(iclr - 1.0f, args.k_a[channel], 1.0f);
      const float r = args.r[at + channel];
      constexpr float kInverseSqrtE = 0.60653066f;  // e^(-1/2)
      shared.w.Set(t, Exp(-kInverseSqrtE * Sigmoid(args.decay_bias[channel] + args.decay_lora[at + channel])));
      shared.a.Set(t, -kappa_hat);
      shared.b.Set(t, kappa_hat * iclr);
      shared.k.Set(t, k);
      shared.v.Set(t, v);
      shared.r.Set(t, r);
      own = r * k * args.bonus[channel];
    }
    own = BlockSum(own, shared.own.values);  // Its barrier is that of the vectors as well.

    const float v = state.row < n ? shared.v[state.row] : 0.0f;
    float recall = 0.0f;
#pragma unroll
    for (int e = 0; e < state.kPart; e += 4) {
      const Float4 a = shared.a.Quad(state.Key(e));
      recall = Fma(state.s[e], a.x, recall);
      recall = Fma(state.s[e + 1], a.y, recall);
      recall = Fma(state.s[e + 2], a.z, recall);
      recall = Fma(state.s[e + 3], a.w, recall);
    }
    recall = WarpSum<kThreadsOfStateRow>(recall);
    float read = 0.0f;
#pragma unroll
    for (int e = 0; e < state.kPart; e += 4) {
      const Float4 w = shared.w.Quad(state.Key(e));
      const Float4 key = shared.k.Quad(state.Key(e));
      const Float4 b = shared.b.Quad(state.Key(e));
      const Float4 r = shared.r.Quad(state.Key(e));
      state.s[e] = Fma(state.s[e], w.x, Fma(v, key.x, recall * b.x));
      state.s[e + 1] = Fma(state.s[e + 1], w.y, Fma(v, key.y, recall * b.y));
      state.s[e + 2] = Fma(state.s[e + 2], w.z, Fma(v, key.z, recall * b.z));
      state.s[e + 3] = Fma(state.s[e + 3], w.w, Fma(v, key.w, recall * b.w));
      read = Fma(state.s[e], r.x, read);
      read = Fma(state.s[e + 1], r.y, read);
      read = Fma(state.s[e + 2], r.z, read);
      read = Fma(state.s[e + 3], r.w, read);
    }
    read = WarpSum<kThreadsOfStateRow>(read);
    state.Round();
    const float z = NormalizeHead(read, reads, n, args.epsilon, shared.sums, shared.squares);
    if (reads) {
      const float normed = Fma(z, args.ln_weight[value_channel], args.ln_bias[value_channel]);
      args.y[at + value_channel] = Fma(own, v, normed) * args.g[at + value_channel];
    }
  }
  state.Store(args.state, span.slot, head);
}

}  // namespace RWKV_CUDA_BUILD
}  // namespace rwkv::kernels::cuda
