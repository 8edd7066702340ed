#include "kernels/cuda/deep_embed.cuh"
#include "kernels/cuda/launches.cuh"

namespace rwkv::kernels::cuda {
inline namespace RWKV_CUDA_BUILD {

int LaunchDeepEmbed(const DeepEmbedArgs& args, LaunchStream stream) {
  return Launch(stream, {static_cast<uint32_t>(args.rows), 1, RowThreads(4 * args.width), 0}, "deep_embed",
                DeepEmbedKernel, args);
}

}  // namespace RWKV_CUDA_BUILD
}  // namespace rwkv::kernels::cuda
