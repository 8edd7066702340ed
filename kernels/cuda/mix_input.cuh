// Layer norm, token shift and lerps: a block a row. The row before is normalised again rather than waited for. Who has
// one row reads its state and writes it; a longer span's state is written by a kernel of its own, since the block that
// reads it is not the one that knows the last row.
#pragma once

#include "kernels/api/mix_input.h"
#include "kernels/cuda/rows.cuh"

namespace rwkv::kernels::cuda {
inline namespace RWKV_CUDA_BUILD {

struct MixInputParameters {
  MixInputArgs args;
  StepRows step;
  bool wide;
};

struct MixInputShared {
  MomentsShared now;
  MomentsShared before;
};

// A row as the mix takes it: normalised if there is a layer norm.
struct MixRow {
  const float* x;
  Moments moments;
};

RWKV_DEVICE MixRow ReadMixRow(const MixInputArgs& args, int64_t row, bool wide, MomentsShared& shared) {
  const auto n = static_cast<int>(args.width);
  MixRow result = {args.x + row * n, {0.0f, 1.0f}};
  if (args.weight != nullptr) {
    result.moments = MomentsOf([&](int c) { return LoadChannels(result.x, c, n, wide); }, n, args.epsilon, shared);
  }
  return result;
}

RWKV_DEVICE Float4 MixChannels(const MixInputArgs& args, const MixRow& row, int c, bool wide) {
  const auto n = static_cast<int>(args.width);
  const Float4 x = LoadChannels(row.x, c, n, wide);
  if (args.weight == nullptr) return x;
  return Normalize(x, row.moments, LoadChannels(args.weight, c, n, wide), LoadChannels(args.bias, c, n, wide));
}

RWKV_KERNEL(kRowThreads) MixInputKernel(MixInputParameters p) {
  BeginKernel();
  const MixInputArgs& args = p.args;
  const auto n = static_cast<int>(args.width);
  const int64_t row = BlockIndexX();
  const int64_t at = row * n;
  const SequenceSpan span = SpanOf(p.step, row);
  const bool padding = span.slot == kPaddingSlot;
  const bool first = row == span.row_begin;
  MixInputShared& shared = BlockShared<MixInputShared>();
  float* const state = args.shift.data + (padding ? 0 : span.slot) * args.shift.stride;
  MixRow now = {nullptr, {}};
  MixRow before = {nullptr, {}};
  if (!padding) now = ReadMixRow(args, row, p.wide, shared.now);
  if (!padding && !first) before = ReadMixRow(args, row - 1, p.wide, shared.before);
  for (int c = 4 * ThreadIndex(); c < n; c += 4 * BlockThreads()) {
    Float4 x = {0.0f, 0.0f, 0.0f, 0.0f};
    Float4 old = x;
    if (!padding) {
      x = MixChannels(args, now, c, p.wide);
      old = first ? LoadChannels(state, c, n, p.wide) : MixChannels(args, before, c, p.wide);
    }
    if (args.normed != nullptr) StoreChannels(args.normed + at, c, n, p.wide, x);
#pragma unroll
    for (int m = 0; m < kMaxMixOutputs; ++m) {
      if (m >= args.outputs) break;
      Float4 y = {0.0f, 0.0f, 0.0f, 0.0f};
      if (!padding) {
        Float4 mix = LoadChannels(args.mix[m], c, n, p.wide);
        if (args.mix_delta[m] != nullptr) {
          const Float4 delta = LoadChannels(args.mix_delta[m] + at, c, n, p.wide);
          mix = {mix.x + delta.x, mix.y + delta.y, mix.z + delta.z, mix.w + delta.w};
        }
        y = {Fma(old.x - x.x, mix.x, x.x), Fma(old.y - x.y, mix.y, x.y), Fma(old.z - x.z, mix.z, x.z),
             Fma(old.w - x.w, mix.w, x.w)};
      }
      StoreChannels(args.y[m] + at, c, n, p.wide, y);
    }
    if (!padding && span.row_count == 1 && !args.keep_state) StoreChannels(state, c, n, p.wide, x);
  }
}

// The state that a span of several rows leaves: a block a span.
RWKV_KERNEL(kRowThreads) MixStateKernel(MixInputParameters p) {
  BeginKernel();
  const MixInputArgs& args = p.args;
  const auto n = static_cast<int>(args.width);
  const SequenceSpan span = p.step.spans[BlockIndexX()];
  if (span.slot == kPaddingSlot || span.row_count == 1) return;
  const MixRow last = ReadMixRow(args, span.row_begin + span.row_count - 1, p.wide, BlockShared<MomentsShared>());
  float* const state = args.shift.data + span.slot * args.shift.stride;
  for (int c = 4 * ThreadIndex(); c < n; c += 4 * BlockThreads()) {
    StoreChannels(state, c, n, p.wide, MixChannels(args, last, c, p.wide));
  }
}

}  // namespace RWKV_CUDA_BUILD
}  // namespace rwkv::kernels::cuda
