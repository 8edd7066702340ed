#include "kernels/api/token_shift.h"

#include "absl/strings/str_cat.h"
#include "kernels/api/check.h"
#include "kernels/base/status_macros.h"

namespace rwkv::kernels {

absl::Status Validate(const TokenShiftArgs& args) {
  RWKV_RETURN_IF_ERROR(internal::CheckSizes("token_shift", {{"width", args.width}, {"outputs", args.outputs}}));
  if (args.outputs > kMaxTokenShiftOutputs) {
    return absl::InvalidArgumentError(
        absl::StrCat("token_shift: outputs is ", args.outputs, ", more than ", kMaxTokenShiftOutputs));
  }
  RWKV_RETURN_IF_ERROR(internal::CheckPointers("token_shift", {{"x", args.x}}));
  for (int64_t m = 0; m < args.outputs; ++m) {
    RWKV_RETURN_IF_ERROR(internal::CheckPointers("token_shift", {{"mix", args.mix[m]}, {"y", args.y[m]}}));
    if (args.mix_delta[m] != nullptr) {
      RWKV_RETURN_IF_ERROR(internal::CheckPointers("token_shift", {{"mix_delta", args.mix_delta[m]}}));
    }
  }
  return internal::CheckStateAccess("token_shift", {args.spans, args.span_count, args.rows, args.state_pool, args.width,
                                                    args.state_stride, args.state_slots});
}

}  // namespace rwkv::kernels
