#include "kernels/api/sample.h"

#include "kernels/api/check.h"
#include "kernels/base/status_macros.h"

namespace rwkv::kernels {

absl::Status Validate(const SampleArgs& args) {
  RWKV_RETURN_IF_ERROR(internal::CheckSizes("sample", {{"count", args.count}, {"vocab", args.vocab}}));
  RWKV_RETURN_IF_ERROR(internal::CheckPointers(
      "sample",
      {{"logits", args.logits}, {"rows", args.rows}, {"adjusted", args.adjusted}, {"results", args.results}}));
  return internal::CheckOptionalPointers("sample", {{"edits", args.edits}});
}

}  // namespace rwkv::kernels
