// A row's own small matrix, applied to the row: a block a row, a thread an output.
#pragma once

#include "kernels/api/deep_embed.h"
#include "kernels/cuda/rows.cuh"

namespace rwkv::kernels::cuda {
inline namespace RWKV_CUDA_BUILD {

RWKV_KERNEL(kRowThreads) DeepEmbedKernel(DeepEmbedArgs args) {
  BeginKernel();
  const int64_t n = args.width;
  const float* const x = args.x + BlockIndexX() * n;
  const float* const matrix = args.matrices + BlockIndexX() * n * n;
  for (int64_t j = ThreadIndex(); j < n; j += BlockThreads()) {
    float sum = 0.0f;
    for (int64_t i = 0; i < n; ++i) sum = Fma(x[i], matrix[i * n + j], sum);
    args.y[BlockIndexX() * n + j] = sum;
  }
}

}  // namespace RWKV_CUDA_BUILD
}  // namespace rwkv::kernels::cuda
