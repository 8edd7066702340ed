#include "services/worker/model/block/merged_table.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/api/embed.h"
#include "kernels/api/matmul.h"
#include "kernels/base/status_macros.h"

namespace rwkv::worker {

absl::Status MergeRows(const kernels::OpTable& ops, const kernels::MatrixView& table, const kernels::MatrixView& map,
                       const int32_t* ids, int64_t rows, const float* embedded, float* out, kernels::Stream& stream) {
  kernels::EmbedArgs lookup;
  lookup.rows = rows;
  lookup.tokens = ids;
  lookup.embedding = table;
  lookup.x = out;
  RWKV_RETURN_IF_ERROR(ops.embed(lookup, stream));
  kernels::MatmulArgs add;
  add.rows = rows;
  add.weight = map;
  add.x = embedded;
  add.accumulate = true;
  add.y = out;
  return ops.matmul(add, stream);
}

absl::StatusOr<MergedTable> MergedTable::Create(const kernels::MatrixView& table, const kernels::MatrixView& map) {
  MergedTable merged(table, map);
  // Pages of zeros until they are written.
  merged.rows_.reset(static_cast<float*>(std::calloc(table.rows * table.cols, sizeof(float))));
  if (merged.rows_ == nullptr) {
    return absl::ResourceExhaustedError(absl::StrCat("no memory for a table of ", table.rows, " rows of ", table.cols));
  }
  return merged;
}

absl::Status MergedTable::Make(const kernels::OpTable& ops, const int32_t* ids, int64_t rows, const float* embedded,
                               float* scratch, kernels::Stream& stream) {
  RWKV_RETURN_IF_ERROR(MergeRows(ops, table_, map_, ids, rows, embedded, scratch, stream));
  RWKV_RETURN_IF_ERROR(stream.Synchronize());
  for (int64_t row = 0; row < rows; ++row) {
    std::copy_n(scratch + row * width(), width(), rows_.get() + ids[row] * width());
  }
  return absl::OkStatus();
}

kernels::MatrixView MergedTable::view() const {
  kernels::MatrixView view;
  view.rows = table_.rows;
  view.cols = table_.cols;
  view.data = rows_.get();
  return view;
}

}  // namespace rwkv::worker
