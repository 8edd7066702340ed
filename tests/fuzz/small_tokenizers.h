// Tokenizers as small as they may be, in their file formats.
#pragma once

#include <string>

#include "absl/strings/string_view.h"

namespace rwkv::testing {

// Lines 1 to 256 of a World vocabulary: the single bytes.
std::string SingleByteLines();

// The single bytes, then a few tokens that compete.
std::string SmallWorldVocabulary();

// A NeoX tokenizer.json: bytes, a few merges, special tokens, runs of two and three blanks. `merges`: what stands
// between the brackets of model.merges.
std::string SmallNeoxTokenizer(absl::string_view merges = R"("t h","th e","Ġ t","Ġ the","Ã ©","a a","aa aa")");

}  // namespace rwkv::testing
