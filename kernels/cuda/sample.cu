#include "kernels/cuda/launches.cuh"
#include "kernels/cuda/sample.cuh"

namespace rwkv::kernels::cuda {
inline namespace RWKV_CUDA_BUILD {

int LaunchSample(const SampleArgs& args, LaunchStream stream) {
  const LaunchShape shape = {static_cast<uint32_t>(args.count), 1, kSampleThreads, sizeof(SampleShared)};
  return Launch(stream, shape, "sample", SampleKernel, args);
}

}  // namespace RWKV_CUDA_BUILD
}  // namespace rwkv::kernels::cuda
