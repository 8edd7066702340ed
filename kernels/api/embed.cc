#include "kernels/api/embed.h"

#include "kernels/api/check.h"
#include "kernels/base/status_macros.h"

namespace rwkv::kernels {

absl::Status Validate(const EmbedArgs& args) {
  RWKV_RETURN_IF_ERROR(internal::CheckSizes("embed", {{"rows", args.rows}}));
  RWKV_RETURN_IF_ERROR(
      internal::CheckPointers("embed", {{"embedding", args.embedding}, {"tokens", args.tokens}, {"x", args.x}}));
  if (args.weight != nullptr || args.bias != nullptr) {
    RWKV_RETURN_IF_ERROR(internal::CheckPointers("embed", {{"weight", args.weight}, {"bias", args.bias}}));
  }
  return internal::CheckEpsilon("embed", args.epsilon);
}

}  // namespace rwkv::kernels
