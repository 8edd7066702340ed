#include "kernels/api/embed.h"

#include "kernels/api/check.h"
#include "kernels/base/status_macros.h"

namespace rwkv::kernels {

absl::Status Validate(const EmbedArgs& args) {
  RWKV_RETURN_IF_ERROR(internal::CheckSizes("embed", {{"rows", args.rows}}));
  RWKV_RETURN_IF_ERROR(internal::CheckMatrix("embed", "embedding", args.embedding));
  RWKV_RETURN_IF_ERROR(internal::CheckPointers("embed", {{"tokens", args.tokens}, {"x", args.x}}));
  if (args.weight != nullptr || args.bias != nullptr) {
    RWKV_RETURN_IF_ERROR(internal::CheckPointers("embed", {{"weight", args.weight}, {"bias", args.bias}}));
  }
  RWKV_RETURN_IF_ERROR(internal::CheckEpsilon("embed", args.epsilon));
  return internal::CheckTokens("embed", args.tokens, args.rows, args.embedding.rows);
}

}  // namespace rwkv::kernels
