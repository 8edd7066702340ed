// What every reader of checkpoints promises of the tensors it returns.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <vector>

#include "absl/types/optional.h"
#include "kernels/base/ggml_blocks.h"
#include "services/checkpoint/formats/element_type.h"
#include "services/checkpoint/formats/tensor_record.h"

namespace rwkv::testing {

// Aborts unless every element of every tensor lies inside a file of `file_bytes`.
inline void CheckRecords(const std::vector<checkpoint::TensorRecord>& records, uint64_t file_bytes) {
  for (const checkpoint::TensorRecord& record : records) {
    const absl::optional<int64_t> elements = checkpoint::ElementCount(record.shape);
    if (!elements.has_value() || record.offset < 0 || static_cast<uint64_t>(record.offset) > file_bytes) abort();
    if (!record.strides.empty() && record.strides.size() != record.shape.size()) abort();
    if (*elements == 0) continue;
    __int128 last = *elements - 1;  // Of a row-major tensor.
    if (!record.strides.empty()) {
      last = 0;
      for (size_t i = 0; i < record.shape.size(); ++i) {
        if (record.strides[i] < 0) abort();
        last += static_cast<__int128>(record.shape[i] - 1) * record.strides[i];
      }
    }
    const __int128 bytes = record.blocks == checkpoint::BlockType::kNone
                               ? (last + 1) * checkpoint::ElementSize(record.type)
                               : (last / kernels::BlockWeights(record.blocks) + 1) * kernels::BlockBytes(record.blocks);
    if (record.offset + bytes > static_cast<__int128>(file_bytes)) abort();
    if (bytes != checkpoint::StoredBytes(record)) abort();
  }
}

}  // namespace rwkv::testing
