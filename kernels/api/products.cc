#include "kernels/api/products.h"

#include "absl/strings/str_cat.h"
#include "kernels/api/check.h"
#include "kernels/base/status_macros.h"

namespace rwkv::kernels {
namespace {

absl::Status CheckProduct(const Product& product) {
  RWKV_RETURN_IF_ERROR(
      internal::CheckPointers("products", {{"weight", product.weight}, {"x", product.x}, {"y", product.y}}));
  if (product.bias != nullptr) RWKV_RETURN_IF_ERROR(internal::CheckPointers("products", {{"bias", product.bias}}));
  if (product.gate != nullptr) RWKV_RETURN_IF_ERROR(internal::CheckPointers("products", {{"gate", product.gate}}));
  switch (product.activation) {
    case Activation::kNone:
    case Activation::kSigmoid:
    case Activation::kTanh:
    case Activation::kSquaredRelu:
    case Activation::kSilu:
    case Activation::kDecay:
      return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      absl::StrCat("products: unknown activation ", static_cast<int>(product.activation)));
}

}  // namespace

absl::Status Validate(const ProductsArgs& args) {
  RWKV_RETURN_IF_ERROR(internal::CheckSizes("products", {{"rows", args.rows}, {"count", args.count}}));
  RWKV_RETURN_IF_ERROR(internal::CheckPointers("products", {{"products", args.products}}));
  for (int64_t i = 0; i < args.count; ++i) RWKV_RETURN_IF_ERROR(CheckProduct(args.products[i]));
  return absl::OkStatus();
}

}  // namespace rwkv::kernels
