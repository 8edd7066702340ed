// Which rows of a step belong to which sequence.
#pragma once

#include <cstdint>

namespace rwkv::kernels {

// A step computes packed rows, one per token, of several sequences: the rows of one sequence are consecutive and in
// token order. Spans are given in row order and cover all rows: the first begins at 0, each begins where the one before
// ended.
struct SequenceSpan {
  int32_t slot = 0;       // Row of the state pool; no two spans of a step share one.
  int64_t row_begin = 0;  // First row.
  int64_t row_count = 0;  // Tokens in this step, >= 1.
};

}  // namespace rwkv::kernels
