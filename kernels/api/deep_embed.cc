#include "kernels/api/deep_embed.h"

#include "absl/strings/str_cat.h"
#include "kernels/api/check.h"
#include "kernels/base/status_macros.h"

namespace rwkv::kernels {

absl::Status Validate(const DeepEmbedArgs& args) {
  RWKV_RETURN_IF_ERROR(internal::CheckSizes("deep_embed", {{"rows", args.rows}, {"width", args.width}}));
  RWKV_RETURN_IF_ERROR(internal::CheckMatrix("deep_embed", "table", args.table));
  RWKV_RETURN_IF_ERROR(internal::CheckPointers("deep_embed", {{"tokens", args.tokens}, {"x", args.x}, {"y", args.y}}));
  if (args.table.cols != args.width * args.width) {
    return absl::InvalidArgumentError(
        absl::StrCat("deep_embed: table has ", args.table.cols, " columns, expected the square of ", args.width));
  }
  return internal::CheckTokens("deep_embed", args.tokens, args.rows, args.table.rows);
}

}  // namespace rwkv::kernels
