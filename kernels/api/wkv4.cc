#include "kernels/api/wkv4.h"

#include "kernels/api/check.h"
#include "kernels/base/status_macros.h"

namespace rwkv::kernels {

absl::Status Validate(const Wkv4Args& args) {
  RWKV_RETURN_IF_ERROR(internal::CheckSizes("wkv4", {{"width", args.width}}));
  RWKV_RETURN_IF_ERROR(internal::CheckPointers(
      "wkv4",
      {{"decay", args.decay}, {"bonus", args.bonus}, {"r", args.r}, {"k", args.k}, {"v", args.v}, {"y", args.y}}));
  RWKV_RETURN_IF_ERROR(internal::CheckSpans("wkv4", args.spans, args.span_count, args.rows, args.state_slots));
  RWKV_RETURN_IF_ERROR(internal::CheckStatePool("wkv4", "aa", args.aa, args.width));
  RWKV_RETURN_IF_ERROR(internal::CheckStatePool("wkv4", "bb", args.bb, args.width));
  return internal::CheckStatePool("wkv4", "pp", args.pp, args.width);
}

}  // namespace rwkv::kernels
