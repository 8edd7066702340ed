#include "kernels/api/wkv6.h"

#include "kernels/api/check.h"
#include "kernels/base/status_macros.h"

namespace rwkv::kernels {
namespace {

constexpr char kOp[] = "wkv6";

}  // namespace

absl::Status Validate(const Wkv6Args& args) {
  RWKV_RETURN_IF_ERROR(internal::CheckStep(kOp, args.step));
  RWKV_RETURN_IF_ERROR(internal::CheckSizes(kOp, {{"heads", args.heads}, {"head_size", args.head_size}}));
  RWKV_RETURN_IF_ERROR(internal::CheckPointers(kOp, {{"bonus", args.bonus},
                                                     {"ln_weight", args.ln_weight},
                                                     {"ln_bias", args.ln_bias},
                                                     {"r", args.r},
                                                     {"w", args.w},
                                                     {"k", args.k},
                                                     {"v", args.v},
                                                     {"y", args.y}}));
  RWKV_RETURN_IF_ERROR(internal::CheckOptionalPointers(kOp, {{"gate", args.gate}}));
  RWKV_RETURN_IF_ERROR(internal::CheckEpsilon(kOp, args.epsilon));
  return internal::CheckState(kOp, "state", args.state, args.heads * args.head_size * args.head_size);
}

}  // namespace rwkv::kernels
