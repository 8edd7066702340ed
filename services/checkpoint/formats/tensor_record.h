// Where a format's reader found a tensor, and the checked arithmetic that all readers share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/optional.h"
#include "absl/types/span.h"
#include "kernels/base/ggml_blocks.h"
#include "services/checkpoint/formats/element_type.h"

namespace rwkv::checkpoint {

using kernels::BlockPart;
using kernels::BlockType;

// More than any model has (61 layers need 2,500), few enough that a hostile directory costs megabytes.
constexpr int kMaxTensors = 32768;
constexpr int kMaxTensorRank = 8;

// The function that a converter applied to a parameter x before it wrote it; reading takes it back.
enum class Applied : uint8_t {
  kNothing,
  kExp,             // The file holds exp(x).
  kNegativeExp,     // -exp(x)
  kExpNegativeExp,  // exp(-exp(x))
};

// A reader hands out records only after it has checked them against the file: every element they reach lies inside it.
struct TensorRecord {
  std::string name;
  ElementType type = ElementType::kFloat32;  // Of the elements as they are read; in the file too, but for `blocks`.
  std::vector<int64_t> shape;                // Each >= 0.
  std::vector<int64_t> strides;              // In elements, each >= 0, as many as shape; empty: row-major.
  int64_t offset = 0;                        // Bytes from the start of the file to element [0, 0, ...].
  int shard = 0;                             // Which file of a model in several.

  // One dimension whose equal pieces stand in another order in the file: piece n is the file's piece order[n]. With
  // strides only; empty: all as they stand.
  size_t reordered = 0;
  std::vector<int> order;

  bool is_stored_double = false;  // The file has fp64, which is read as the nearest fp32: type is kFloat32.

  // Elements that are not read as they stand in the file. With `blocks`, type is that of the part, and the strides
  // count weights; a part other than kWeights has none.
  BlockType blocks = BlockType::kNone;
  BlockPart part = BlockPart::kWeights;
  Applied applied = Applied::kNothing;  // Of type kFloat32 only.
  int exponent = 0;                     // The element times 2^exponent is meant; of fp32, bf16 and fp16 only.
};

// Bytes of an element in the file, not in blocks.
int64_t StoredElementSize(const TensorRecord& record);

// Whether the elements are those of the file, bit for bit.
bool IsPlain(const TensorRecord& record);

// Whether they lie in the file as row-major order wants them. The stride of a dimension of one means nothing.
bool IsRowMajor(const TensorRecord& record);

// Bytes from `offset` to the end of the last element's (or its block's), 0 if there is none.
int64_t StoredBytes(const TensorRecord& record);

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
