#include "kernels/api/group_norm.h"

#include "kernels/api/check.h"
#include "kernels/base/status_macros.h"

namespace rwkv::kernels {

absl::Status Validate(const GroupNormArgs& args) {
  RWKV_RETURN_IF_ERROR(
      internal::CheckSizes("group_norm", {{"rows", args.rows}, {"heads", args.heads}, {"head_size", args.head_size}}));
  RWKV_RETURN_IF_ERROR(internal::CheckPointers(
      "group_norm", {{"y", args.y}, {"weight", args.weight}, {"bias", args.bias}, {"out", args.out}}));
  if (args.gate != nullptr) RWKV_RETURN_IF_ERROR(internal::CheckPointers("group_norm", {{"gate", args.gate}}));
  return internal::CheckEpsilon("group_norm", args.epsilon);
}

}  // namespace rwkv::kernels
