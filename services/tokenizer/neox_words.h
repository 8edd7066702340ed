// The pre-tokenizer of GPT-2, which GPT-NeoX shares: cuts text into words, across which no merge goes.
#pragma once

#include <cstddef>

#include "absl/strings/string_view.h"

namespace rwkv::tokenizer {

// Bytes of the first word of `text`, which is UTF-8 and not empty: the leftmost match of
//   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
// Every text begins with a match. Cutting a whole text costs time linear in its length.
// Source: openai/gpt-2, src/encoder.py; huggingface/tokenizers, pre_tokenizers/byte_level.rs.
size_t FirstWordSize(absl::string_view text);

}  // namespace rwkv::tokenizer
