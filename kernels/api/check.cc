#include "kernels/api/check.h"

#include <cstdint>
#include <string>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/matrix.h"
#include "kernels/base/status_macros.h"

namespace rwkv::kernels::internal {
namespace {

constexpr int64_t kSizeLimit = int64_t{1} << 31;

bool IsAligned(const void* pointer, int64_t alignment) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(alignment) == 0;
}

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
    if (!IsAligned(pointer.value, 4)) {
      return absl::InvalidArgumentError(absl::StrCat(op, ": ", pointer.name, " is not aligned to 4 bytes"));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckEpsilon(absl::string_view op, float epsilon) {
  if (epsilon >= 0.0f && epsilon <= 1.0f) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(op, ": epsilon is ", epsilon, ", not in [0, 1]"));
}

absl::Status CheckMatrix(absl::string_view op, absl::string_view name, const MatrixView& matrix) {
  return kernels::CheckMatrix(absl::StrCat(op, ": ", name), matrix);
}

absl::Status CheckTokens(absl::string_view op, const int32_t* tokens, int64_t rows, int64_t vocabulary) {
  for (int64_t row = 0; row < rows; ++row) {
    if (tokens[row] < 0 || tokens[row] >= vocabulary) {
      return absl::InvalidArgumentError(
          absl::StrCat(op, ": token ", tokens[row], " in row ", row, " is outside the vocabulary of ", vocabulary));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckSpans(absl::string_view op, const SequenceSpan* spans, int64_t span_count, int64_t rows,
                        int64_t state_slots) {
  RWKV_RETURN_IF_ERROR(CheckSizes(op, {{"rows", rows}, {"span_count", span_count}, {"state_slots", state_slots}}));
  RWKV_RETURN_IF_ERROR(CheckPointers(op, {{"spans", spans}}));
  if (span_count > rows) {
    return absl::InvalidArgumentError(absl::StrCat(op, ": ", span_count, " spans for ", rows, " rows"));
  }
  int64_t next_row = 0;
  for (int64_t i = 0; i < span_count; ++i) {
    const SequenceSpan& span = spans[i];
    if (span.slot < 0 || span.slot >= state_slots) {
      return absl::InvalidArgumentError(
          absl::StrCat(op, ": slot ", span.slot, " is outside the pool of ", state_slots));
    }
    if (span.row_begin != next_row || span.row_count < 1 || span.row_count > rows - next_row) {
      return absl::InvalidArgumentError(absl::StrCat(op, ": span ", i, " has ", span.row_count, " rows from ",
                                                     span.row_begin, "; expected at least one from ", next_row, " of ",
                                                     rows));
    }
    next_row += span.row_count;
  }
  if (next_row != rows) {
    return absl::InvalidArgumentError(absl::StrCat(op, ": spans cover ", next_row, " of ", rows, " rows"));
  }
  if (span_count > 1) {
    absl::flat_hash_set<int32_t> seen;
    seen.reserve(static_cast<size_t>(span_count));
    for (int64_t i = 0; i < span_count; ++i) {
      if (!seen.insert(spans[i].slot).second) {
        return absl::InvalidArgumentError(absl::StrCat(op, ": slot ", spans[i].slot, " is given twice"));
      }
    }
  }
  return absl::OkStatus();
}

absl::Status CheckStatePool(absl::string_view op, absl::string_view name, const StatePool& pool, int64_t state_size) {
  const std::string stride_name = absl::StrCat(name, " stride");
  RWKV_RETURN_IF_ERROR(CheckSizes(op, {{stride_name, pool.stride}}));
  RWKV_RETURN_IF_ERROR(CheckPointers(op, {{name, pool.data}}));
  if (pool.stride < state_size) {
    return absl::InvalidArgumentError(
        absl::StrCat(op, ": ", stride_name, " is ", pool.stride, ", less than a state of ", state_size, " floats"));
  }
  return absl::OkStatus();
}

absl::Status CheckStateAccess(absl::string_view op, const StateAccess& access) {
  RWKV_RETURN_IF_ERROR(CheckSpans(op, access.spans, access.span_count, access.rows, access.state_slots));
  return CheckStatePool(op, "state_pool", {const_cast<float*>(access.state_pool), access.state_stride},
                        access.state_size);
}

}  // namespace rwkv::kernels::internal
