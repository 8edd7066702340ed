// Where a format's reader found a tensor, and the checked arithmetic that all readers share.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/optional.h"
#include "absl/types/span.h"
#include "services/checkpoint/formats/element_type.h"

namespace rwkv::checkpoint {

// More than any model has (61 layers need 2,500), few enough that a hostile directory costs megabytes.
constexpr int kMaxTensors = 32768;
constexpr int kMaxTensorRank = 8;

// A reader hands out records only after it has checked them against the file: every element they reach lies inside it.
struct TensorRecord {
  std::string name;
  ElementType type = ElementType::kFloat32;
  std::vector<int64_t> shape;    // Each >= 0.
  std::vector<int64_t> strides;  // In elements, each >= 0, as many as shape; empty: row-major.
  int64_t offset = 0;            // Bytes from the start of the file to element [0, 0, ...].
};

// Number of elements; nothing if a size is negative or the product does not fit (counting zero sizes as one, so that
// no order of multiplication can overflow).
absl::optional<int64_t> ElementCount(absl::Span<const int64_t> shape);
// The same times the element's size.
absl::optional<int64_t> ByteCount(absl::Span<const int64_t> shape, ElementType type);

// For messages: "[2, 64]".
std::string ShapeString(absl::Span<const int64_t> shape);
// For messages: a name from the file in quotes, escaped and cut to a length that a log line bears.
std::string Quoted(absl::string_view name);

}  // namespace rwkv::checkpoint
