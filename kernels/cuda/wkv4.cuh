// RWKV-4's recurrence: a thread has one channel of one sequence and takes token after token.
#pragma once

#include "kernels/api/wkv4.h"
#include "kernels/cuda/device_math.cuh"

namespace rwkv::kernels::cuda {
inline namespace RWKV_CUDA_BUILD {

constexpr int kWkv4Threads = 64;

struct Wkv4Parameters {
  Wkv4Args args;
  StepRows step;
  int32_t blocks;  // of a span
};

RWKV_KERNEL(kWkv4Threads) Wkv4Kernel(Wkv4Parameters p) {
  BeginKernel();
  const Wkv4Args& args = p.args;
  const SequenceSpan span = p.step.spans[BlockIndexX() / p.blocks];
  const int64_t c = int64_t{BlockIndexX() % p.blocks} * BlockThreads() + ThreadIndex();
  if (c >= args.width) return;
  if (span.slot == kPaddingSlot) {
    for (int64_t row = span.row_begin; row < span.row_begin + span.row_count; ++row) {
      args.y[row * args.width + c] = 0.0f;
    }
    return;
  }
  float* const numerator = args.aa.data + span.slot * args.aa.stride + c;
  float* const denominator = args.bb.data + span.slot * args.bb.stride + c;
  float* const exponent = args.pp.data + span.slot * args.pp.stride + c;
  float aa = *numerator;
  float bb = *denominator;
  float pp = *exponent;
  const float decay = args.decay[c];
  const float bonus = args.bonus[c];
  for (int64_t row = span.row_begin; row < span.row_begin + span.row_count; ++row) {
    const int64_t at = row * args.width + c;
    const float k = args.k[at];
    const float v = args.v[at];
    const float own = bonus + k;
    float q = pp < own ? own : pp;
    float old_scale = Exp(pp - q);
    float new_scale = Exp(own - q);
    const float wkv = Fma(old_scale, aa, new_scale * v) / Fma(old_scale, bb, new_scale);
    const float decayed = pp + decay;
    q = decayed < k ? k : decayed;
    old_scale = Exp(decayed - q);
    new_scale = Exp(k - q);
    aa = Fma(old_scale, aa, new_scale * v);
    bb = Fma(old_scale, bb, new_scale);
    pp = q;
    args.y[at] = args.r[at] * wkv;
  }
  *numerator = aa;
  *denominator = bb;
  *exponent = pp;
}

}  // namespace RWKV_CUDA_BUILD
}  // namespace rwkv::kernels::cuda
