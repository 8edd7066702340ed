// Which rows of a step belong to which sequence.
#pragma once

#include <cstdint>

namespace rwkv::kernels {

// The slot of rows that belong to nobody. Operations with a state give zeros for them and touch none.
inline constexpr int32_t kPaddingSlot = -1;

// A step computes packed rows, one per token, of several sequences: the rows of one sequence are consecutive and in
// token order. Spans are given in row order and cover all rows: the first begins at 0, each begins where the one before
// ended.
struct SequenceSpan {
  int32_t slot = 0;       // Row of the state pool, of which no two spans of a step share one; or kPaddingSlot.
  int64_t row_begin = 0;  // First row.
  int64_t row_count = 0;  // Tokens in this step, >= 1.
};

}  // namespace rwkv::kernels
