#include "kernels/api/mix_input.h"

#include "absl/strings/str_cat.h"
#include "kernels/api/check.h"
#include "kernels/base/status_macros.h"

namespace rwkv::kernels {
namespace {

constexpr char kOp[] = "mix_input";

}  // namespace

absl::Status Validate(const MixInputArgs& args) {
  RWKV_RETURN_IF_ERROR(internal::CheckStep(kOp, args.step));
  RWKV_RETURN_IF_ERROR(internal::CheckSizes(kOp, {{"width", args.width}, {"outputs", args.outputs}}));
  if (args.outputs > kMaxMixOutputs) {
    return absl::InvalidArgumentError(absl::StrCat(kOp, ": outputs is ", args.outputs, ", more than ", kMaxMixOutputs));
  }
  RWKV_RETURN_IF_ERROR(internal::CheckPointers(kOp, {{"x", args.x}}));
  if (args.weight != nullptr || args.bias != nullptr) {
    RWKV_RETURN_IF_ERROR(internal::CheckPointers(kOp, {{"weight", args.weight}, {"bias", args.bias}}));
  }
  RWKV_RETURN_IF_ERROR(internal::CheckOptionalPointers(kOp, {{"normed", args.normed}}));
  for (int64_t m = 0; m < args.outputs; ++m) {
    RWKV_RETURN_IF_ERROR(internal::CheckPointers(kOp, {{"mix", args.mix[m]}, {"y", args.y[m]}}));
    RWKV_RETURN_IF_ERROR(internal::CheckOptionalPointers(kOp, {{"mix_delta", args.mix_delta[m]}}));
  }
  RWKV_RETURN_IF_ERROR(internal::CheckEpsilon(kOp, args.epsilon));
  return internal::CheckState(kOp, "shift", args.shift, args.width);
}

}  // namespace rwkv::kernels
