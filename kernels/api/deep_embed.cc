#include "kernels/api/deep_embed.h"

#include "kernels/api/check.h"
#include "kernels/base/status_macros.h"

namespace rwkv::kernels {

absl::Status Validate(const DeepEmbedArgs& args) {
  RWKV_RETURN_IF_ERROR(internal::CheckSizes("deep_embed", {{"rows", args.rows}, {"width", args.width}}));
  return internal::CheckPointers("deep_embed", {{"matrices", args.matrices}, {"x", args.x}, {"y", args.y}});
}

}  // namespace rwkv::kernels
