// Reads the GPT-NeoX tokenizer out of a Hugging Face `tokenizer.json`, such as 20B_tokenizer.json.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace rwkv::tokenizer {

struct NeoxVocabulary {
  struct Merge {  // Tokens `left`, `right`, side by side, become `result`.
    uint32_t left = 0;
    uint32_t right = 0;
    uint32_t result = 0;
  };
  struct AddedToken {  // Found in the text itself, before words and merges.
    uint32_t id = 0;
    std::string text;
    bool special = false;     // Has no text when decoded.
    bool normalized = false;  // Looked for in the normalized text; otherwise in the text as it came.
  };
  std::vector<std::string> tokens;       // Bytes by id; empty for special tokens.
  std::vector<uint32_t> byte_ids;        // [256], token of the single byte; kNoToken: one that UTF-8 does not use.
  std::vector<Merge> merges;             // By rank: the first goes first.
  std::vector<AddedToken> added_tokens;  // By id.
  uint32_t end_of_text = 0;              // Of "<|endoftext|>".

  static constexpr uint32_t kNoToken = 0xFFFFFFFF;
};

// Accepts the NeoX pipeline (NFC, byte-level words, BPE) and nothing else, since another would encode to other ids.
// Ids are 0 .. n-1, each once. Truncation and padding, if the file asks for them, are ignored: they are for training
// batches. kInvalidArgument, naming `name` and the member: the file is not JSON, too large or too deep, asks for
// something else, or contradicts itself. Needs at most some 30 times the memory of the file.
absl::StatusOr<NeoxVocabulary> ParseNeoxVocabulary(absl::string_view json, absl::string_view name);

constexpr size_t kMaxNeoxFileBytes = 8 << 20;  // 20B_tokenizer.json has 2.4 MB.
constexpr size_t kMaxNeoxTokenBytes = 1024;    // There the longest has 512.

}  // namespace rwkv::tokenizer
