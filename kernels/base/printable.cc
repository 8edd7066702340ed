#include "kernels/base/printable.h"

#include <cstddef>
#include <cstdint>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"

namespace rwkv::kernels {
namespace {

// Bytes of the character that `text` begins with, two to four; 0: none, or one of a single byte. RFC 3629, section 4.
size_t CharacterBytes(absl::string_view text) {
  const auto byte = [text](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t first = byte(0);
  const size_t size = first >= 0xc2 && first <= 0xdf   ? 2
                      : first >= 0xe0 && first <= 0xef ? 3
                      : first >= 0xf0 && first <= 0xf4 ? 4
                                                       : 0;
  if (size == 0 || text.size() < size) return 0;
  for (size_t i = 1; i < size; ++i) {
    if ((byte(i) & 0xc0) != 0x80) return 0;
  }
  // Longer than needed, surrogates, beyond U+10FFFF.
  if ((first == 0xe0 && byte(1) < 0xa0) || (first == 0xed && byte(1) > 0x9f) || (first == 0xf0 && byte(1) < 0x90) ||
      (first == 0xf4 && byte(1) > 0x8f)) {
    return 0;
  }
  // U+0080 to U+009F are control characters, U+2028 and U+2029 break lines.
  if (first == 0xc2 && byte(1) < 0xa0) return 0;
  if (first == 0xe2 && byte(1) == 0x80 && (byte(2) == 0xa8 || byte(2) == 0xa9)) return 0;
  return size;
}

}  // namespace

std::string Printable(absl::string_view bytes) {
  std::string text;
  while (!bytes.empty()) {
    const size_t size = CharacterBytes(bytes);
    if (size > 0) {
      absl::StrAppend(&text, bytes.substr(0, size));
      bytes.remove_prefix(size);
      continue;
    }
    absl::StrAppend(&text, absl::CHexEscape(bytes.substr(0, 1)));
    bytes.remove_prefix(1);
  }
  return text;
}

}  // namespace rwkv::kernels
