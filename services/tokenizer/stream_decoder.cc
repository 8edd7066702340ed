#include "services/tokenizer/stream_decoder.h"

#include <cstddef>

namespace rwkv::tokenizer {
namespace {

constexpr absl::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

enum class Kind { kCharacter, kIllFormed, kIncomplete };

struct Unit {
  Kind kind;
  size_t size;  // Bytes of the character, or of the longest part of one.
};

// What `bytes`, not empty, starts with. kIncomplete: all of it may still become one character.
// Source: Unicode 15, table 3-7, "Well-Formed UTF-8 Byte Sequences".
Unit First(absl::string_view bytes) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(bytes[i]); };
  const unsigned char lead = byte(0);
  if (lead < 0x80) return {Kind::kCharacter, 1};
  const size_t size = lead >= 0xC2 && lead <= 0xDF   ? 2
                      : (lead & 0xF0) == 0xE0        ? 3
                      : lead >= 0xF0 && lead <= 0xF4 ? 4
                                                     : 0;
  if (size == 0) return {Kind::kIllFormed, 1};
  for (size_t i = 1; i < size; ++i) {
    if (i == bytes.size()) return {Kind::kIncomplete, i};
    unsigned char low = 0x80;
    unsigned char high = 0xBF;
    if (i == 1) {
      if (lead == 0xE0) low = 0xA0;   // Shorter form exists.
      if (lead == 0xED) high = 0x9F;  // Surrogates.
      if (lead == 0xF0) low = 0x90;   // Shorter form exists.
      if (lead == 0xF4) high = 0x8F;  // Beyond U+10FFFF.
    }
    if (byte(i) < low || byte(i) > high) return {Kind::kIllFormed, i};
  }
  return {Kind::kCharacter, size};
}

// Appends the text of `bytes`, without a tail that may still become a character; returns that tail.
absl::string_view AppendDecoded(absl::string_view bytes, std::string& text) {
  while (!bytes.empty()) {
    const Unit unit = First(bytes);
    if (unit.kind == Kind::kIncomplete) return bytes;
    const absl::string_view part = unit.kind == Kind::kCharacter ? bytes.substr(0, unit.size) : kReplacement;
    text.append(part.data(), part.size());
    bytes.remove_prefix(unit.size);
  }
  return bytes;
}

}  // namespace

std::string StreamDecoder::Push(absl::string_view bytes) {
  std::string text;
  if (pending_.empty()) {
    pending_ = std::string(AppendDecoded(bytes, text));
  } else {
    pending_.append(bytes.data(), bytes.size());
    pending_ = std::string(AppendDecoded(pending_, text));
  }
  return text;
}

std::string StreamDecoder::Finish() {
  std::string text(pending_.empty() ? absl::string_view() : kReplacement);  // It is one ill-formed part.
  pending_.clear();
  return text;
}

std::string DecodeUtf8(absl::string_view bytes) {
  StreamDecoder decoder;
  std::string text = decoder.Push(bytes);
  text += decoder.Finish();
  return text;
}

bool IsValidUtf8(absl::string_view bytes) {
  while (!bytes.empty()) {
    const Unit unit = First(bytes);
    if (unit.kind != Kind::kCharacter) return false;
    bytes.remove_prefix(unit.size);
  }
  return true;
}

}  // namespace rwkv::tokenizer
