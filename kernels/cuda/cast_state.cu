#include "kernels/cuda/cast_state.cuh"
#include "kernels/cuda/launches.cuh"

namespace rwkv::kernels::cuda {
inline namespace RWKV_CUDA_BUILD {

int LaunchCastState(const CastStateArgs& args, LaunchStream stream) {
  const LaunchShape shape = {static_cast<uint32_t>((args.count + kRowThreads - 1) / kRowThreads), 1, kRowThreads, 0};
  return Launch(stream, shape, "cast_state", CastStateKernel, args);
}

}  // namespace RWKV_CUDA_BUILD
}  // namespace rwkv::kernels::cuda
