#include "services/tokenizer/neox_words.h"

#include "absl/strings/match.h"
#include "services/tokenizer/unicode.h"

namespace rwkv::tokenizer {
namespace {

// Bytes of the characters of `kind` that `text` begins with; `last_size`: of the last of them.
size_t RunSize(absl::string_view text, CharacterKind kind, size_t* last_size) {
  size_t size = 0;
  while (size < text.size()) {
    const Character character = FirstCharacter(text.substr(size));
    if (character.kind != kind) break;
    size += character.size;
    *last_size = character.size;
  }
  return size;
}

}  // namespace

size_t FirstWordSize(absl::string_view text) {
  if (text[0] == '\'') {
    for (absl::string_view contraction : {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"}) {
      if (absl::StartsWith(text, contraction)) return contraction.size();
    }
  }
  // A blank belongs to the word after it.
  const size_t blank = text[0] == ' ' ? 1 : 0;
  size_t last_size = 0;
  if (blank < text.size()) {
    const CharacterKind kind = FirstCharacter(text.substr(blank)).kind;
    if (kind != CharacterKind::kSpace) return blank + RunSize(text.substr(blank), kind, &last_size);
  }
  // White space; before a word it leaves its last character to the next match, unless it has no other.
  const size_t size = RunSize(text, CharacterKind::kSpace, &last_size);
  return size < text.size() && size > last_size ? size - last_size : size;
}

}  // namespace rwkv::tokenizer
