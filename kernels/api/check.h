// What the validations of the operations share. Messages name the operation, the thing and its value. Nothing here
// allocates while all is well: these run in every step.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "kernels/api/state_tensor.h"
#include "kernels/api/step_rows.h"

namespace rwkv::kernels::internal {

struct NamedSize {
  absl::string_view name;
  int64_t value;
};

struct NamedPointer {
  absl::string_view name;
  const void* value;
};

// 1 <= size < 2^31 each, so that products of two sizes cannot overflow.
absl::Status CheckSizes(absl::string_view op, std::initializer_list<NamedSize> sizes);

// Not null, aligned to four bytes.
absl::Status CheckPointers(absl::string_view op, std::initializer_list<NamedPointer> pointers);
// The same, or null.
absl::Status CheckOptionalPointers(absl::string_view op, std::initializer_list<NamedPointer> pointers);

absl::Status CheckEpsilon(absl::string_view op, float epsilon);

// Given, and not empty: what it says has been checked by StepRowsLoader.
absl::Status CheckStep(absl::string_view op, const StepRows* step);

// `size` is the floats of one slot's state.
absl::Status CheckState(absl::string_view op, absl::string_view name, const StateTensor& state, int64_t size);

}  // namespace rwkv::kernels::internal
