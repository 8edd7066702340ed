// Lays int8 weights by their inputs: columns.h.
#pragma once

#include "absl/status/statusor.h"
#include "kernels/base/buffer.h"
#include "kernels/base/matrix.h"
#include "kernels/cpu/thread_team.h"

namespace rwkv::kernels::cpu {

// `matrix` is of kInt8 without minimums; `team` does it side by side. kResourceExhausted: no memory.
absl::StatusOr<Buffer> PackColumns(const MatrixView& matrix, ThreadTeam& team);

}  // namespace rwkv::kernels::cpu
