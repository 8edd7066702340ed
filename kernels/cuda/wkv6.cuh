// The core of RWKV-5 and 6: a block has one head of one sequence, keeps its state in registers and takes token after
// token.
#pragma once

#include "kernels/api/wkv6.h"
#include "kernels/cuda/head_state.cuh"

namespace rwkv::kernels::cuda {
inline namespace RWKV_CUDA_BUILD {

struct Wkv6Parameters {
  Wkv6Args args;
  StepRows step;
};

template <int kQuads>
struct Wkv6Shared {
  HeadVector<kQuads> r, w, k, v;
  HeadSums<kQuads> own, sums, squares;
};

template <int kQuads, bool kWhole>
RWKV_KERNEL(kHeadThreads<kQuads>)
Wkv6Kernel(Wkv6Parameters p) {
  BeginKernel();
  const Wkv6Args& args = p.args;
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
  auto& shared = BlockShared<Wkv6Shared<kQuads>>();
  if (!kWhole && t >= n && t < 16 * kQuads) {
    for (auto* vector : {&shared.r, &shared.w, &shared.k}) vector->Set(t, 0.0f);
  }
  const int64_t channel = int64_t{head} * n + t;
  const int64_t value_channel = int64_t{head} * n + state.row;
  const bool reads = state.part == 0 && state.row < n;
  for (int64_t row = span.row_begin; row < span.row_begin + span.row_count; ++row) {
    const int64_t at = row * width;
    float own = 0.0f;
    if (t < n) {
      const float r = args.r[at + channel];
      const float k = args.k[at + channel];
      own = r * k * args.bonus[channel];
      shared.r.Set(t, r);
      shared.k.Set(t, k);
      shared.w.Set(t, args.w[args.constant_decay ? channel : at + channel]);
      shared.v.Set(t, args.v[at + channel]);
    }
    own = BlockSum(own, shared.own.values);  // Its barrier is that of the vectors as well.

    const float v = state.row < n ? shared.v[state.row] : 0.0f;
    float read = 0.0f;
#pragma unroll
    for (int e = 0; e < state.kPart; e += 4) {
      const Float4 r = shared.r.Quad(state.Key(e));
      const Float4 w = shared.w.Quad(state.Key(e));
      const Float4 key = shared.k.Quad(state.Key(e));
      read = Fma(state.s[e], r.x, read);
      read = Fma(state.s[e + 1], r.y, read);
      read = Fma(state.s[e + 2], r.z, read);
      read = Fma(state.s[e + 3], r.w, read);
      state.s[e] = Fma(state.s[e], w.x, v * key.x);
      state.s[e + 1] = Fma(state.s[e + 1], w.y, v * key.y);
      state.s[e + 2] = Fma(state.s[e + 2], w.z, v * key.z);
      state.s[e + 3] = Fma(state.s[e + 3], w.w, v * key.w);
    }
    read = Fma(own, v, WarpSum<kThreadsOfStateRow>(read));
    state.Round();
    const float z = NormalizeHead(read, reads, n, args.epsilon, shared.sums, shared.squares);
    if (reads) {
      float y = Fma(z, args.ln_weight[value_channel], args.ln_bias[value_channel]);
      if (args.gate != nullptr) y *= args.gate[at + value_channel];
      args.y[at + value_channel] = y;
    }
  }
  state.Store(args.state, span.slot, head);
}

}  // namespace RWKV_CUDA_BUILD
}  // namespace rwkv::kernels::cuda
