#include "services/tokenizer/neox_vocabulary.h"

#include <algorithm>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "nlohmann/json.hpp"
#include "services/tokenizer/unicode.h"

namespace rwkv::tokenizer {
namespace {

using Json = nlohmann::json;

constexpr int kMaxDepth = 8;  // Of nested values; the deepest of the format has 5.
constexpr absl::string_view kEndOfText = "<|endoftext|>";

// A value for a message.
std::string Brief(const Json& value) {
  constexpr size_t kMaxBytes = 60;
  if (value.is_structured() && value.size() > 2) return absl::StrCat("an ", value.type_name(), " of ", value.size());
  std::string text = value.dump(-1, ' ', true);
  if (text.size() > kMaxBytes) text = absl::StrCat(text.substr(0, kMaxBytes), "...");
  return text;
}

// root[section][member]; null when absent. An empty section is the root.
const Json& Find(const Json& root, const char* section, const char* member) {
  static const Json& null = *new Json;
  const auto get = [](const Json& object, const char* key) -> const Json& {
    if (!object.is_object()) return null;
    const auto it = object.find(key);
    return it == object.end() ? null : *it;
  };
  return get(section[0] == '\0' ? root : get(root, section), member);
}

// What has to be said, or left out, for the ids to be those of GPT-NeoX.
struct Setting {
  const char* section;
  const char* member;
  Json allowed;  // An array: one of these. null: absent.
};

absl::Status CheckSettings(const Json& root, absl::string_view name) {
  const Setting kSettings[] = {
      {"normalizer", "type", Json::array({"NFC"})},
      {"pre_tokenizer", "type", Json::array({"ByteLevel"})},
      {"pre_tokenizer", "add_prefix_space", Json::array({false})},
      {"pre_tokenizer", "use_regex", {nullptr, true}},
      {"post_processor", "type", {nullptr, "ByteLevel"}},
      {"decoder", "type", {nullptr, "ByteLevel"}},
      {"model", "type", {nullptr, "BPE"}},
      {"model", "dropout", Json::array({nullptr})},
      {"model", "unk_token", Json::array({nullptr})},
      {"model", "continuing_subword_prefix", {nullptr, ""}},
      {"model", "end_of_word_suffix", {nullptr, ""}},
      {"model", "byte_fallback", {nullptr, false}},
      {"model", "ignore_merges", {nullptr, false}},
  };
  for (const Setting& setting : kSettings) {
    const Json& value = Find(root, setting.section, setting.member);
    if (std::find(setting.allowed.begin(), setting.allowed.end(), value) != setting.allowed.end()) continue;
    return absl::InvalidArgumentError(absl::StrCat(name, ": ", setting.section, ".", setting.member, " is ",
                                                   Brief(value), "; a GPT-NeoX tokenizer has ",
                                                   Brief(setting.allowed.back())));
  }
  return absl::OkStatus();
}

// The byte that each character of a vocabulary entry stands for; -1: none. Bytes that print stand for themselves as
// code points, the others for U+0100, U+0101, ... in order.
// Source: openai/gpt-2, src/encoder.py, bytes_to_unicode.
const std::vector<int>& Alphabet() {
  static const std::vector<int>& bytes = *[] {
    auto* const bytes = new std::vector<int>(0x200, -1);
    size_t next = 0x100;
    for (int byte = 0; byte < 256; ++byte) {
      const bool prints = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
      (*bytes)[prints ? static_cast<size_t>(byte) : next++] = byte;
    }
    return bytes;
  }();
  return bytes;
}

// The bytes of a vocabulary entry, which is UTF-8; false: a character is not of the alphabet.
bool FromAlphabet(absl::string_view entry, std::string* bytes) {
  bytes->clear();
  while (!entry.empty()) {
    const auto lead = static_cast<unsigned char>(entry[0]);
    size_t point = lead;
    size_t size = 1;
    if (lead >= 0x80) {
      if ((lead & 0xE0) != 0xC0 || entry.size() < 2) return false;  // All of it is below U+0200.
      point = (lead & 0x1Fu) << 6 | (static_cast<unsigned char>(entry[1]) & 0x3Fu);
      size = 2;
    }
    if (point >= Alphabet().size() || Alphabet()[point] < 0) return false;
    bytes->push_back(static_cast<char>(Alphabet()[point]));
    entry.remove_prefix(size);
  }
  return true;
}

// No UTF-8 text has these. Source: Unicode 15, table 3-7.
bool IsUnusedByte(int byte) { return byte == 0xC0 || byte == 0xC1 || byte >= 0xF5; }

class Reader {
 public:
  Reader(const Json& root, absl::string_view name) : root_(root), name_(name) {}

  absl::StatusOr<NeoxVocabulary> Read() && {
    if (absl::Status status = CheckSettings(root_, name_); !status.ok()) return status;
    if (absl::Status status = ReadAddedTokens(); !status.ok()) return status;
    if (absl::Status status = ReadTokens(); !status.ok()) return status;
    if (absl::Status status = ReadMerges(); !status.ok()) return status;
    return std::move(result_);
  }

 private:
  template <typename... Parts>
  absl::Status Error(const Parts&... parts) const {
    return absl::InvalidArgumentError(absl::StrCat(name_, ": ", parts...));
  }

  // Before the tokens: an added token that is in the vocabulary too is text as it stands there.
  absl::Status ReadAddedTokens() {
    const Json& list = Find(root_, "", "added_tokens");
    if (!list.is_array()) return Error("added_tokens is ", Brief(list), ", not an array");
    for (const Json& entry : list) {
      const Json& id = Find(entry, "", "id");
      const Json& content = Find(entry, "", "content");
      if (!id.is_number_unsigned() || id.get<uint64_t>() > kMaxNeoxFileBytes || !content.is_string()) {
        return Error("added_tokens has ", Brief(entry), "; each needs an id and a content");
      }
      NeoxVocabulary::AddedToken token;
      token.id = id.get<uint32_t>();
      token.text = content.get<std::string>();
      for (const char* const member : {"single_word", "lstrip", "rstrip"}) {
        const Json& value = Find(entry, "", member);
        if (value.is_null() || value == false) continue;
        return Error("added token ", token.id, " has ", member, " ", Brief(value), "; a GPT-NeoX tokenizer has false");
      }
      token.special = Find(entry, "", "special") == true;
      const Json& normalized = Find(entry, "", "normalized");
      token.normalized = normalized.is_null() ? !token.special : normalized == true;
      if (token.normalized) token.text = NormalizeNfc(token.text);
      if (token.text.empty() || token.text.size() > kMaxNeoxTokenBytes) {
        return Error("added token ", token.id, " has ", token.text.size(), " bytes, 1 to ", kMaxNeoxTokenBytes,
                     " are allowed");
      }
      if (!added_ids_.emplace(token.text, token.id).second) {
        return Error("added token ", token.id, " has the content of another");
      }
      result_.added_tokens.push_back(std::move(token));
    }
    const auto end_of_text = std::find_if(result_.added_tokens.begin(), result_.added_tokens.end(),
                                          [](const auto& token) { return token.special && token.text == kEndOfText; });
    if (end_of_text == result_.added_tokens.end()) return Error("added_tokens has no special ", kEndOfText);
    result_.end_of_text = end_of_text->id;
    std::sort(result_.added_tokens.begin(), result_.added_tokens.end(),
              [](const auto& a, const auto& b) { return a.id < b.id; });
    return absl::OkStatus();
  }

  // Puts `bytes` at `id`, which has to be below the number of tokens and free.
  absl::Status Place(uint64_t id, std::string bytes) {
    if (id >= result_.tokens.size()) {
      return Error("a token has id ", id, ", but there are ", result_.tokens.size(), " tokens and ids have no gap");
    }
    if (taken_[id]) return Error("two tokens have id ", id);
    taken_[id] = true;
    result_.tokens[id] = std::move(bytes);
    return absl::OkStatus();
  }

  absl::Status ReadTokens() {
    const Json& vocab = Find(root_, "model", "vocab");
    if (!vocab.is_object()) return Error("model.vocab is ", Brief(vocab), ", not an object");
    size_t count = vocab.size();
    for (const NeoxVocabulary::AddedToken& token : result_.added_tokens) count += vocab.contains(token.text) ? 0 : 1;
    result_.tokens.resize(count);
    taken_.resize(count);
    for (const auto& [entry, id] : vocab.items()) {
      if (!id.is_number_unsigned()) return Error("model.vocab has the id ", Brief(id));
      ids_[entry] = id.get<uint64_t>() < count ? id.get<uint32_t>() : NeoxVocabulary::kNoToken;
      if (const auto added = added_ids_.find(entry); added != added_ids_.end()) {
        if (added->second == id.get<uint64_t>()) continue;
        return Error("added token ", added->second, " has id ", id.get<uint64_t>(), " in model.vocab");
      }
      std::string bytes;
      if (!FromAlphabet(entry, &bytes)) {
        return Error("model.vocab has ", Brief(Json(entry)), ", which is not written in the byte alphabet");
      }
      if (bytes.empty() || bytes.size() > kMaxNeoxTokenBytes) {
        return Error("token ", id.get<uint64_t>(), " has ", bytes.size(), " bytes, 1 to ", kMaxNeoxTokenBytes,
                     " are allowed");
      }
      if (absl::Status status = Place(id.get<uint64_t>(), std::move(bytes)); !status.ok()) return status;
    }
    for (const NeoxVocabulary::AddedToken& token : result_.added_tokens) {
      absl::Status status = Place(token.id, token.special ? std::string() : token.text);
      if (!status.ok()) return status;
    }
    return FindSingleBytes();
  }

  absl::Status FindSingleBytes() {
    absl::flat_hash_set<uint32_t> added;
    for (const NeoxVocabulary::AddedToken& token : result_.added_tokens) added.insert(token.id);
    result_.byte_ids.assign(256, NeoxVocabulary::kNoToken);
    for (uint32_t id = 0; id < result_.tokens.size(); ++id) {
      const std::string& token = result_.tokens[id];
      if (token.size() == 1 && !added.contains(id)) result_.byte_ids[static_cast<unsigned char>(token[0])] = id;
    }
    for (int byte = 0; byte < 256; ++byte) {
      if (result_.byte_ids[static_cast<size_t>(byte)] != NeoxVocabulary::kNoToken || IsUnusedByte(byte)) continue;
      return Error(absl::StrFormat("no token is the single byte 0x%02x", byte));
    }
    return absl::OkStatus();
  }

  absl::Status ReadMerges() {
    const Json& list = Find(root_, "model", "merges");
    if (!list.is_array()) return Error("model.merges is ", Brief(list), ", not an array");
    absl::flat_hash_set<std::pair<uint32_t, uint32_t>> pairs;
    result_.merges.reserve(list.size());
    for (size_t rank = 0; rank < list.size(); ++rank) {
      // "a b", or in newer files ["a", "b"].
      const Json& entry = list[rank];
      std::string left, right;
      if (entry.is_string()) {
        const auto& text = entry.get_ref<const std::string&>();
        const size_t blank = std::min(text.find(' '), text.size());
        left = text.substr(0, blank);
        right = text.substr(std::min(blank + 1, text.size()));
      } else if (entry.is_array() && entry.size() == 2 && entry[0].is_string() && entry[1].is_string()) {
        left = entry[0].get<std::string>();
        right = entry[1].get<std::string>();
      }
      NeoxVocabulary::Merge merge;
      if (!FindToken(left, &merge.left) || !FindToken(right, &merge.right) || !FindToken(left + right, &merge.result)) {
        return Error("model.merges[", rank, "] is ", Brief(entry), "; it needs two tokens that join to a third");
      }
      if (!pairs.emplace(merge.left, merge.right).second) {
        return Error("model.merges[", rank, "] is ", Brief(entry), " again");
      }
      result_.merges.push_back(merge);
    }
    return absl::OkStatus();
  }

  // False: not a token that text can be merged to.
  bool FindToken(const std::string& entry, uint32_t* id) const {
    const auto it = ids_.find(entry);
    if (it == ids_.end() || added_ids_.contains(entry)) return false;
    *id = it->second;
    return true;
  }

  const Json& root_;
  const absl::string_view name_;
  NeoxVocabulary result_;
  absl::flat_hash_map<std::string, uint32_t> added_ids_;  // By text.
  absl::flat_hash_map<std::string, uint32_t> ids_;        // Of model.vocab.
  std::vector<bool> taken_;                               // By id.
};

}  // namespace

absl::StatusOr<NeoxVocabulary> ParseNeoxVocabulary(absl::string_view json, absl::string_view name) {
  if (json.size() > kMaxNeoxFileBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, " has more than the ", kMaxNeoxFileBytes, " bytes of a tokenizer.json"));
  }
  bool too_deep = false;
  const Json root = Json::parse(
      json.begin(), json.end(),
      [&too_deep](int depth, Json::parse_event_t, Json&) {
        too_deep = too_deep || depth > kMaxDepth;
        return depth <= kMaxDepth;
      },
      /*allow_exceptions=*/false);
  if (root.is_discarded()) return absl::InvalidArgumentError(absl::StrCat(name, " is not JSON"));
  if (too_deep) return absl::InvalidArgumentError(absl::StrCat(name, " is nested deeper than ", kMaxDepth));
  if (!root.is_object()) return absl::InvalidArgumentError(absl::StrCat(name, " is not a JSON object"));
  return Reader(root, name).Read();
}

}  // namespace rwkv::tokenizer
