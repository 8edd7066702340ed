#include "kernels/api/matmul.h"

#include "absl/strings/str_cat.h"
#include "kernels/api/check.h"
#include "kernels/base/status_macros.h"

namespace rwkv::kernels {

absl::Status Validate(const MatmulArgs& args) {
  RWKV_RETURN_IF_ERROR(internal::CheckSizes("matmul", {{"rows", args.rows}}));
  RWKV_RETURN_IF_ERROR(internal::CheckMatrix("matmul", "weight", args.weight));
  RWKV_RETURN_IF_ERROR(internal::CheckPointers("matmul", {{"x", args.x}, {"y", args.y}}));
  if (args.bias != nullptr) RWKV_RETURN_IF_ERROR(internal::CheckPointers("matmul", {{"bias", args.bias}}));
  if (args.gate != nullptr) RWKV_RETURN_IF_ERROR(internal::CheckPointers("matmul", {{"gate", args.gate}}));
  switch (args.activation) {
    case Activation::kNone:
    case Activation::kSigmoid:
    case Activation::kTanh:
    case Activation::kSquaredRelu:
    case Activation::kSilu:
    case Activation::kDecay:
      return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat("matmul: unknown activation ", static_cast<int>(args.activation)));
}

}  // namespace rwkv::kernels
