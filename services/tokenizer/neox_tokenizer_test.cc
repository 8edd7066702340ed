#include "services/tokenizer/neox_tokenizer.h"

#include <cstdlib>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "services/tokenizer/neox_vocabulary.h"
#include "services/tokenizer/neox_words.h"
#include "services/tokenizer/stream_decoder.h"
#include "services/tokenizer/unicode.h"
#include "tests/testing/files.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::tokenizer {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::Gt;

constexpr char kSmall[] = "services/tokenizer/testdata/small_neox.json";

std::unique_ptr<NeoxTokenizer> Load(const std::string& path) {
  absl::StatusOr<std::unique_ptr<NeoxTokenizer>> tokenizer = NeoxTokenizer::FromString(testing::ReadFile(path), path);
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  return *std::move(tokenizer);
}

// The twin: for each merge looks at all pairs of all symbols. Words only: no added tokens, no normalization.
std::vector<uint32_t> MergeByScanning(const NeoxVocabulary& vocabulary, absl::string_view text) {
  std::vector<uint32_t> ids;
  while (!text.empty()) {
    const absl::string_view word = text.substr(0, FirstWordSize(text));
    text.remove_prefix(word.size());
    std::vector<uint32_t> symbols;
    for (char byte : word) symbols.push_back(vocabulary.byte_ids[static_cast<unsigned char>(byte)]);
    for (size_t rank = 0; rank < vocabulary.merges.size();) {
      const NeoxVocabulary::Merge& merge = vocabulary.merges[rank++];
      for (size_t i = 0; i + 1 < symbols.size(); ++i) {
        if (symbols[i] != merge.left || symbols[i + 1] != merge.right) continue;
        symbols[i] = merge.result;
        symbols.erase(symbols.begin() + static_cast<ptrdiff_t>(i) + 1);
        rank = 0;  // It may have made a pair of lower rank.
        break;
      }
    }
    ids.insert(ids.end(), symbols.begin(), symbols.end());
  }
  return ids;
}

std::unique_ptr<NeoxTokenizer> LoadSmall() { return Load(kSmall); }

// 20B_tokenizer.json, as BUILD names it.
const NeoxTokenizer& Published() {
  static const NeoxTokenizer& published = *Load(std::getenv("NEOX_TOKENIZER")).release();
  return published;
}

TEST(NeoxTokenizerTest, EqualsAPlainEncoderOnItsCases) {
  std::ifstream file("services/tokenizer/testdata/small_neox_cases.json");
  const nlohmann::json cases = nlohmann::json::parse(file);
  const auto tokenizer = LoadSmall();
  for (const auto& entry : cases) {
    const auto text = entry["text"].get<std::string>();
    const std::vector<uint32_t> ids = tokenizer->Encode(text);
    EXPECT_EQ(ids, entry["ids"].get<std::vector<uint32_t>>()) << absl::CHexEscape(text);
    if (text.find("<|") == std::string::npos) EXPECT_EQ(tokenizer->Decode(ids), entry["nfc"].get<std::string>());
  }
  EXPECT_GT(cases.size(), 40);
}

TEST(NeoxTokenizerTest, EqualsATwinThatScansForEachMerge) {
  ASSERT_OK_AND_ASSIGN(const NeoxVocabulary vocabulary, ParseNeoxVocabulary(testing::ReadFile(kSmall), "small"));
  const auto tokenizer = LoadSmall();
  std::mt19937 random(13);
  for (int round = 0; round < 100; ++round) {
    std::string text;  // Tokens and their first bytes, so that merges begin, compete and end.
    while (text.size() < 60) {
      std::string token = vocabulary.tokens[random() % 469];  // No runs of blanks.
      if (random() % 4 == 0) token.resize(token.size() / 2);
      text += token;
    }
    text = DecodeUtf8(text);
    if (NormalizeNfc(text) != text || text.find("  ") != std::string::npos) continue;
    ASSERT_EQ(tokenizer->Encode(text), MergeByScanning(vocabulary, text)) << absl::CHexEscape(text);
  }
}

// Of equal pairs the leftmost is merged first: an odd run has its single character at the end.
TEST(NeoxTokenizerTest, ARunOfOneCharacterIsMergedFromTheLeft) {
  ASSERT_OK_AND_ASSIGN(const NeoxVocabulary small, ParseNeoxVocabulary(testing::ReadFile(kSmall), "small"));
  const auto tokenizer = LoadSmall();
  for (size_t size = 1; size < 40; ++size) {
    const std::string run(size, 'l');
    ASSERT_EQ(tokenizer->Encode(run), MergeByScanning(small, run)) << size;
  }
  const std::vector<uint32_t> three = tokenizer->Encode("lll");
  ASSERT_EQ(three.size(), 2);
  EXPECT_EQ(tokenizer->TokenBytes(three[0]), "ll");

  const char* const path = std::getenv("NEOX_TOKENIZER");
  ASSERT_OK_AND_ASSIGN(const NeoxVocabulary published, ParseNeoxVocabulary(testing::ReadFile(path), path));
  for (const char character : {'a', '=', '\t'}) {
    for (const size_t size : {3, 5, 7, 11, 23}) {
      const std::string run(size, character);
      ASSERT_EQ(Published().Encode(run), MergeByScanning(published, run)) << absl::CHexEscape(run);
    }
  }
}

// The reference's ids on multilingual text, code, emoji and control bytes.
TEST(NeoxTokenizerTest, EqualsTheReferenceOnItsCases) {
  const char* shared = std::getenv("RWKV_SHARED");
  const std::string path = absl::StrCat(shared == nullptr ? "" : shared, "/data/tokenizer/cases.json");
  std::ifstream file(path);
  if (shared == nullptr || !file) GTEST_SKIP() << "RWKV_SHARED names no folder with data/tokenizer/cases.json";
  const nlohmann::json cases = nlohmann::json::parse(file);
  const NeoxTokenizer* const tokenizer = &Published();
  int count = 0;
  for (const auto& entry : cases["text"]) {
    const auto text = entry["text"].get<std::string>();
    EXPECT_EQ(tokenizer->Encode(text), entry["neox"].get<std::vector<uint32_t>>()) << absl::CHexEscape(text);
    ++count;
  }
  EXPECT_GT(count, 80);
}

TEST(NeoxTokenizerTest, PublishedVocabularyHasItsKnownIds) {
  const NeoxTokenizer* const tokenizer = &Published();
  EXPECT_EQ(tokenizer->name(), "neox");
  EXPECT_EQ(tokenizer->vocab_size(), 50277);
  EXPECT_EQ(tokenizer->end_of_text(), 0);
  EXPECT_THAT(tokenizer->Encode("\n"), ElementsAre(187));
  EXPECT_THAT(tokenizer->Encode("\n\n"), ElementsAre(535));
  EXPECT_THAT(tokenizer->Encode(" "), ElementsAre(209));
  EXPECT_THAT(tokenizer->Encode("Hello  world"), ElementsAre(12092, 50276, 10186));
  EXPECT_THAT(tokenizer->Encode(std::string(50, ' ')), ElementsAre(50254, 50254, 50276));
  EXPECT_THAT(tokenizer->Encode("a<|endoftext|>b"), ElementsAre(66, 0, 67));
}

TEST(NeoxTokenizerTest, PlainTextHasNoSpecialTokens) {
  const std::unique_ptr<const NeoxTokenizer> small = LoadSmall();
  for (const NeoxTokenizer* const tokenizer : {&Published(), small.get()}) {
    for (const std::string text : {"<|endoftext|>", "a<|endoftext|>  b<|padding|>", "e<|endoftext|>\u0301    "}) {
      const std::vector<uint32_t> ids = tokenizer->EncodePlain(text);
      EXPECT_THAT(ids, Each(Gt(1u))) << text;
      EXPECT_EQ(tokenizer->Decode(ids), text);
    }
    EXPECT_EQ(tokenizer->EncodePlain("Hello   world"), tokenizer->Encode("Hello   world"));
  }
}

TEST(NeoxTokenizerTest, IdsWithoutTextDecodeToNothing) {
  const NeoxTokenizer* const tokenizer = &Published();
  for (const uint32_t id : {0u, 1u, 50277u, 50303u, 4294967295u}) EXPECT_EQ(tokenizer->TokenBytes(id), "") << id;
  for (uint32_t id = 2; id < tokenizer->vocab_size(); ++id) EXPECT_NE(tokenizer->TokenBytes(id), "") << id;
  EXPECT_EQ(tokenizer->Decode(std::vector<uint32_t>{0, 12092, 50300, 1533}), "Hello world");
}

TEST(NeoxTokenizerTest, WhatIsNotUtf8IsReplaced) {
  const auto tokenizer = LoadSmall();
  std::mt19937 random(3);
  for (int round = 0; round < 200; ++round) {
    std::string bytes(random() % 60, '\0');
    for (char& byte : bytes) byte = static_cast<char>(random());
    EXPECT_EQ(tokenizer->Encode(bytes), tokenizer->Encode(DecodeUtf8(bytes))) << absl::CHexEscape(bytes);
  }
  EXPECT_EQ(tokenizer->Decode(tokenizer->Encode("a\xFF"
                                                "b")),
            "a\uFFFDb");
}

// Of a character in two tokens the first shows nothing yet.
TEST(NeoxTokenizerTest, StreamsWholeCharacters) {
  const NeoxTokenizer* const tokenizer = &Published();
  const std::string text = "na\u00EFve \u4E16\u754C \U0001F44D\U0001F3FD \u0939\u093F";
  StreamDecoder decoder;
  std::string streamed;
  bool held_back = false;
  for (uint32_t id : tokenizer->Encode(text)) {
    const std::string piece = decoder.Push(tokenizer->TokenBytes(id));
    EXPECT_TRUE(IsValidUtf8(piece));
    held_back = held_back || piece.empty();
    streamed += piece;
  }
  EXPECT_TRUE(held_back);
  EXPECT_EQ(streamed + decoder.Finish(), text);
}

// A word of 256 kB: with a scan for each merge this would take minutes.
TEST(NeoxTokenizerTest, LongWordsTakeNoQuadraticTime) {
  const NeoxTokenizer* const tokenizer = &Published();
  std::string letters;
  while (letters.size() < 1 << 18) letters += "thequickbrownfox";
  EXPECT_EQ(tokenizer->Decode(tokenizer->Encode(letters)), letters);
  const std::string same(1 << 18, 'a');
  EXPECT_EQ(tokenizer->Decode(tokenizer->Encode(same)), same);
  const std::string blanks(1 << 18, '\t');
  EXPECT_EQ(tokenizer->Decode(tokenizer->Encode(blanks)), blanks);
}

}  // namespace
}  // namespace rwkv::tokenizer
