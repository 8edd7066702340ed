#include "services/tokenizer/world_tokenizer.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "services/tokenizer/world_vocabulary.h"

namespace rwkv::tokenizer {
namespace {

constexpr int32_t kAlphabet = 256;

absl::StatusOr<std::string> ReadFile(const std::string& path, size_t max_bytes) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"), &std::fclose);
  if (file == nullptr) return absl::ErrnoToStatus(errno, absl::StrCat("cannot open ", path));
  std::string content;
  char buffer[1 << 16];
  while (const size_t n = std::fread(buffer, 1, sizeof(buffer), file.get())) {
    content.append(buffer, n);
    if (content.size() > max_bytes) {
      return absl::InvalidArgumentError(absl::StrCat(path, " has more than the ", max_bytes, " bytes of a vocabulary"));
    }
  }
  if (std::ferror(file.get())) return absl::ErrnoToStatus(errno, absl::StrCat("cannot read ", path));
  return content;
}

}  // namespace

// Places the states of a trie in the double array.
class WorldTokenizer::TrieBuilder {
 public:
  // `tokens` by id, no two alike; [0] is not one. Outlives the builder.
  explicit TrieBuilder(const std::vector<std::string>& tokens) : tokens_(tokens), order_(tokens.size() - 1) {
    std::iota(order_.begin(), order_.end(), 1);
    std::sort(order_.begin(), order_.end(), [&](uint32_t a, uint32_t b) { return tokens_[a] < tokens_[b]; });
  }

  std::vector<State> Build() && {
    Reserve(kAlphabet);
    states_[0].parent = kRoot;
    struct Pending {
      int32_t state;
      size_t begin, end, depth;  // The tokens order_[begin, end) share their first `depth` bytes.
    };
    std::vector<Pending> pending = {{0, 0, order_.size(), 0}};
    while (!pending.empty()) {
      auto [state, begin, end, depth] = pending.back();
      pending.pop_back();
      if (begin < end && tokens_[order_[begin]].size() == depth) states_[state].token = order_[begin++];
      std::vector<std::pair<unsigned char, size_t>> children;  // The byte, and where its tokens begin.
      for (size_t i = begin; i < end; ++i) {
        const auto byte = static_cast<unsigned char>(tokens_[order_[i]][depth]);
        if (children.empty() || children.back().first != byte) children.emplace_back(byte, i);
      }
      if (children.empty()) continue;
      const int32_t base = FindBase(children);
      states_[state].base = base;
      for (size_t c = 0; c < children.size(); ++c) {
        const int32_t child = base + children[c].first;
        states_[child].parent = state;
        pending.push_back(
            {child, children[c].second, c + 1 < children.size() ? children[c + 1].second : end, depth + 1});
      }
    }
    while (states_.back().parent == kFree) states_.pop_back();
    states_.resize(states_.size() + kAlphabet);  // So that base + byte is always inside.
    return std::move(states_);
  }

 private:
  static constexpr int32_t kFree = -1;
  static constexpr int32_t kRoot = -2;

  int32_t FindBase(const std::vector<std::pair<unsigned char, size_t>>& children) {
    // First fit from where the array was last nearly full; a few tries are enough to keep it four fifths full.
    while (states_[first_free_].parent != kFree) Reserve(++first_free_ + kAlphabet);
    constexpr int kTries = 256;
    int32_t base = std::max(0, first_free_ - children[0].first);
    for (int tries = 0; tries < kTries; ++tries, ++base) {
      Reserve(base + kAlphabet);
      if (std::all_of(children.begin(), children.end(),
                      [&](const auto& child) { return states_[base + child.first].parent == kFree; })) {
        return base;
      }
    }
    const auto end = static_cast<int32_t>(states_.size());
    Reserve(end + kAlphabet);
    // The slots passed over stay for single children; give up those far behind.
    first_free_ = std::max(first_free_, end - 16 * kAlphabet);
    return end;
  }

  void Reserve(int32_t size) {
    if (static_cast<size_t>(size) > states_.size()) states_.resize(size);
  }

  const std::vector<std::string>& tokens_;
  std::vector<uint32_t> order_;  // Ids in order of their bytes.
  std::vector<State> states_;
  int32_t first_free_ = 1;
};

absl::StatusOr<std::unique_ptr<WorldTokenizer>> WorldTokenizer::FromFile(const std::string& path) {
  absl::StatusOr<std::string> content = ReadFile(path, kMaxFileBytes);
  if (!content.ok()) return content.status();
  return FromString(*content, path);
}

absl::StatusOr<std::unique_ptr<WorldTokenizer>> WorldTokenizer::FromString(absl::string_view vocabulary,
                                                                           absl::string_view name) {
  if (vocabulary.size() > kMaxFileBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, " has more than the ", kMaxFileBytes, " bytes of a vocabulary"));
  }
  absl::StatusOr<std::vector<std::string>> tokens = ParseWorldVocabulary(vocabulary, name, kMaxTokenBytes);
  if (!tokens.ok()) return tokens.status();
  std::unique_ptr<WorldTokenizer> tokenizer(new WorldTokenizer);
  tokenizer->offsets_.reserve(tokens->size() + 1);
  tokenizer->offsets_.push_back(0);
  for (const std::string& token : *tokens) {
    tokenizer->bytes_ += token;
    tokenizer->offsets_.push_back(static_cast<uint32_t>(tokenizer->bytes_.size()));
  }
  tokenizer->states_ = TrieBuilder(*tokens).Build();
  return tokenizer;
}

std::vector<uint32_t> WorldTokenizer::Encode(absl::string_view bytes) const {
  std::vector<uint32_t> ids;
  ids.reserve(bytes.size() / 4 + 1);
  const State* const states = states_.data();
  const auto* const data = reinterpret_cast<const unsigned char*>(bytes.data());
  for (size_t begin = 0; begin < bytes.size();) {
    int32_t state = 0;
    uint32_t token = 0;
    size_t token_end = begin;
    for (size_t i = begin; i < bytes.size(); ++i) {
      const int32_t next = states[state].base + data[i];
      if (states[next].parent != state) break;
      state = next;
      if (states[state].token != 0) {
        token = states[state].token;
        token_end = i + 1;
      }
    }
    ids.push_back(token);  // There is one: every single byte is a token.
    begin = token_end;
  }
  return ids;
}

absl::string_view WorldTokenizer::TokenBytes(uint32_t id) const {
  if (id >= vocab_size()) return {};
  return absl::string_view(bytes_).substr(offsets_[id], offsets_[id + 1] - offsets_[id]);
}

}  // namespace rwkv::tokenizer
