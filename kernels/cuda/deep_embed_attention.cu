#include "kernels/cuda/deep_embed_attention.cuh"
#include "kernels/cuda/launches.cuh"

namespace rwkv::kernels::cuda {
inline namespace RWKV_CUDA_BUILD {

int LaunchDeepEmbedAttention(const DeepEmbedAttentionArgs& args, LaunchStream stream) {
  AttentionParameters p = {args, *args.step, OnDevice(args.k2->matrix), OnDevice(args.v2->matrix)};
  p.args.step = nullptr;  // The host's, as the weights.
  p.args.k2 = p.args.v2 = nullptr;
  const int channels = p.k2.rows + p.v2.rows;
  const uint32_t threads = RowThreads(int64_t{4} * (p.k2.rows > p.v2.rows ? p.k2.rows : p.v2.rows));
  const auto launch = [&](auto kernel, uint32_t shared_bytes) {
    return Launch(stream, {static_cast<uint32_t>(p.step.rows), 1, threads, shared_bytes}, "attention", kernel, p);
  };
  const int error = channels <= 512    ? launch(AttentionKernel<512>, sizeof(AttentionShared<512>))
                    : channels <= 1024 ? launch(AttentionKernel<1024>, sizeof(AttentionShared<1024>))
                    : channels <= 2048 ? launch(AttentionKernel<2048>, sizeof(AttentionShared<2048>))
                                       : launch(AttentionKernel<kMaxAttentionChannels>,
                                                sizeof(AttentionShared<kMaxAttentionChannels>));
  if (error != 0) return error;
  return Launch(stream, {static_cast<uint32_t>(p.step.span_count), 1, threads, 0}, "attention_state",
                AttentionStateKernel, p);
}

}  // namespace RWKV_CUDA_BUILD
}  // namespace rwkv::kernels::cuda
