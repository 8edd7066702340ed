#include "kernels/cuda/launches.cuh"
#include "kernels/cuda/library_products.cuh"

namespace rwkv::kernels::cuda {
inline namespace RWKV_CUDA_BUILD {
namespace {

uint32_t PieceBlocks(int64_t pieces) { return static_cast<uint32_t>((pieces + kPieceThreads - 1) / kPieceThreads); }

}  // namespace

int LaunchRoundInputs(const RoundInputsArgs& args, LaunchStream stream) {
  const RoundParameters p = {args.x,
                             args.to,
                             args.rows,
                             args.to_rows,
                             static_cast<int32_t>(args.inputs),
                             static_cast<int32_t>(args.pitch),
                             args.dtype == DType::kFloat16};
  const bool wide = args.inputs % kPieceInputs == 0 && IsAligned16(args.x);
  return Launch(stream, {PieceBlocks(args.to_rows * args.pitch / kPieceInputs), 1, kPieceThreads, 0}, "round_inputs",
                RoundInputsKernel, p, wide);
}

int LaunchFinishProduct(const FinishProductArgs& args, LaunchStream stream) {
  const Product& product = *args.product;
  const FinishParameters p = {{OnDevice(product.weight->matrix), product.x, product.bias, product.gate, product.y, 0,
                               product.activation, product.accumulate},
                              args.rows,
                              args.sums,
                              args.pitch};
  return Launch(stream, {PieceBlocks(args.rows * product.weight->matrix.rows), 1, kPieceThreads, 0}, "finish_product",
                FinishProductKernel, p);
}

}  // namespace RWKV_CUDA_BUILD
}  // namespace rwkv::kernels::cuda
