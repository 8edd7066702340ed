// Which tokens can be the last one of a text that ends with a stop string.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/types/optional.h"
#include "absl/types/span.h"
#include "services/tokenizer/tokenizer.h"

namespace rwkv::tokenizer {

// Ascending. Whatever tokens come before, a StopMatcher behind a StreamDecoder meets one of `stops` at none but these:
// tokens that begin with an end of one, or have one inside. Unset: a stop with U+FFFD in it, which bytes that are no
// text become, of any token. Looks at the whole vocabulary: about a millisecond.
absl::optional<std::vector<uint32_t>> CompletingTokens(const Tokenizer& tokenizer, absl::Span<const std::string> stops);

}  // namespace rwkv::tokenizer
