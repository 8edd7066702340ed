// The RWKV World tokenizer: greedy longest match over bytes, no normalisation, no merges.
// Source: BlinkDL/ChatRWKV, tokenizer/rwkv_tokenizer.py and rwkv_vocab_v20230424.txt.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "services/tokenizer/byte_trie.h"
#include "services/tokenizer/tokenizer.h"

namespace rwkv::tokenizer {

class WorldTokenizer : public Tokenizer {
 public:
  static constexpr size_t kMaxFileBytes = 16 << 20;  // Of a vocabulary; the published one has 1.1 MB.
  static constexpr size_t kMaxTokenBytes = 1024;     // The published one has 128.

  // A vocabulary file has a line `<id> <literal> <length>` per token: ids rise from 1 without a gap, the literal is
  // what Python's repr() prints for str or bytes, length counts the token's bytes. `name` stands for the file's path in
  // messages. kInvalidArgument: it is malformed, naming the line, or FromTokens() would not take its tokens.
  static absl::StatusOr<std::unique_ptr<WorldTokenizer>> FromString(absl::string_view vocabulary,
                                                                    absl::string_view name);

  // A vocabulary that came another way, such as inside a model's file. Token bytes by id; one without bytes has no
  // text: end of text, padding. kInvalidArgument: a single byte is no token, two tokens are alike, or one is too long.
  static absl::StatusOr<std::unique_ptr<WorldTokenizer>> FromTokens(std::vector<std::string> tokens,
                                                                    absl::string_view name);

  absl::string_view name() const override { return "world"; }
  std::vector<uint32_t> Encode(absl::string_view bytes) const override;
  absl::string_view TokenBytes(uint32_t id) const override;
  uint32_t vocab_size() const override { return static_cast<uint32_t>(offsets_.size() - 1); }
  uint32_t end_of_text() const override { return 0; }

 private:
  explicit WorldTokenizer(const std::vector<std::string>& tokens);

  std::string bytes_;              // All tokens, by id.
  std::vector<uint32_t> offsets_;  // Token id is bytes_[offsets_[id], offsets_[id + 1]).
  const ByteTrie trie_;
};

}  // namespace rwkv::tokenizer
