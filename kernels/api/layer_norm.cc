#include "kernels/api/layer_norm.h"

#include "kernels/api/check.h"
#include "kernels/base/status_macros.h"

namespace rwkv::kernels {

absl::Status Validate(const LayerNormArgs& args) {
  RWKV_RETURN_IF_ERROR(internal::CheckSizes("layer_norm", {{"rows", args.rows}, {"width", args.width}}));
  RWKV_RETURN_IF_ERROR(internal::CheckPointers(
      "layer_norm", {{"x", args.x}, {"weight", args.weight}, {"bias", args.bias}, {"y", args.y}}));
  return internal::CheckEpsilon("layer_norm", args.epsilon);
}

}  // namespace rwkv::kernels
