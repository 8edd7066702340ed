#include "services/tokenizer/neox_tokenizer.h"

#include <algorithm>
#include <utility>

#include "absl/functional/function_ref.h"
#include "services/tokenizer/neox_words.h"
#include "services/tokenizer/stream_decoder.h"
#include "services/tokenizer/unicode.h"

namespace rwkv::tokenizer {
namespace {

uint64_t PairKey(uint32_t left, uint32_t right) { return static_cast<uint64_t>(left) << 32 | right; }

// The added tokens looked for at one place, by id.
std::vector<std::string> TextsOf(const NeoxVocabulary& vocabulary, bool normalized, bool with_special) {
  std::vector<std::string> texts(vocabulary.added_tokens.back().id + 1);  // There is one, of the end of text.
  for (const NeoxVocabulary::AddedToken& token : vocabulary.added_tokens) {
    if (token.normalized == normalized && (with_special || !token.special)) texts[token.id] = token.text;
  }
  return texts;
}

// Appends the ids of the tokens of `added` found in `text`, leftmost and longest; what is between them goes to
// `between` in turn.
void Split(absl::string_view text, const ByteTrie& added, std::vector<uint32_t>& ids,
           absl::FunctionRef<void(absl::string_view)> between) {
  size_t begin = 0;
  for (size_t i = 0; i < text.size();) {
    const ByteTrie::Match match = added.LongestPrefix(text.substr(i));
    if (match.size == 0) {
      ++i;
      continue;
    }
    if (begin < i) between(text.substr(begin, i - begin));
    ids.push_back(match.id);
    begin = i += match.size;
  }
  if (begin < text.size()) between(text.substr(begin));
}

}  // namespace

// Merges one word after the other; keeps its memory between them.
class NeoxTokenizer::Merger {
 public:
  explicit Merger(const NeoxTokenizer& tokenizer) : tokenizer_(tokenizer) {}

  // `word`: UTF-8.
  void Append(absl::string_view word, std::vector<uint32_t>& ids) {
    const auto size = static_cast<uint32_t>(word.size());
    symbols_.resize(size);
    for (uint32_t i = 0; i < size; ++i) {
      symbols_[i] = {tokenizer_.byte_ids_[static_cast<unsigned char>(word[i])], i == 0 ? 0 : i - 1, i + 1};
    }
    candidates_.clear();
    for (uint32_t i = 0; i + 1 < size; ++i) Consider(i, size);
    while (!candidates_.empty()) {
      std::pop_heap(candidates_.begin(), candidates_.end(), After);
      const Candidate candidate = candidates_.back();
      candidates_.pop_back();
      Symbol& left = symbols_[candidate.left];
      // Either symbol may have been merged since.
      if (left.next >= size || PairKey(left.id, symbols_[left.next].id) != candidate.pair) continue;
      left.id = candidate.result;
      Symbol& gone = symbols_[left.next];
      gone.id = NeoxVocabulary::kNoToken;
      left.next = gone.next;
      if (left.next < size) symbols_[left.next].previous = candidate.left;
      if (candidate.left > 0) Consider(left.previous, size);
      Consider(candidate.left, size);
    }
    for (uint32_t i = 0; i < size; i = symbols_[i].next) ids.push_back(symbols_[i].id);
  }

 private:
  struct Symbol {           // At the place of its first byte.
    uint32_t id = 0;        // kNoToken: merged into the one before.
    uint32_t previous = 0;  // Of the first: itself.
    uint32_t next = 0;      // Of the last: the word's size.
  };
  struct Candidate {
    uint32_t rank;
    uint32_t left;  // Its place.
    uint64_t pair;
    uint32_t result;
  };

  static bool After(const Candidate& a, const Candidate& b) {
    return std::make_pair(a.rank, a.left) > std::make_pair(b.rank, b.left);
  }

  // Notes the merge of the symbol at `left` with the next, if there is one.
  void Consider(uint32_t left, uint32_t size) {
    const uint32_t next = symbols_[left].next;
    if (next >= size) return;
    const uint64_t pair = PairKey(symbols_[left].id, symbols_[next].id);
    const auto it = tokenizer_.merges_.find(pair);
    if (it == tokenizer_.merges_.end()) return;
    candidates_.push_back({it->second.rank, left, pair, it->second.result});
    std::push_heap(candidates_.begin(), candidates_.end(), After);
  }

  const NeoxTokenizer& tokenizer_;
  std::vector<Symbol> symbols_;
  std::vector<Candidate> candidates_;  // A heap: the next merge on top. At most three for each byte of the word.
};

NeoxTokenizer::AddedTokens::AddedTokens(const NeoxVocabulary& vocabulary, bool with_special)
    : raw(TextsOf(vocabulary, /*normalized=*/false, with_special)),
      normalized(TextsOf(vocabulary, /*normalized=*/true, with_special)) {}

NeoxTokenizer::NeoxTokenizer(NeoxVocabulary vocabulary)
    : tokens_(std::move(vocabulary.tokens)),
      byte_ids_(std::move(vocabulary.byte_ids)),
      end_of_text_(vocabulary.end_of_text),
      added_(vocabulary, /*with_special=*/true),
      plain_added_(vocabulary, /*with_special=*/false) {
  merges_.reserve(vocabulary.merges.size());
  for (uint32_t rank = 0; rank < vocabulary.merges.size(); ++rank) {
    const NeoxVocabulary::Merge& merge = vocabulary.merges[rank];
    merges_.emplace(PairKey(merge.left, merge.right), Merge{rank, merge.result});
  }
}

absl::StatusOr<std::unique_ptr<NeoxTokenizer>> NeoxTokenizer::FromString(absl::string_view json,
                                                                         absl::string_view name) {
  absl::StatusOr<NeoxVocabulary> vocabulary = ParseNeoxVocabulary(json, name);
  if (!vocabulary.ok()) return vocabulary.status();
  return std::unique_ptr<NeoxTokenizer>(new NeoxTokenizer(*std::move(vocabulary)));
}

std::vector<uint32_t> NeoxTokenizer::Encode(absl::string_view bytes) const { return Encode(bytes, added_); }

std::vector<uint32_t> NeoxTokenizer::EncodePlain(absl::string_view bytes) const { return Encode(bytes, plain_added_); }

std::vector<uint32_t> NeoxTokenizer::Encode(absl::string_view bytes, const AddedTokens& added) const {
  std::string replaced;
  if (!IsValidUtf8(bytes)) {
    replaced = DecodeUtf8(bytes);
    bytes = replaced;
  }
  std::vector<uint32_t> ids;
  ids.reserve(bytes.size() / 3 + 1);
  Merger merger(*this);
  Split(bytes, added.raw, ids, [&](absl::string_view raw) {
    const std::string normalized = NormalizeNfc(raw);
    // Words come again and again; where the ids of one seen before stand.
    struct Ids {
      size_t begin;
      size_t count;
    };
    absl::flat_hash_map<absl::string_view, Ids> seen;
    Split(normalized, added.normalized, ids, [&](absl::string_view text) {
      while (!text.empty()) {
        const absl::string_view word = text.substr(0, FirstWordSize(text));
        text.remove_prefix(word.size());
        const auto [it, is_new] = seen.try_emplace(word, Ids{ids.size(), 0});
        Ids& known = it->second;
        if (is_new) {
          merger.Append(word, ids);
          known.count = ids.size() - known.begin;
        } else {
          for (size_t i = 0; i < known.count; ++i) ids.push_back(ids[known.begin + i]);
        }
      }
    });
  });
  return ids;
}

absl::string_view NeoxTokenizer::TokenBytes(uint32_t id) const {
  return id < tokens_.size() ? absl::string_view(tokens_[id]) : absl::string_view();
}

}  // namespace rwkv::tokenizer
