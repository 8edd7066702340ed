#include "kernels/cuda/fixed_products.cuh"
#include "kernels/cuda/launches.cuh"
#include "kernels/cuda/products.cuh"
#include "kernels/cuda/tensor_fixed_products.cuh"
#include "kernels/cuda/tensor_products.cuh"

namespace rwkv::kernels::cuda {
inline namespace RWKV_CUDA_BUILD {
namespace {

// Cuts the products among blocks of `outputs` outputs and `rows` rows; gives how many blocks there are.
uint32_t CutProducts(int outputs, int rows, ProductsParameters& p) {
  uint32_t blocks = 0;
  for (int i = 0; i < p.count; ++i) {
    p.products[i].first_block = blocks;
    blocks += static_cast<uint32_t>((p.products[i].weight.rows + outputs - 1) / outputs);
  }
  p.row_tiles = static_cast<uint32_t>((p.rows + rows - 1) / rows);
  return blocks * p.row_tiles;
}

template <WeightKind kKind, int kRows, int kOutputs, bool kWide>
int LaunchTiles(ProductsParameters p, LaunchStream stream) {
  const uint32_t blocks = CutProducts(kOutputs * kProductWarps, kRows, p);
  return Launch(stream, {blocks, 1, kProductThreads, 0}, "products", ProductsKernel<kKind, kRows, kOutputs, kWide>, p);
}

template <WeightKind kKind, bool kRounded, int kOutTiles, int kRowTiles>
int LaunchTensorTiles(ProductsParameters p, bool wide, LaunchStream stream) {
  using Shared = TensorShared<kOutTiles, kRowTiles>;
  const uint32_t blocks = CutProducts(Shared::kOutputs, Shared::kRows, p);
  return Launch(stream, {blocks, 1, kTensorThreads, sizeof(Shared)}, kRounded ? "rounded_products" : "tensor_products",
                TensorProductsKernel<kKind, kOutTiles, kRowTiles, kRounded>, p, wide);
}

template <WeightKind kKind, bool kRounded>
int LaunchTensor(const ProductsParameters& p, bool wide, LaunchStream stream) {
  if (p.rows <= 8) return LaunchTensorTiles<kKind, kRounded, 1, 1>(p, wide, stream);
  if (p.rows <= 16) return LaunchTensorTiles<kKind, kRounded, 1, 2>(p, wide, stream);
  return LaunchTensorTiles<kKind, kRounded, 2, 4>(p, wide, stream);
}

template <WeightKind kKind, int kOutTiles, int kRowTiles, int kGroups>
int LaunchTensorFixedTiles(ProductsParameters p, bool wide, LaunchStream stream) {
  using Shared = TensorFixedShared<kOutTiles, kRowTiles, kGroups>;
  const uint32_t blocks = CutProducts(Shared::kOutputs, Shared::kRows, p);
  return Launch(stream, {blocks, 1, kTensorThreads, sizeof(Shared)}, "tensor_fixed_products",
                TensorFixedProductsKernel<kKind, kOutTiles, kRowTiles, kGroups>, p, wide);
}

// Few rows: many blocks, with much to read in each. Many rows: many outputs a block, for each makes fixed point of its
// inputs anew.
template <WeightKind kKind>
int LaunchTensorFixed(const ProductsParameters& p, bool wide, LaunchStream stream) {
  if (p.rows <= 8) return LaunchTensorFixedTiles<kKind, 1, 1, 4>(p, wide, stream);
  if (p.rows <= 16) return LaunchTensorFixedTiles<kKind, 1, 2, 2>(p, wide, stream);
  return LaunchTensorFixedTiles<kKind, 4, 2, 1>(p, wide, stream);
}

template <WeightKind kKind, int kRows>
int LaunchFixedTiles(ProductsParameters p, bool wide, LaunchStream stream) {
  const uint32_t blocks = CutProducts(kProductWarps, kRows, p);
  return Launch(stream, {blocks, 1, kProductThreads, sizeof(FixedShared<kRows>)}, "fixed_products",
                FixedProductsKernel<kKind, kRows>, p, wide);
}

template <WeightKind kKind>
int LaunchFixed(const ProductsParameters& p, bool wide, LaunchStream stream) {
  if (p.rows == 1) return LaunchFixedTiles<kKind, 1>(p, wide, stream);
  return LaunchFixedTiles<kKind, 4>(p, wide, stream);
}

template <WeightKind kKind>
int LaunchKind(const ProductsParameters& p, bool wide, LaunchStream stream) {
  if (!wide) return LaunchTiles<kKind, 1, 1, false>(p, stream);
  if (p.rows == 1) return LaunchTiles<kKind, 1, 1, true>(p, stream);
  if (p.rows <= 4) return LaunchTiles<kKind, 4, 2, true>(p, stream);
  return LaunchTiles<kKind, 8, 4, true>(p, stream);
}

template <bool kRounded>
int LaunchTensorKind(WeightKind kind, const ProductsParameters& p, bool wide, LaunchStream stream) {
  switch (kind) {
    case WeightKind::kFloat32:
      return LaunchKind<WeightKind::kFloat32>(p, wide, stream);
    case WeightKind::kBFloat16:
      return LaunchTensor<WeightKind::kBFloat16, kRounded>(p, wide, stream);
    case WeightKind::kFloat16:
      return LaunchTensor<WeightKind::kFloat16, kRounded>(p, wide, stream);
    case WeightKind::kInt8:
      return LaunchTensorFixed<WeightKind::kInt8>(p, wide, stream);
    case WeightKind::kInt4:
      break;
  }
  return LaunchTensorFixed<WeightKind::kInt4>(p, wide, stream);
}

int LaunchPlainKind(WeightKind kind, const ProductsParameters& p, bool wide, LaunchStream stream) {
  switch (kind) {
    case WeightKind::kFloat32:
      return LaunchKind<WeightKind::kFloat32>(p, wide, stream);
    case WeightKind::kBFloat16:
      return LaunchKind<WeightKind::kBFloat16>(p, wide, stream);
    case WeightKind::kFloat16:
      return LaunchKind<WeightKind::kFloat16>(p, wide, stream);
    case WeightKind::kInt8:
      return LaunchFixed<WeightKind::kInt8>(p, wide, stream);
    case WeightKind::kInt4:
      break;
  }
  return LaunchFixed<WeightKind::kInt4>(p, wide, stream);
}

using LaunchOfKind = int (*)(WeightKind kind, const ProductsParameters& p, bool wide, LaunchStream stream);

// One launch for all products whose weights are stored alike.
int LaunchAll(const ProductsArgs& args, LaunchOfKind launch, LaunchStream stream) {
  for (int kind = 0; kind < kWeightKinds; ++kind) {
    for (const bool wide : {true, false}) {
      ProductsParameters p = {};
      p.rows = args.rows;
      for (int64_t i = 0; i < args.count; ++i) {
        const Product& product = args.products[i];
        const DeviceWeight weight = OnDevice(product.weight->matrix);
        if (static_cast<int>(weight.kind) != kind) continue;
        if ((weight.cols % 4 == 0 && IsAligned16(product.x)) != wide) continue;
        p.products[p.count++] = {weight,    product.x, product.bias,       product.gate,
                                 product.y, 0,         product.activation, product.accumulate};
        if (p.count < kProductsOfLaunch) continue;
        if (const int error = launch(weight.kind, p, wide, stream); error != 0) return error;
        p.count = 0;
      }
      if (p.count == 0) continue;
      const int error = launch(static_cast<WeightKind>(kind), p, wide, stream);
      if (error != 0) return error;
    }
  }
  return 0;
}

}  // namespace

int LaunchProducts(const ProductsArgs& args, LaunchStream stream) { return LaunchAll(args, LaunchPlainKind, stream); }
int LaunchTensorProducts(const ProductsArgs& args, LaunchStream stream) {
  return LaunchAll(args, LaunchTensorKind<false>, stream);
}
int LaunchRoundedProducts(const ProductsArgs& args, LaunchStream stream) {
  return LaunchAll(args, LaunchTensorKind<true>, stream);
}

}  // namespace RWKV_CUDA_BUILD
}  // namespace rwkv::kernels::cuda
