// Lays int8 weights by their inputs: columns.h.
#pragma once

#include "absl/status/statusor.h"
#include "kernels/base/buffer.h"
#include "kernels/base/matrix.h"

namespace rwkv::kernels::cpu {

// `matrix` is of kInt8 without minimums. kResourceExhausted: no memory.
absl::StatusOr<Buffer> PackColumns(const MatrixView& matrix);

}  // namespace rwkv::kernels::cpu
