#include "kernels/api/wkv6.h"

#include "kernels/api/check.h"
#include "kernels/base/status_macros.h"

namespace rwkv::kernels {

absl::Status Validate(const Wkv6Args& args) {
  RWKV_RETURN_IF_ERROR(internal::CheckSizes("wkv6", {{"heads", args.heads}, {"head_size", args.head_size}}));
  RWKV_RETURN_IF_ERROR(internal::CheckSizes("wkv6", {{"heads * head_size", args.heads * args.head_size}}));
  RWKV_RETURN_IF_ERROR(internal::CheckPointers(
      "wkv6", {{"r", args.r}, {"w", args.w}, {"k", args.k}, {"v", args.v}, {"bonus", args.bonus}, {"y", args.y}}));
  return internal::CheckStateAccess(
      "wkv6", {args.spans, args.span_count, args.rows, args.state_pool, args.heads * args.head_size * args.head_size,
               args.state_stride, args.state_slots});
}

}  // namespace rwkv::kernels
