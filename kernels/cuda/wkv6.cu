#include "kernels/cuda/launches.cuh"
#include "kernels/cuda/wkv6.cuh"

namespace rwkv::kernels::cuda {
inline namespace RWKV_CUDA_BUILD {

int LaunchWkv6(const Wkv6Args& args, LaunchStream stream) {
  Wkv6Parameters p = {args, *args.step};
  p.args.step = nullptr;  // The host's.
  const int64_t n = args.head_size;
  LaunchShape shape = {static_cast<uint32_t>(p.step.span_count * args.heads), 1, HeadThreads(n), 0};
  const auto launch = [&](auto kernel, uint32_t shared_bytes) {
    shape.shared_bytes = shared_bytes;
    return Launch(stream, shape, "wkv6", kernel, p);
  };
  if (n == 64 && HeadsAreAligned(args.state, n)) return launch(Wkv6Kernel<4, true>, sizeof(Wkv6Shared<4>));
  if (n <= 16) return launch(Wkv6Kernel<1, false>, sizeof(Wkv6Shared<1>));
  if (n <= 32) return launch(Wkv6Kernel<2, false>, sizeof(Wkv6Shared<2>));
  if (n <= 64) return launch(Wkv6Kernel<4, false>, sizeof(Wkv6Shared<4>));
  return launch(Wkv6Kernel<8, false>, sizeof(Wkv6Shared<8>));
}

}  // namespace RWKV_CUDA_BUILD
}  // namespace rwkv::kernels::cuda
