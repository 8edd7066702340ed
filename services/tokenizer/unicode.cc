#include "services/tokenizer/unicode.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "utf8proc.h"

namespace rwkv::tokenizer {
namespace {

constexpr size_t kMaxUtf8Bytes = 4;         // Of a character.
constexpr size_t kMaxDecomposedPoints = 4;  // Canonical decomposition of a code point; U+1F82 has 4.

struct CodePoint {
  utf8proc_int32_t value;
  size_t size;  // Bytes.
};

// `text`: UTF-8, not empty.
CodePoint First(absl::string_view text) {
  if (static_cast<unsigned char>(text[0]) < 0x80) return {text[0], 1};
  CodePoint point{};
  const utf8proc_ssize_t size = utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                                                 static_cast<utf8proc_ssize_t>(text.size()), &point.value);
  point.size = static_cast<size_t>(size);
  return point;
}

// The property White_Space, which is all but closed: its last change was in Unicode 6.3.
// Source: Unicode 15.0, PropList.txt.
bool IsSpace(utf8proc_int32_t point) {
  return (point >= 0x09 && point <= 0x0D) || point == 0x20 || point == 0x85 || point == 0xA0 || point == 0x1680 ||
         (point >= 0x2000 && point <= 0x200A) || point == 0x2028 || point == 0x2029 || point == 0x202F ||
         point == 0x205F || point == 0x3000;
}

CharacterKind KindOf(utf8proc_int32_t point) {
  if (IsSpace(point)) return CharacterKind::kSpace;
  switch (utf8proc_category(point)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
      return CharacterKind::kLetter;
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_NO:
      return CharacterKind::kNumber;
    default:
      return CharacterKind::kOther;
  }
}

// Normalization leaves these alone whatever is beside them, if that is of these ranges too: Latin without marks, Han,
// whole Hangul syllables. Most text needs no more than this test.
bool IsInert(utf8proc_int32_t point) {
  return point < 0x300 || (point >= 0x4E00 && point <= 0x9FFF) || (point >= 0xAC00 && point <= 0xD7A3);
}

int CombiningClass(utf8proc_int32_t point) { return static_cast<int>(utf8proc_get_property(point)->combining_class); }

}  // namespace

Character FirstCharacter(absl::string_view text) {
  static const std::array<CharacterKind, 0x80>& ascii = *[] {
    auto* const kinds = new std::array<CharacterKind, 0x80>;
    for (utf8proc_int32_t point = 0; point < 0x80; ++point) (*kinds)[static_cast<size_t>(point)] = KindOf(point);
    return kinds;
  }();
  const auto lead = static_cast<unsigned char>(text[0]);
  if (lead < 0x80) return {ascii[lead], 1};
  const CodePoint point = First(text);
  return {KindOf(point.value), point.size};
}

std::string NormalizeNfc(absl::string_view text) {
  bool inert = true;
  for (absl::string_view rest = text; inert && !rest.empty();) {
    const CodePoint point = First(rest);
    inert = IsInert(point.value);
    rest.remove_prefix(point.size);
  }
  if (inert) return std::string(text);

  std::vector<utf8proc_int32_t> points;  // Decomposed.
  points.reserve(text.size());
  while (!text.empty()) {
    const CodePoint point = First(text);
    text.remove_prefix(point.size);
    std::array<utf8proc_int32_t, kMaxDecomposedPoints> parts;
    const utf8proc_ssize_t count =
        utf8proc_decompose_char(point.value, parts.data(), parts.size(), UTF8PROC_DECOMPOSE, nullptr);
    points.insert(points.end(), parts.begin(), parts.begin() + count);
  }
  // utf8proc_decompose() would sort the marks too, but in quadratic time.
  for (auto begin = points.begin(); begin != points.end();) {
    if (CombiningClass(*begin) == 0) {
      ++begin;
      continue;
    }
    const auto end =
        std::find_if(begin, points.end(), [](utf8proc_int32_t point) { return CombiningClass(point) == 0; });
    std::stable_sort(begin, end,
                     [](utf8proc_int32_t a, utf8proc_int32_t b) { return CombiningClass(a) < CombiningClass(b); });
    begin = end;
  }
  const utf8proc_ssize_t composed =
      utf8proc_normalize_utf32(points.data(), static_cast<utf8proc_ssize_t>(points.size()),
                               static_cast<utf8proc_option_t>(UTF8PROC_COMPOSE | UTF8PROC_STABLE));
  std::string normalized;
  normalized.reserve(points.size());
  for (utf8proc_ssize_t i = 0; i < composed; ++i) {
    std::array<utf8proc_uint8_t, kMaxUtf8Bytes> bytes;
    const utf8proc_ssize_t size = utf8proc_encode_char(points[static_cast<size_t>(i)], bytes.data());
    normalized.append(bytes.begin(), bytes.begin() + size);
  }
  return normalized;
}

}  // namespace rwkv::tokenizer
