// Text to token ids and back. Byte strings in and out: nothing here fails on those that are not UTF-8.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace rwkv::tokenizer {

// Immutable after creation, hence thread-safe.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  virtual absl::string_view name() const = 0;  // As in v1::ModelInfo.tokenizer: "world", "neox".

  // Never fails: every byte string has ids. Encode(a) + Encode(b) is in general not Encode(a + b). Decode(Encode(x)) is
  // x, or what the kind says its text becomes.
  virtual std::vector<uint32_t> Encode(absl::string_view bytes) const = 0;

  // The same for text that somebody else wrote: what spells a special token there ("<|endoftext|>") is text too.
  virtual std::vector<uint32_t> EncodePlain(absl::string_view bytes) const { return Encode(bytes); }

  // The bytes of one token; empty for ids that have none (end of text, padding rows, ids beyond the vocabulary). Valid
  // as long as the tokenizer.
  virtual absl::string_view TokenBytes(uint32_t id) const = 0;

  // All tokens' bytes, joined. They need not be UTF-8; see StreamDecoder.
  std::string Decode(absl::Span<const uint32_t> ids) const;

  // One past the largest id with a meaning. A model's embedding may have more rows: those must never be drawn.
  virtual uint32_t vocab_size() const = 0;

  virtual uint32_t end_of_text() const = 0;  // Generation stops on it.
};

}  // namespace rwkv::tokenizer
