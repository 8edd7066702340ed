#include "kernels/api/wkv7_output.h"

#include "kernels/api/check.h"
#include "kernels/base/status_macros.h"

namespace rwkv::kernels {

absl::Status Validate(const Wkv7OutputArgs& args) {
  RWKV_RETURN_IF_ERROR(
      internal::CheckSizes("wkv7_output", {{"rows", args.rows}, {"heads", args.heads}, {"head_size", args.head_size}}));
  RWKV_RETURN_IF_ERROR(internal::CheckPointers("wkv7_output", {{"ln_weight", args.ln_weight},
                                                               {"ln_bias", args.ln_bias},
                                                               {"bonus", args.bonus},
                                                               {"y", args.y},
                                                               {"r", args.r},
                                                               {"k", args.k},
                                                               {"v", args.v},
                                                               {"g", args.g},
                                                               {"out", args.out}}));
  return internal::CheckEpsilon("wkv7_output", args.epsilon);
}

}  // namespace rwkv::kernels
