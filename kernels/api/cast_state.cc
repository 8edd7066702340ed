#include "kernels/api/cast_state.h"

#include "kernels/api/check.h"
#include "kernels/base/status_macros.h"

namespace rwkv::kernels {

absl::Status Validate(const CastStateArgs& args) {
  RWKV_RETURN_IF_ERROR(internal::CheckSizes("cast_state", {{"count", args.count}}));
  return internal::CheckPointers("cast_state", {{"wide", args.wide}, {"narrow", args.narrow}});
}

}  // namespace rwkv::kernels
