#include "services/tokenizer/world_tokenizer.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/testing/files.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::tokenizer {
namespace {

using ::rwkv::testing::StatusIs;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr char kSmallVocabulary[] = "services/tokenizer/testdata/small_vocabulary.txt";

std::unique_ptr<WorldTokenizer> Load(const std::string& path) {
  absl::StatusOr<std::unique_ptr<WorldTokenizer>> tokenizer = WorldTokenizer::FromString(testing::ReadFile(path), path);
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  return *std::move(tokenizer);
}

// The published vocabulary, as BUILD names it.
std::unique_ptr<WorldTokenizer> LoadPublished() { return Load(std::getenv("WORLD_VOCABULARY")); }

// The twin: at each place tries every length, the longest first.
class Twin {
 public:
  explicit Twin(const WorldTokenizer& tokenizer) {
    for (uint32_t id = 1; id < tokenizer.vocab_size(); ++id) ids_[std::string(tokenizer.TokenBytes(id))] = id;
  }

  std::vector<uint32_t> Encode(const std::string& bytes) const {
    std::vector<uint32_t> result;
    for (size_t begin = 0; begin < bytes.size();) {
      size_t length = std::min<size_t>(128, bytes.size() - begin);
      while (ids_.count(bytes.substr(begin, length)) == 0) --length;
      result.push_back(ids_.at(bytes.substr(begin, length)));
      begin += length;
    }
    return result;
  }

 private:
  std::map<std::string, uint32_t> ids_;
};

TEST(WorldTokenizerTest, LongestMatchWins) {
  const auto tokenizer = Load(kSmallVocabulary);
  const auto texts = [&](absl::string_view bytes) {
    std::vector<std::string> texts;
    for (uint32_t id : tokenizer->Encode(bytes)) texts.emplace_back(tokenizer->TokenBytes(id));
    return texts;
  };
  EXPECT_THAT(texts("therefore there the th t"), ElementsAre("therefore", " there", " the", " ", "th", " ", "t"));
  // Greedy: "abcd" is taken, though "a" + "bcdefg" would be shorter.
  EXPECT_THAT(texts("abcdefg"), ElementsAre("abcd", "e", "f", "g"));
  // Half a longer token, then none: back to the last whole one.
  EXPECT_THAT(texts("therefor"), ElementsAre("there", "f", "o", "r"));
  EXPECT_THAT(texts("aaaaaaa"), ElementsAre("aaaa", "aa", "a"));
  EXPECT_THAT(texts(""), ElementsAre());
  EXPECT_THAT(texts("\n\n\r\n"), ElementsAre("\n\n", "\r\n"));
  EXPECT_THAT(texts(std::string(131, ' ')), ElementsAre(std::string(128, ' '), "  ", " "));
}

TEST(WorldTokenizerTest, EqualsATwinThatTriesEveryLength) {
  const auto tokenizer = Load(kSmallVocabulary);
  const Twin twin(*tokenizer);
  std::mt19937 random(11);
  for (int round = 0; round < 200; ++round) {
    std::string bytes;  // Tokens and their pieces, so that long matches begin, fail and succeed.
    while (bytes.size() < 100) {
      const std::string token(tokenizer->TokenBytes(random() % tokenizer->vocab_size()));
      bytes += token.substr(0, random() % 4 == 0 ? random() % (token.size() + 1) : token.size());
    }
    ASSERT_EQ(tokenizer->Encode(bytes), twin.Encode(bytes)) << absl::CHexEscape(bytes);
  }
}

TEST(WorldTokenizerTest, LiteralsOfEveryKindAreTheirBytes) {
  const auto tokenizer = Load(kSmallVocabulary);
  for (const std::string& token :
       {std::string("\xC2\x80"), std::string("\xE2\x80\xA8"), std::string("\xE3\x80\x80"), std::string("\xE4\xBD"),
        std::string("\\n"), std::string("'\""), std::string("\"\""), std::string("''"), std::string("\\\\"),
        std::string("\xF0\x9F\x91\x8D\xF0\x9F\x8F\xBD"), std::string("a\xE4"), std::string(128, ' ')}) {
    const std::vector<uint32_t> ids = tokenizer->Encode(token);
    ASSERT_EQ(ids.size(), 1) << absl::CHexEscape(token);
    EXPECT_EQ(tokenizer->TokenBytes(ids[0]), token);
  }
}

TEST(WorldTokenizerTest, EveryByteStringComesBack) {
  for (const auto& tokenizer : {Load(kSmallVocabulary), LoadPublished()}) {
    std::mt19937 random(7);
    for (int round = 0; round < 500; ++round) {
      std::string bytes(random() % 300, '\0');
      for (char& byte : bytes) byte = static_cast<char>(random());
      ASSERT_EQ(tokenizer->Decode(tokenizer->Encode(bytes)), bytes) << absl::CHexEscape(bytes);
    }
    for (int byte = 0; byte < 256; ++byte) {
      EXPECT_THAT(tokenizer->Encode(std::string(1, static_cast<char>(byte))), ElementsAre(byte + 1));
    }
  }
}

TEST(WorldTokenizerTest, IdsWithoutBytesDecodeToNothing) {
  const auto tokenizer = LoadPublished();
  EXPECT_EQ(tokenizer->vocab_size(), 65530);
  EXPECT_EQ(tokenizer->end_of_text(), 0);
  EXPECT_EQ(tokenizer->name(), "world");
  for (const uint32_t id : {0u, 65530u, 65535u, 65536u, 4294967295u}) EXPECT_EQ(tokenizer->TokenBytes(id), "") << id;
  EXPECT_EQ(tokenizer->Decode(std::vector<uint32_t>{0, 24281, 65535, 59, 4294967295u}), "User:");
}

// tokenizers.md 1.2.
TEST(WorldTokenizerTest, PublishedVocabularyHasItsKnownIds) {
  const auto tokenizer = LoadPublished();
  EXPECT_THAT(tokenizer->Encode("\n"), ElementsAre(11));
  EXPECT_THAT(tokenizer->Encode("\n\n"), ElementsAre(261));
  EXPECT_THAT(tokenizer->Encode("\r\n"), ElementsAre(263));
  EXPECT_THAT(tokenizer->Encode(" "), ElementsAre(33));
  EXPECT_THAT(tokenizer->Encode("User:"), ElementsAre(24281, 59));
  EXPECT_EQ(tokenizer->TokenBytes(65529), std::string(128, ' '));
}

TEST(WorldTokenizerTest, EveryPublishedTokenIsItsOwnEncoding) {
  const auto tokenizer = LoadPublished();
  for (uint32_t id = 1; id < tokenizer->vocab_size(); ++id) {
    ASSERT_THAT(tokenizer->Encode(tokenizer->TokenBytes(id)), ElementsAre(id));
  }
}

TEST(WorldTokenizerTest, EqualsTheReferenceOnItsCases) {
  const char* shared = std::getenv("RWKV_SHARED");
  const std::string path = absl::StrCat(shared == nullptr ? "" : shared, "/data/tokenizer/cases.json");
  std::ifstream file(path);
  if (shared == nullptr || !file) GTEST_SKIP() << "RWKV_SHARED names no folder with data/tokenizer/cases.json";
  const nlohmann::json cases = nlohmann::json::parse(file);
  const auto tokenizer = LoadPublished();
  int count = 0;
  for (const auto& entry : cases["text"]) {
    const auto text = entry["text"].get<std::string>();
    EXPECT_EQ(tokenizer->Encode(text), entry["world"].get<std::vector<uint32_t>>()) << text;
    ++count;
  }
  for (const auto& entry : cases["bytes"]) {
    const std::string bytes = absl::HexStringToBytes(entry["hex"].get<std::string>());
    EXPECT_EQ(tokenizer->Encode(bytes), entry["world"].get<std::vector<uint32_t>>()) << entry["hex"];
    ++count;
  }
  EXPECT_GT(count, 100);
}

TEST(WorldTokenizerTest, CrLfLinesAndAMissingLastLineEndAreTheSameVocabulary) {
  const std::string canonical = testing::ReadFile(kSmallVocabulary);
  std::string crlf;
  for (char c : canonical) crlf += c == '\n' ? "\r\n" : std::string(1, c);
  ASSERT_OK_AND_ASSIGN(const auto a, WorldTokenizer::FromString(canonical, "lf"));
  ASSERT_OK_AND_ASSIGN(const auto b, WorldTokenizer::FromString(crlf, "crlf"));
  ASSERT_OK_AND_ASSIGN(const auto c,
                       WorldTokenizer::FromString(absl::string_view(canonical).substr(0, canonical.size() - 1), "cut"));
  ASSERT_EQ(a->vocab_size(), b->vocab_size());
  ASSERT_EQ(a->vocab_size(), c->vocab_size());
  for (uint32_t id = 0; id < a->vocab_size(); ++id) {
    EXPECT_EQ(a->TokenBytes(id), b->TokenBytes(id));
    EXPECT_EQ(a->TokenBytes(id), c->TokenBytes(id));
  }
}

TEST(WorldTokenizerTest, MalformedLinesAreNamed) {
  struct Case {
    const char* line;  // Stands in as line 258 of the small vocabulary.
    const char* message;
  };
  const Case kCases[] = {
      {"", "<id> <literal> <length>"},
      {"258", "<id> <literal> <length>"},
      {"258 'ab'", "<id> <literal> <length>"},
      {"259 'qq' 2", "has to be 258"},
      {"257 'qq' 2", "has to be 258"},
      {"x 'qq' 2", "has to be 258"},
      {"+258 'qq' 2", "has to be 258"},
      {"0258 'qq' 2", "has to be 258"},
      {" 258 'qq' 2", "has to be 258"},
      {"99999999999999999999 'qq' 2", "has to be 258"},
      {"258 'qq' 3", "its length says 3"},
      {"258 'qq' -2", "not a number"},
      {"258 'qq' ", "not a number"},
      {"258 'qq' 2x", "not a number"},
      {"258 'qq' 99999999999999999999", "not a number"},
      {"258 qq 2", "quotes"},
      {"258 'qq 2", "quotes"},
      {"258 'qq\" 2", "quotes"},
      {"258 ' 1", "quotes"},
      {"258 b 1", "quotes"},
      {"258  2", "quotes"},
      {"258 'q'q' 3", "quote inside"},
      {"258 '\\' 1", "ends in an escape"},
      {"258 '\\q' 1", "unknown escape"},
      {"258 b'\\u0041' 1", "unknown escape"},
      {"258 '\\xZZ' 1", "2 hex digits"},
      {"258 '\\x4' 1", "2 hex digits"},
      {"258 '\\u00' 1", "4 hex digits"},
      {"258 '\\ud800' 3", "U+D800"},
      {"258 '\\U00110000' 4", "U+110000"},
      {"258 'q\tq' 3", "control character"},
      {"258 'q\xff' 2", "not UTF-8"},
      {"258 b'q\xc3\xa9' 3", "not ASCII"},
      {"258 '' 0", "empty"},
  };
  const std::string canonical = testing::ReadFile(kSmallVocabulary);
  const size_t begin = canonical.find("258 ");
  const std::string head = canonical.substr(0, begin);
  const std::string tail = canonical.substr(canonical.find('\n', begin));
  for (const Case& bad : kCases) {
    SCOPED_TRACE(bad.line);
    EXPECT_THAT(WorldTokenizer::FromString(absl::StrCat(head, bad.line, tail), "v.txt"),
                StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr("v.txt:258: "), HasSubstr(bad.message))));
  }
  // The base row, for comparison.
  EXPECT_OK(WorldTokenizer::FromString(absl::StrCat(head, "258 'qq' 2", tail), "v.txt"));
}

TEST(WorldTokenizerTest, EachSingleByteHasToBeThere) {
  EXPECT_THAT(WorldTokenizer::FromString("", "v.txt"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("0x00")));
  const std::string canonical = testing::ReadFile(kSmallVocabulary);
  const size_t line = canonical.find("\n257 ") + 1;
  const size_t byte_ff = canonical.rfind("\n256 ", line) + 1;
  EXPECT_THAT(WorldTokenizer::FromString(canonical.substr(0, byte_ff), "v.txt"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("0xff")));
}

TEST(WorldTokenizerTest, TokensHaveABound) {
  std::string vocabulary = testing::ReadFile(kSmallVocabulary);
  const std::string longest(WorldTokenizer::kMaxTokenBytes, 'z');
  ASSERT_OK_AND_ASSIGN(
      const auto tokenizer,
      WorldTokenizer::FromString(absl::StrCat(vocabulary, "308 '", longest, "' ", longest.size()), "v"));
  EXPECT_THAT(tokenizer->Encode(longest + "z"), ElementsAre(308, 'z' + 1));
  EXPECT_THAT(WorldTokenizer::FromString(absl::StrCat(vocabulary, "308 '", longest, "z' ", longest.size() + 1), "v"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("at most")));
  EXPECT_THAT(WorldTokenizer::FromString(std::string(WorldTokenizer::kMaxFileBytes + 1, 'x'), "v"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("bytes of a vocabulary")));
}

// Such as a GGUF file's: id 0 without text, padding at the end.
TEST(WorldTokenizerTest, TakesAListOfTokens) {
  std::vector<std::string> tokens = {""};
  for (int byte = 0; byte < 256; ++byte) tokens.emplace_back(1, static_cast<char>(byte));
  tokens.insert(tokens.end(), {"ab", "", "abc", "", ""});
  ASSERT_OK_AND_ASSIGN(const auto tokenizer, WorldTokenizer::FromTokens(tokens, "list"));
  EXPECT_EQ(tokenizer->vocab_size(), 260);
  EXPECT_THAT(tokenizer->Encode("abcab\xFF"), ElementsAre(259, 257, 256));
  EXPECT_EQ(tokenizer->Decode(std::vector<uint32_t>{0, 259, 258, 261, 256}), "abc\xFF");
}

// A model whose tokens are bytes.
TEST(WorldTokenizerTest, IdZeroMayBeAToken) {
  std::vector<std::string> tokens;
  for (int byte = 0; byte < 256; ++byte) tokens.emplace_back(1, static_cast<char>(byte));
  ASSERT_OK_AND_ASSIGN(const auto tokenizer, WorldTokenizer::FromTokens(tokens, "bytes"));
  EXPECT_THAT(tokenizer->Encode(std::string("\0a", 2)), ElementsAre(0, 'a'));
}

TEST(WorldTokenizerTest, TokensAlikeAreRefused) {
  EXPECT_THAT(WorldTokenizer::FromString(absl::StrCat(testing::ReadFile(kSmallVocabulary), "308 b'a' 1\n"), "v.txt"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("v.txt: token 308 is that of id 98 again")));
  EXPECT_THAT(WorldTokenizer::FromTokens({"a", "b", "a"}, "list"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("list: token 2 is that of id 0 again")));
  EXPECT_THAT(WorldTokenizer::FromTokens({}, "list"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("0x00")));
}

}  // namespace
}  // namespace rwkv::tokenizer
