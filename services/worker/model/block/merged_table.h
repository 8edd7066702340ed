// DeepEmbed's tables: per token id one row,
//   row[id] = table[id] + map * LN(embedding[id]; ln0)
// Source: BlinkDL/RWKV-LM RWKV-v7/rwkv_v7b_demo.py, which merges whole tables when it loads. They would be larger than
// the model, so here a row is made when its id is first seen, and kept.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/api/op_table.h"
#include "kernels/base/device.h"
#include "kernels/base/stream.h"
#include "kernels/base/weight.h"

namespace rwkv::worker {

// A table in device memory whose rows are filled one by one. Owned by one thread, as its stage is.
class MergedTable {
 public:
  // The weights live on. Address space for all rows at once; on a CPU memory only for those that are made.
  // kResourceExhausted: no memory.
  static absl::StatusOr<MergedTable> Create(kernels::Device& device, const kernels::Weight& table,
                                            const kernels::Weight& map);

  // Makes the rows of `ids`, which are given in host and in device memory; embedded [rows, D] holds their rows of the
  // embedding, `scratch` has room for rows * width().
  absl::Status Make(const kernels::OpTable& ops, absl::Span<const int32_t> ids, const int32_t* device_ids,
                    const float* embedded, float* scratch, kernels::Stream& stream);

  int64_t width() const { return table_.matrix.cols; }
  const float* rows() const { return rows_.data(); }  // [V, width]; only rows that were made mean anything.

 private:
  MergedTable(const kernels::Weight& table, const kernels::Weight& map) : table_(table), map_(map) {}

  const kernels::Weight& table_;
  const kernels::Weight& map_;
  kernels::DeviceArray<float> rows_;
};

}  // namespace rwkv::worker
