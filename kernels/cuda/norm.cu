#include "kernels/cuda/launches.cuh"
#include "kernels/cuda/norm.cuh"

namespace rwkv::kernels::cuda {
inline namespace RWKV_CUDA_BUILD {

int LaunchLayerNorm(const LayerNormArgs& args, LaunchStream stream) {
  const bool wide = args.width % 4 == 0 && IsAligned16(args.x) && IsAligned16(args.weight) && IsAligned16(args.bias) &&
                    IsAligned16(args.y);
  const LaunchShape shape = {static_cast<uint32_t>(args.rows), 1, RowThreads(args.width), sizeof(MomentsShared)};
  return Launch(stream, shape, "layer_norm", LayerNormKernel, args, wide);
}

int LaunchEmbed(const EmbedArgs& args, LaunchStream stream) {
  const DeviceWeight embedding = OnDevice(args.embedding->matrix);
  const bool wide =
      embedding.cols % 4 == 0 && IsAligned16(args.weight) && IsAligned16(args.bias) && IsAligned16(args.x);
  const EmbedParameters parameters = {embedding, args.tokens, args.weight, args.bias, args.epsilon, args.x, wide};
  const LaunchShape shape = {static_cast<uint32_t>(args.rows), 1, RowThreads(embedding.cols), sizeof(MomentsShared)};
  return Launch(stream, shape, "embed", EmbedKernel, parameters);
}

}  // namespace RWKV_CUDA_BUILD
}  // namespace rwkv::kernels::cuda
