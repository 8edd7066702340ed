#include "kernels/api/check.h"

#include <cstdint>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/dtype.h"
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
  if (matrix.rows < 1 || matrix.rows >= kSizeLimit || matrix.cols < 1 || matrix.cols >= kSizeLimit) {
    return absl::InvalidArgumentError(
        absl::StrCat(op, ": ", name, " is [", matrix.rows, ", ", matrix.cols, "], its sizes are not in [1, 2^31)"));
  }
  switch (matrix.dtype) {
    case DType::kFloat32:
    case DType::kBFloat16:
    case DType::kFloat16:
      break;
    default:
      return absl::InvalidArgumentError(
          absl::StrCat(op, ": ", name, " has unknown dtype ", static_cast<int>(matrix.dtype)));
  }
  if (matrix.data == nullptr) return absl::InvalidArgumentError(absl::StrCat(op, ": ", name, " is null"));
  if (!IsAligned(matrix.data, SizeOf(matrix.dtype))) {
    return absl::InvalidArgumentError(
        absl::StrCat(op, ": ", name, " is not aligned to its element of ", SizeOf(matrix.dtype), " bytes"));
  }
  return absl::OkStatus();
}

absl::Status CheckStateAccess(absl::string_view op, const StateAccess& access) {
  RWKV_RETURN_IF_ERROR(CheckSizes(op, {{"rows", access.rows},
                                       {"span_count", access.span_count},
                                       {"state_slots", access.state_slots},
                                       {"state_stride", access.state_stride}}));
  RWKV_RETURN_IF_ERROR(CheckPointers(op, {{"spans", access.spans}, {"state_pool", access.state_pool}}));
  if (access.state_stride < access.state_size) {
    return absl::InvalidArgumentError(absl::StrCat(op, ": state_stride is ", access.state_stride,
                                                   ", less than a state of ", access.state_size, " floats"));
  }
  if (access.span_count > access.rows) {
    return absl::InvalidArgumentError(absl::StrCat(op, ": ", access.span_count, " spans for ", access.rows, " rows"));
  }
  int64_t next_row = 0;
  for (int64_t i = 0; i < access.span_count; ++i) {
    const SequenceSpan& span = access.spans[i];
    if (span.slot < 0 || span.slot >= access.state_slots) {
      return absl::InvalidArgumentError(
          absl::StrCat(op, ": slot ", span.slot, " is outside the pool of ", access.state_slots));
    }
    if (span.row_begin != next_row || span.row_count < 1 || span.row_count > access.rows - next_row) {
      return absl::InvalidArgumentError(absl::StrCat(op, ": span ", i, " has ", span.row_count, " rows from ",
                                                     span.row_begin, "; expected at least one from ", next_row, " of ",
                                                     access.rows));
    }
    next_row += span.row_count;
  }
  if (next_row != access.rows) {
    return absl::InvalidArgumentError(absl::StrCat(op, ": spans cover ", next_row, " of ", access.rows, " rows"));
  }
  if (access.span_count > 1) {
    absl::flat_hash_set<int32_t> seen;
    seen.reserve(static_cast<size_t>(access.span_count));
    for (int64_t i = 0; i < access.span_count; ++i) {
      if (!seen.insert(access.spans[i].slot).second) {
        return absl::InvalidArgumentError(absl::StrCat(op, ": slot ", access.spans[i].slot, " is given twice"));
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace rwkv::kernels::internal
