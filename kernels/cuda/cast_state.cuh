// A wkv state as fp16 and as floats.
#pragma once

#include "kernels/api/cast_state.h"
#include "kernels/cuda/rows.cuh"

namespace rwkv::kernels::cuda {
inline namespace RWKV_CUDA_BUILD {

RWKV_KERNEL(kRowThreads) CastStateKernel(CastStateArgs args) {
  BeginKernel();
  const int64_t i = int64_t{BlockIndexX()} * BlockThreads() + ThreadIndex();
  if (i >= args.count) return;
  if (args.widens) {
    args.wide[i] = HalfToFloat(args.narrow[i]);
  } else {
    args.narrow[i] = static_cast<uint16_t>(FloatToHalf(args.wide[i]));
  }
}

}  // namespace RWKV_CUDA_BUILD
}  // namespace rwkv::kernels::cuda
