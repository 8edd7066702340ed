// The functions of this build's KernelSet.
#pragma once

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/kernel_set.h"

namespace rwkv::kernels::cuda {
inline namespace RWKV_CUDA_BUILD {

int LaunchCastState(const CastStateArgs& args, LaunchStream stream);
int LaunchEmbed(const EmbedArgs& args, LaunchStream stream);
int LaunchLayerNorm(const LayerNormArgs& args, LaunchStream stream);
int LaunchMixInput(const MixInputArgs& args, LaunchStream stream);
int LaunchProducts(const ProductsArgs& args, LaunchStream stream);
int LaunchTensorProducts(const ProductsArgs& args, LaunchStream stream);
int LaunchRoundedProducts(const ProductsArgs& args, LaunchStream stream);
int LaunchRoundInputs(const RoundInputsArgs& args, LaunchStream stream);
int LaunchFinishProduct(const FinishProductArgs& args, LaunchStream stream);
int LaunchSample(const SampleArgs& args, LaunchStream stream);
int LaunchWkv4(const Wkv4Args& args, LaunchStream stream);
int LaunchWkv6(const Wkv6Args& args, LaunchStream stream);
int LaunchWkv7(const Wkv7Args& args, LaunchStream stream);
int LaunchDeepEmbed(const DeepEmbedArgs& args, LaunchStream stream);
int LaunchDeepEmbedAttention(const DeepEmbedAttentionArgs& args, LaunchStream stream);

}  // namespace RWKV_CUDA_BUILD
}  // namespace rwkv::kernels::cuda
