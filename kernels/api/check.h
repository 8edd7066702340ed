// What the validations of the operations share. Messages name the operation, the thing and its value.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "kernels/api/sequence_span.h"
#include "kernels/api/state_pool.h"
#include "kernels/base/matrix.h"

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
absl::Status CheckEpsilon(absl::string_view op, float epsilon);
absl::Status CheckMatrix(absl::string_view op, absl::string_view name, const MatrixView& matrix);
// Each of `tokens` [rows] in [0, vocabulary).
absl::Status CheckTokens(absl::string_view op, const int32_t* tokens, int64_t rows, int64_t vocabulary);

// The spans cover the rows in order, and their slots are in the pools and all different.
absl::Status CheckSpans(absl::string_view op, const SequenceSpan* spans, int64_t span_count, int64_t rows,
                        int64_t state_slots);
// `state_size` is the floats of one slot's state.
absl::Status CheckStatePool(absl::string_view op, absl::string_view name, const StatePool& pool, int64_t state_size);

// Spans and the one pool they point into.
struct StateAccess {
  const SequenceSpan* spans;
  int64_t span_count;
  int64_t rows;
  const float* state_pool;
  int64_t state_size;
  int64_t state_stride;
  int64_t state_slots;
};
absl::Status CheckStateAccess(absl::string_view op, const StateAccess& access);

}  // namespace rwkv::kernels::internal
