#include "kernels/api/wkv7_prepare.h"

#include "kernels/api/check.h"
#include "kernels/base/status_macros.h"

namespace rwkv::kernels {

absl::Status Validate(const Wkv7PrepareArgs& args) {
  RWKV_RETURN_IF_ERROR(internal::CheckSizes(
      "wkv7_prepare", {{"rows", args.rows}, {"heads", args.heads}, {"head_size", args.head_size}}));
  RWKV_RETURN_IF_ERROR(internal::CheckPointers("wkv7_prepare", {{"decay_bias", args.decay_bias},
                                                                {"iclr_bias", args.iclr_bias},
                                                                {"k_k", args.k_k},
                                                                {"k_a", args.k_a},
                                                                {"decay_lora", args.decay_lora},
                                                                {"iclr_lora", args.iclr_lora},
                                                                {"k", args.k},
                                                                {"v", args.v},
                                                                {"w", args.w},
                                                                {"a", args.a},
                                                                {"b", args.b}}));
  if (args.value_gate_bias != nullptr || args.value_gate_lora != nullptr || args.v_first != nullptr) {
    return internal::CheckPointers("wkv7_prepare", {{"value_gate_bias", args.value_gate_bias},
                                                    {"value_gate_lora", args.value_gate_lora},
                                                    {"v_first", args.v_first}});
  }
  return absl::OkStatus();
}

}  // namespace rwkv::kernels
