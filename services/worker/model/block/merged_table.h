// DeepEmbed's tables: per token id one row,
//   row[id] = table[id] + map * LN(embedding[id]; ln0)
// Source: BlinkDL/RWKV-LM RWKV-v7/rwkv_v7b_demo.py, which merges whole tables when it loads. They would be larger than
// the model, so here a row is made when its id is first seen, and kept.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/api/op_table.h"
#include "kernels/base/matrix.h"
#include "kernels/base/stream.h"

namespace rwkv::worker {

// row of `rows` ids: out [rows, table.cols]; embedded [rows, D] holds their rows of the embedding.
absl::Status MergeRows(const kernels::OpTable& ops, const kernels::MatrixView& table, const kernels::MatrixView& map,
                       const int32_t* ids, int64_t rows, const float* embedded, float* out, kernels::Stream& stream);

// A table in host memory whose rows are filled one by one. Owned by one thread, as its stage is.
class MergedTable {
 public:
  // Views of the file, which live on. Address space for all rows at once, memory only for those that are made.
  // kResourceExhausted: no such address space.
  static absl::StatusOr<MergedTable> Create(const kernels::MatrixView& table, const kernels::MatrixView& map);

  // Makes the rows of `ids`; `embedded` as above, `scratch` has room for rows * width().
  absl::Status Make(const kernels::OpTable& ops, const int32_t* ids, int64_t rows, const float* embedded,
                    float* scratch, kernels::Stream& stream);

  int64_t width() const { return table_.cols; }
  kernels::MatrixView view() const;  // [V, width], fp32; only rows that were made mean anything.

 private:
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };

  MergedTable(const kernels::MatrixView& table, const kernels::MatrixView& map) : table_(table), map_(map) {}

  kernels::MatrixView table_;
  kernels::MatrixView map_;
  std::unique_ptr<float, Free> rows_;
};

}  // namespace rwkv::worker
