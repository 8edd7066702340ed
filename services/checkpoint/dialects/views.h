// What dialects do to a record: other names, other shapes of the same bytes. No element is read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/optional.h"
#include "absl/types/span.h"
#include "services/checkpoint/formats/tensor_record.h"

namespace rwkv::checkpoint {

// "blocks.3.att.key.weight" with prefix "blocks." is layer 3, "att.key.weight".
struct LayerName {
  int layer = 0;
  absl::string_view rest;
};
// Nothing for names that are not PREFIX, a decimal number, '.', more.
absl::optional<LayerName> ParseLayerName(absl::string_view name, absl::string_view prefix);
// "blocks.LAYER.rest"
std::string BlockName(int layer, absl::string_view rest);

bool AnyNameEndsWith(absl::Span<const TensorRecord> records, absl::string_view suffix);

// Exchanges two dimensions. kInvalidArgument: the tensor has not so many, or is a scalar.
absl::Status Transpose(size_t a, size_t b, TensorRecord* record);
// Dimension `axis` of n * k as two, [n, k]. kInvalidArgument: there is no such dimension, or it is no multiple of n.
absl::Status SplitDimension(size_t axis, int64_t n, TensorRecord* record);
// Dimension `axis` with its order.size() equal pieces in another order: piece n is what piece order[n] was.
// kInvalidArgument: there is no such dimension, or it has no such pieces.
absl::Status Reorder(size_t axis, absl::Span<const int> order, TensorRecord* record);
// Another shape for row-major elements. kInvalidArgument: another number of elements, or not row-major.
absl::Status Reshape(std::vector<int64_t> shape, TensorRecord* record);
// All dimensions of one dropped; a single element keeps one.
absl::Status Squeeze(TensorRecord* record);
// A row-major tensor of names.size() equal pieces along its first dimension, [n, ..., D]: one [1, 1, D] for each name.
// kInvalidArgument: other sizes, or stored in blocks.
absl::StatusOr<std::vector<TensorRecord>> SplitFused(const TensorRecord& fused, absl::Span<const std::string> names);

// Turns every matrix in blocks that the model multiplies by (matrix_names.h) into a pair X, X.scale (and X.min
// where the type has them); what else is stored in blocks reads as fp32. Whether there is a pair.
bool SplitBlocks(std::vector<TensorRecord>* records);

}  // namespace rwkv::checkpoint
