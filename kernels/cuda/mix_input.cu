#include "kernels/cuda/launches.cuh"
#include "kernels/cuda/mix_input.cuh"

namespace rwkv::kernels::cuda {
inline namespace RWKV_CUDA_BUILD {

int LaunchMixInput(const MixInputArgs& args, LaunchStream stream) {
  MixInputParameters p = {args, *args.step, true};
  p.args.step = nullptr;  // The host's.
  const void* const memory[] = {args.x, args.weight, args.bias, args.shift.data, args.normed};
  for (const void* pointer : memory) p.wide = p.wide && IsAligned16(pointer);
  for (int64_t m = 0; m < args.outputs; ++m) {
    p.wide = p.wide && IsAligned16(args.mix[m]) && IsAligned16(args.mix_delta[m]) && IsAligned16(args.y[m]);
  }
  p.wide = p.wide && args.width % 4 == 0 && args.shift.stride % 4 == 0;
  const uint32_t threads = RowThreads(args.width);
  const int error = Launch(stream, {static_cast<uint32_t>(p.step.rows), 1, threads, sizeof(MixInputShared)},
                           "mix_input", MixInputKernel, p);
  if (error != 0 || args.keep_state || p.step.span_count == p.step.rows) return error;
  return Launch(stream, {static_cast<uint32_t>(p.step.span_count), 1, threads, sizeof(MomentsShared)}, "mix_state",
                MixStateKernel, p);
}

}  // namespace RWKV_CUDA_BUILD
}  // namespace rwkv::kernels::cuda
