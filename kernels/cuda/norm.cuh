// Layer norm, and embedding with it: a block a row.
#pragma once

#include "kernels/api/embed.h"
#include "kernels/api/layer_norm.h"
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/weights.cuh"

namespace rwkv::kernels::cuda {
inline namespace RWKV_CUDA_BUILD {

RWKV_KERNEL(kRowThreads) LayerNormKernel(LayerNormArgs args, bool wide) {
  BeginKernel();
  const auto n = static_cast<int>(args.width);
  const float* const x = args.x + int64_t{BlockIndexX()} * n;
  float* const y = args.y + int64_t{BlockIndexX()} * n;
  const auto row = [&](int c) { return LoadChannels(x, c, n, wide); };
  const Moments moments = MomentsOf(row, n, args.epsilon, BlockShared<MomentsShared>());
  for (int c = 4 * ThreadIndex(); c < n; c += 4 * BlockThreads()) {
    StoreChannels(
        y, c, n, wide,
        Normalize(row(c), moments, LoadChannels(args.weight, c, n, wide), LoadChannels(args.bias, c, n, wide)));
  }
}

struct EmbedParameters {
  DeviceWeight embedding;
  const int32_t* tokens;
  const float* weight;
  const float* bias;
  float epsilon;
  float* x;
  bool wide;
};

RWKV_KERNEL(kRowThreads) EmbedKernel(EmbedParameters p) {
  BeginKernel();
  const int n = p.embedding.cols;
  const int64_t token = p.tokens[BlockIndexX()];
  float* const x = p.x + int64_t{BlockIndexX()} * n;
  const auto row = [&](int c) {
    const WeightChunk chunk = LoadChunk(p.embedding, token, c / kChunk * kChunk);
    Float4 v = c % kChunk == 0 ? Float4{chunk.w[0], chunk.w[1], chunk.w[2], chunk.w[3]}
                               : Float4{chunk.w[4], chunk.w[5], chunk.w[6], chunk.w[7]};
    if (c + 1 >= n) v.y = 0.0f;
    if (c + 2 >= n) v.z = 0.0f;
    if (c + 3 >= n) v.w = 0.0f;
    return v;
  };
  Moments moments = {0.0f, 1.0f};
  if (p.weight != nullptr) moments = MomentsOf(row, n, p.epsilon, BlockShared<MomentsShared>());
  for (int c = 4 * ThreadIndex(); c < n; c += 4 * BlockThreads()) {
    Float4 v = row(c);
    if (p.weight != nullptr) {
      v = Normalize(v, moments, LoadChannels(p.weight, c, n, p.wide), LoadChannels(p.bias, c, n, p.wide));
    }
    StoreChannels(x, c, n, p.wide, v);
  }
}

}  // namespace RWKV_CUDA_BUILD
}  // namespace rwkv::kernels::cuda
