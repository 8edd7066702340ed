// The RWKV World tokenizer: greedy longest match over bytes, no normalisation, no merges.
// Source: BlinkDL/ChatRWKV, tokenizer/rwkv_tokenizer.py and rwkv_vocab_v20230424.txt.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "services/tokenizer/tokenizer.h"

namespace rwkv::tokenizer {

class WorldTokenizer : public Tokenizer {
 public:
  static constexpr uint32_t kEmbeddingRows = 65536;  // V of the models that were trained with it.
  static constexpr size_t kMaxFileBytes = 16 << 20;  // Of a vocabulary; the published one has 1.1 MB.
  static constexpr size_t kMaxTokenBytes = 1024;     // The published one has 128.

  // A vocabulary file has a line `<id> <literal> <length>` per token: ids rise from 1 without a gap, the literal is
  // what Python's repr() prints for str or bytes, length counts the token's bytes. Each of the 256 single bytes has to
  // be there. kNotFound, kPermissionDenied, ...: the file cannot be read. kInvalidArgument: it is malformed, naming the
  // line.
  static absl::StatusOr<std::unique_ptr<WorldTokenizer>> FromFile(const std::string& path);
  // `name` stands for the path in messages.
  static absl::StatusOr<std::unique_ptr<WorldTokenizer>> FromString(absl::string_view vocabulary,
                                                                    absl::string_view name);

  absl::string_view name() const override { return "world"; }
  std::vector<uint32_t> Encode(absl::string_view bytes) const override;
  absl::string_view TokenBytes(uint32_t id) const override;
  uint32_t vocab_size() const override { return static_cast<uint32_t>(offsets_.size() - 1); }
  uint32_t end_of_text() const override { return 0; }

 private:
  class TrieBuilder;

  WorldTokenizer() = default;

  std::string bytes_;              // All tokens, by id.
  std::vector<uint32_t> offsets_;  // Token id is bytes_[offsets_[id], offsets_[id + 1]); id 0 is empty.

  // A trie in a double array: the child of state s by byte b is states_[s].base + b, if that state's parent is s.
  struct State {
    int32_t base = 0;
    int32_t parent = -1;
    uint32_t token = 0;  // That ends here; 0: none.
  };
  std::vector<State> states_;
};

}  // namespace rwkv::tokenizer
