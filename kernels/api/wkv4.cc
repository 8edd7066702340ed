#include "kernels/api/wkv4.h"

#include "kernels/api/check.h"
#include "kernels/base/status_macros.h"

namespace rwkv::kernels {
namespace {

constexpr char kOp[] = "wkv4";

}  // namespace

absl::Status Validate(const Wkv4Args& args) {
  RWKV_RETURN_IF_ERROR(internal::CheckStep(kOp, args.step));
  RWKV_RETURN_IF_ERROR(internal::CheckSizes(kOp, {{"width", args.width}}));
  RWKV_RETURN_IF_ERROR(internal::CheckPointers(
      kOp, {{"decay", args.decay}, {"bonus", args.bonus}, {"r", args.r}, {"k", args.k}, {"v", args.v}, {"y", args.y}}));
  RWKV_RETURN_IF_ERROR(internal::CheckState(kOp, "aa", args.aa, args.width));
  RWKV_RETURN_IF_ERROR(internal::CheckState(kOp, "bb", args.bb, args.width));
  return internal::CheckState(kOp, "pp", args.pp, args.width);
}

}  // namespace rwkv::kernels
