#include "kernels/api/check.h"

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"

namespace rwkv::kernels::internal {
namespace {

constexpr int64_t kSizeLimit = int64_t{1} << 31;

}  // namespace

absl::Status CheckSizes(absl::string_view op, std::initializer_list<NamedSize> sizes) {
  for (const NamedSize& size : sizes) {
    if (size.value < 1 || size.value >= kSizeLimit) {
      return absl::InvalidArgumentError(absl::StrCat(op, ": ", size.name, " is ", size.value, ", not in [1, 2^31)"));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckPointers(absl::string_view op, std::initializer_list<NamedPointer> pointers) {
  for (const NamedPointer& pointer : pointers) {
    if (pointer.value == nullptr) return absl::InvalidArgumentError(absl::StrCat(op, ": ", pointer.name, " is null"));
  }
  return CheckOptionalPointers(op, pointers);
}

absl::Status CheckOptionalPointers(absl::string_view op, std::initializer_list<NamedPointer> pointers) {
  for (const NamedPointer& pointer : pointers) {
    if (reinterpret_cast<uintptr_t>(pointer.value) % 4 != 0) {
      return absl::InvalidArgumentError(absl::StrCat(op, ": ", pointer.name, " is not aligned to 4 bytes"));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckEpsilon(absl::string_view op, float epsilon) {
  if (epsilon >= 0.0f && epsilon <= 1.0f) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(op, ": epsilon is ", epsilon, ", not in [0, 1]"));
}

absl::Status CheckStep(absl::string_view op, const StepRows* step) {
  RWKV_RETURN_IF_ERROR(CheckPointers(op, {{"step", step}}));
  RWKV_RETURN_IF_ERROR(CheckSizes(op, {{"rows", step->rows}, {"span_count", step->span_count}}));
  return CheckPointers(op, {{"spans", step->spans}, {"tokens", step->tokens}});
}

absl::Status CheckState(absl::string_view op, absl::string_view name, const StateTensor& state, int64_t size) {
  RWKV_RETURN_IF_ERROR(CheckPointers(op, {{name, state.data}}));
  if (state.stride >= size && state.stride < kSizeLimit) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(op, ": ", name, " stride is ", state.stride, ", not in [", size,
                                                 ", 2^31), a state being ", size, " floats"));
}

}  // namespace rwkv::kernels::internal
