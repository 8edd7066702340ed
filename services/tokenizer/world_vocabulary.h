// Reads a World vocabulary file. Data only: literals are parsed here, never evaluated.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace rwkv::tokenizer {

// Token bytes by id; [0] is empty, since the file starts at id 1. A line ends in LF or CR LF; see WorldTokenizer for
// its form. kInvalidArgument naming `name` and the line: malformed, an id out of order, a length that does not fit, an
// empty token.
absl::StatusOr<std::vector<std::string>> ParseWorldVocabulary(absl::string_view vocabulary, absl::string_view name);

}  // namespace rwkv::tokenizer
