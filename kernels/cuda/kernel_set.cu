#include "kernels/cuda/launches.cuh"

namespace rwkv::kernels::cuda {

const KernelSet RWKV_CUDA_KERNEL_SET = {LaunchEmbed,
                                        LaunchLayerNorm,
                                        LaunchMixInput,
                                        LaunchProducts,
                                        LaunchTensorProducts,
                                        LaunchRoundedProducts,
                                        LaunchRoundInputs,
                                        LaunchFinishProduct,
                                        LaunchWkv4,
                                        LaunchWkv6,
                                        LaunchWkv7,
                                        LaunchDeepEmbed,
                                        LaunchDeepEmbedAttention,
                                        LaunchSample,
                                        LaunchCastState};

}  // namespace rwkv::kernels::cuda
