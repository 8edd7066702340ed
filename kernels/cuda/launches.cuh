// The functions of this build's KernelSet.
#pragma once

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/kernel_set.h"

namespace rwkv::kernels::cuda {
inline namespace RWKV_CUDA_BUILD {

int LaunchEmbed(const EmbedArgs& args, StreamHandle stream);
int LaunchLayerNorm(const LayerNormArgs& args, StreamHandle stream);
int LaunchMixInput(const MixInputArgs& args, StreamHandle stream);
int LaunchProducts(const ProductsArgs& args, StreamHandle stream);
int LaunchTensorProducts(const ProductsArgs& args, StreamHandle stream);
int LaunchWkv4(const Wkv4Args& args, StreamHandle stream);
int LaunchWkv6(const Wkv6Args& args, StreamHandle stream);
int LaunchWkv7(const Wkv7Args& args, StreamHandle stream);
int LaunchDeepEmbed(const DeepEmbedArgs& args, StreamHandle stream);
int LaunchDeepEmbedAttention(const DeepEmbedAttentionArgs& args, StreamHandle stream);

}  // namespace RWKV_CUDA_BUILD
}  // namespace rwkv::kernels::cuda
