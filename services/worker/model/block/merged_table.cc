#include "services/worker/model/block/merged_table.h"

#include <utility>

#include "kernels/api/embed.h"
#include "kernels/api/products.h"
#include "kernels/base/status_macros.h"

namespace rwkv::worker {

absl::StatusOr<MergedTable> MergedTable::Create(kernels::Device& device, const kernels::Weight& table,
                                                const kernels::Weight& map) {
  MergedTable merged(table, map);
  RWKV_ASSIGN_OR_RETURN(merged.rows_,
                        kernels::DeviceArray<float>::Create(device, table.matrix.rows * table.matrix.cols));
  return merged;
}

absl::Status MergedTable::Make(const kernels::OpTable& ops, absl::Span<const int32_t> ids, const int32_t* device_ids,
                               const float* embedded, float* scratch, kernels::Stream& stream) {
  const auto count = static_cast<int64_t>(ids.size());
  kernels::EmbedArgs lookup;
  lookup.rows = count;
  lookup.tokens = device_ids;
  lookup.embedding = &table_;
  lookup.x = scratch;
  RWKV_RETURN_IF_ERROR(ops.embed(lookup, stream));
  kernels::Product add;
  add.weight = &map_;
  add.x = embedded;
  add.accumulate = true;
  add.y = scratch;
  RWKV_RETURN_IF_ERROR(ops.products({count, &add, 1}, stream));
  const int64_t row_bytes = width() * static_cast<int64_t>(sizeof(float));
  for (int64_t row = 0; row < count; ++row) {
    RWKV_RETURN_IF_ERROR(stream.Copy(rows_.data() + ids[row] * width(), scratch + row * width(), row_bytes));
  }
  return absl::OkStatus();
}

}  // namespace rwkv::worker
