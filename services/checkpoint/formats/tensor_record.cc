#include "services/checkpoint/formats/tensor_record.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/base/printable.h"

namespace rwkv::checkpoint {

int64_t StoredElementSize(const TensorRecord& record) {
  return record.is_stored_double ? static_cast<int64_t>(sizeof(double)) : ElementSize(record.type);
}

bool IsPlain(const TensorRecord& record) {
  return !record.is_stored_double && record.blocks == BlockType::kNone && record.applied == Applied::kNothing &&
         record.exponent == 0;
}

bool IsRowMajor(const TensorRecord& record) {
  if (!record.order.empty()) return false;
  if (record.strides.empty() || ElementCount(record.shape) == 0) return true;
  int64_t expected = 1;
  for (size_t i = record.shape.size(); i-- > 0;) {
    if (record.shape[i] != 1 && record.strides[i] != expected) return false;
    expected *= record.shape[i];
  }
  return true;
}

int64_t StoredBytes(const TensorRecord& record) {
  const int64_t elements = ElementCount(record.shape).value_or(0);
  if (elements == 0) return 0;
  int64_t last = elements - 1;  // The index, in the order of the file.
  if (!record.strides.empty()) {
    last = 0;
    for (size_t i = 0; i < record.shape.size(); ++i) last += (record.shape[i] - 1) * record.strides[i];
  }
  if (record.blocks == BlockType::kNone) return (last + 1) * StoredElementSize(record);
  const int64_t per_block = PartBytes(record.blocks, record.part) / ElementSize(record.type);
  return (last / per_block + 1) * BlockBytes(record.blocks);
}

absl::optional<int64_t> ElementCount(absl::Span<const int64_t> shape) {
  int64_t count = 1;
  bool is_empty = false;
  for (int64_t size : shape) {
    if (size < 0) return absl::nullopt;
    if (size == 0) {
      is_empty = true;
    } else if (__builtin_mul_overflow(count, size, &count)) {
      return absl::nullopt;
    }
  }
  return is_empty ? 0 : count;
}

absl::optional<int64_t> ByteCount(absl::Span<const int64_t> shape, ElementType type) {
  const absl::optional<int64_t> count = ElementCount(shape);
  int64_t bytes = 0;
  if (!count.has_value() || __builtin_mul_overflow(*count, ElementSize(type), &bytes)) return absl::nullopt;
  return bytes;
}

std::string ShapeString(absl::Span<const int64_t> shape) { return absl::StrCat("[", absl::StrJoin(shape, ", "), "]"); }

std::string Quoted(absl::string_view name) {
  constexpr size_t kLongest = 160;
  const bool cut = name.size() > kLongest;
  return absl::StrCat("\"", kernels::Printable(name.substr(0, kLongest)), cut ? "..." : "", "\"");
}

}  // namespace rwkv::checkpoint
