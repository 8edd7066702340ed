#include "kernels/api/wkv7.h"

#include "kernels/api/check.h"
#include "kernels/base/status_macros.h"

namespace rwkv::kernels {
namespace {

constexpr char kOp[] = "wkv7";

}  // namespace

absl::Status Validate(const Wkv7Args& args) {
  RWKV_RETURN_IF_ERROR(internal::CheckStep(kOp, args.step));
  RWKV_RETURN_IF_ERROR(internal::CheckSizes(kOp, {{"heads", args.heads}, {"head_size", args.head_size}}));
  RWKV_RETURN_IF_ERROR(internal::CheckPointers(kOp, {{"decay_bias", args.decay_bias},
                                                     {"iclr_bias", args.iclr_bias},
                                                     {"k_k", args.k_k},
                                                     {"k_a", args.k_a},
                                                     {"bonus", args.bonus},
                                                     {"ln_weight", args.ln_weight},
                                                     {"ln_bias", args.ln_bias},
                                                     {"r", args.r},
                                                     {"k", args.k},
                                                     {"v", args.v},
                                                     {"g", args.g},
                                                     {"decay_lora", args.decay_lora},
                                                     {"iclr_lora", args.iclr_lora},
                                                     {"y", args.y}}));
  if (args.value_gate_bias != nullptr || args.value_gate_lora != nullptr || args.v_first != nullptr) {
    RWKV_RETURN_IF_ERROR(internal::CheckPointers(kOp, {{"value_gate_bias", args.value_gate_bias},
                                                       {"value_gate_lora", args.value_gate_lora},
                                                       {"v_first", args.v_first}}));
  }
  RWKV_RETURN_IF_ERROR(internal::CheckEpsilon(kOp, args.epsilon));
  return internal::CheckState(kOp, "state", args.state, args.heads * args.head_size * args.head_size);
}

}  // namespace rwkv::kernels
