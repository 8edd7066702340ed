#include "kernels/cuda/launches.cuh"
#include "kernels/cuda/wkv4.cuh"

namespace rwkv::kernels::cuda {
inline namespace RWKV_CUDA_BUILD {

int LaunchWkv4(const Wkv4Args& args, LaunchStream stream) {
  Wkv4Parameters p = {args, *args.step, static_cast<int32_t>((args.width + kWkv4Threads - 1) / kWkv4Threads)};
  p.args.step = nullptr;  // The host's.
  return Launch(stream, {static_cast<uint32_t>(p.step.span_count * p.blocks), 1, kWkv4Threads, 0}, "wkv4", Wkv4Kernel,
                p);
}

}  // namespace RWKV_CUDA_BUILD
}  // namespace rwkv::kernels::cuda
