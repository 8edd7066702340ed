// The GPT-NeoX 20B tokenizer, of RWKV's Pile and Raven models: byte-level BPE. Text goes through
//   added tokens that are not normalized ("<|endoftext|>") -> NFC -> added tokens that are (runs of blanks) ->
//   words (neox_words.h) -> bytes -> merges: the pair of lowest rank, the leftmost of these, until none is left.
// Source: huggingface/tokenizers, models/bpe; BlinkDL/ChatRWKV, 20B_tokenizer.json.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "services/tokenizer/byte_trie.h"
#include "services/tokenizer/neox_vocabulary.h"
#include "services/tokenizer/tokenizer.h"

namespace rwkv::tokenizer {

class NeoxTokenizer : public Tokenizer {
 public:
  // `json`: a Hugging Face tokenizer.json; `name` stands for its path in messages. kInvalidArgument: it is none, or not
  // that of a GPT-NeoX; see neox_vocabulary.h.
  static absl::StatusOr<std::unique_ptr<NeoxTokenizer>> FromString(absl::string_view json, absl::string_view name);

  absl::string_view name() const override { return "neox"; }
  // A tokenizer of text: what is not UTF-8 is replaced as by DecodeUtf8, and Decode(EncodePlain(x)) is NFC(x). Encode()
  // finds special tokens in any text, as the reference does; they decode to nothing. O(n log n).
  std::vector<uint32_t> Encode(absl::string_view bytes) const override;
  std::vector<uint32_t> EncodePlain(absl::string_view bytes) const override;
  absl::string_view TokenBytes(uint32_t id) const override;
  uint32_t vocab_size() const override { return static_cast<uint32_t>(tokens_.size()); }
  uint32_t end_of_text() const override { return end_of_text_; }

 private:
  class Merger;

  struct Merge {
    uint32_t rank = 0;
    uint32_t result = 0;
  };

  struct AddedTokens {  // By where they are looked for.
    AddedTokens(const NeoxVocabulary& vocabulary, bool with_special);

    ByteTrie raw;
    ByteTrie normalized;
  };

  explicit NeoxTokenizer(NeoxVocabulary vocabulary);

  std::vector<uint32_t> Encode(absl::string_view bytes, const AddedTokens& added) const;

  const std::vector<std::string> tokens_;
  const std::vector<uint32_t> byte_ids_;
  const uint32_t end_of_text_;
  const AddedTokens added_;                      // All of them.
  const AddedTokens plain_added_;                // Without the special ones.
  absl::flat_hash_map<uint64_t, Merge> merges_;  // By left << 32 | right.
};

}  // namespace rwkv::tokenizer
