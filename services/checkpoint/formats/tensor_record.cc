#include "services/checkpoint/formats/tensor_record.h"

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace rwkv::checkpoint {

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
  return absl::StrCat("\"", absl::CHexEscape(name.substr(0, kLongest)), cut ? "..." : "", "\"");
}

}  // namespace rwkv::checkpoint
