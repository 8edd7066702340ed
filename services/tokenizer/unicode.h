// What byte-pair tokenizers ask of Unicode. Tables: utf8proc 2.8, Unicode 15.0.
#pragma once

#include <cstddef>
#include <string>

#include "absl/strings/string_view.h"

namespace rwkv::tokenizer {

enum class CharacterKind {
  kLetter,  // General category L*.
  kNumber,  // General category N*.
  kSpace,   // White_Space.
  kOther,
};

struct Character {
  CharacterKind kind;
  size_t size;  // Bytes.
};

// `text`: UTF-8, not empty.
Character FirstCharacter(absl::string_view text);

// Normalization form C of UTF-8 text. Linear in its length, but for n log n in a run of n combining marks.
std::string NormalizeNfc(absl::string_view text);

}  // namespace rwkv::tokenizer
