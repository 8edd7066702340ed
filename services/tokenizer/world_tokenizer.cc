#include "services/tokenizer/world_tokenizer.h"

#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "services/tokenizer/world_vocabulary.h"

namespace rwkv::tokenizer {
namespace {

absl::Status CheckTokens(const std::vector<std::string>& tokens, absl::string_view name) {
  absl::flat_hash_map<absl::string_view, size_t> ids;
  ids.reserve(tokens.size());
  for (size_t id = 0; id < tokens.size(); ++id) {
    const std::string& token = tokens[id];
    if (token.empty()) continue;
    if (token.size() > WorldTokenizer::kMaxTokenBytes) {
      return absl::InvalidArgumentError(absl::StrCat(name, ": token ", id, " has ", token.size(), " bytes, at most ",
                                                     WorldTokenizer::kMaxTokenBytes, " are allowed"));
    }
    const auto [it, inserted] = ids.try_emplace(token, id);
    if (!inserted) {
      return absl::InvalidArgumentError(absl::StrCat(name, ": token ", id, " is that of id ", it->second, " again"));
    }
  }
  for (int byte = 0; byte < 256; ++byte) {
    if (!ids.contains(std::string(1, static_cast<char>(byte)))) {
      return absl::InvalidArgumentError(
          absl::StrFormat("%s: no token is the single byte 0x%02x", std::string(name), byte));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<WorldTokenizer>> WorldTokenizer::FromString(absl::string_view vocabulary,
                                                                           absl::string_view name) {
  if (vocabulary.size() > kMaxFileBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, " has more than the ", kMaxFileBytes, " bytes of a vocabulary"));
  }
  absl::StatusOr<std::vector<std::string>> tokens = ParseWorldVocabulary(vocabulary, name);
  if (!tokens.ok()) return tokens.status();
  return FromTokens(*std::move(tokens), name);
}

absl::StatusOr<std::unique_ptr<WorldTokenizer>> WorldTokenizer::FromTokens(std::vector<std::string> tokens,
                                                                           absl::string_view name) {
  while (!tokens.empty() && tokens.back().empty()) tokens.pop_back();  // Padding.
  if (absl::Status status = CheckTokens(tokens, name); !status.ok()) return status;
  return std::unique_ptr<WorldTokenizer>(new WorldTokenizer(tokens));
}

WorldTokenizer::WorldTokenizer(const std::vector<std::string>& tokens) : trie_(tokens) {
  offsets_.reserve(tokens.size() + 1);
  offsets_.push_back(0);
  for (const std::string& token : tokens) {
    bytes_ += token;
    offsets_.push_back(static_cast<uint32_t>(bytes_.size()));
  }
}

std::vector<uint32_t> WorldTokenizer::Encode(absl::string_view bytes) const {
  std::vector<uint32_t> ids;
  ids.reserve(bytes.size() / 4 + 1);
  while (!bytes.empty()) {
    const ByteTrie::Match match = trie_.LongestPrefix(bytes);  // There is one: every single byte is a token.
    ids.push_back(match.id);
    bytes.remove_prefix(match.size);
  }
  return ids;
}

absl::string_view WorldTokenizer::TokenBytes(uint32_t id) const {
  if (id >= vocab_size()) return {};
  return absl::string_view(bytes_).substr(offsets_[id], offsets_[id + 1] - offsets_[id]);
}

}  // namespace rwkv::tokenizer
