#include "services/router/router_tokenizer.h"

#include <cstdint>
#include <cstring>
#include <fstream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using ::rwkv::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

// GGUF version 3, little-endian: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
class GgufWriter {
 public:
  template <typename T>
  void Number(T value) {
    char bytes[sizeof(T)];
    std::memcpy(bytes, &value, sizeof(T));
    content_.append(bytes, sizeof(T));
  }
  void String(absl::string_view text) {
    Number<uint64_t>(text.size());
    absl::StrAppend(&content_, text);
  }
  void KeyOfString(absl::string_view key, absl::string_view value) {
    String(key);
    Number<uint32_t>(8);
    String(value);
  }
  void Tokens(const std::vector<std::string>& tokens) {
    String("tokenizer.ggml.tokens");
    Number<uint32_t>(9);  // An array
    Number<uint32_t>(8);  // of strings.
    Number<uint64_t>(tokens.size());
    for (const std::string& token : tokens) String(token);
    String("tokenizer.ggml.token_type");
    Number<uint32_t>(9);
    Number<uint32_t>(5);  // Of int32.
    Number<uint64_t>(tokens.size());
    for (size_t i = 0; i < tokens.size(); ++i) Number<int32_t>(i == 0 ? 3 : 1);  // Control, normal.
  }
  std::string content_;
};

// A model's file without its tensors: nobody who wants the vocabulary reads one.
std::string WriteGguf(absl::string_view name, const std::vector<std::string>& tokens) {
  GgufWriter writer;
  writer.content_ = "GGUF";
  writer.Number<uint32_t>(3);
  writer.Number<uint64_t>(0);  // Tensors.
  writer.Number<uint64_t>(4);  // Keys.
  writer.KeyOfString("general.architecture", "rwkv7");
  writer.KeyOfString("tokenizer.ggml.model", "rwkv");
  writer.Tokens(tokens);
  const std::string path = absl::StrCat(::testing::TempDir(), "/", name);
  std::ofstream(path, std::ios::binary) << writer.content_;
  return path;
}

std::vector<std::string> Bytes() {
  std::vector<std::string> tokens = {"<s>"};
  for (int byte = 0; byte < 256; ++byte) tokens.push_back(absl::StrCat("\\x", absl::Hex(byte, absl::kZeroPad2)));
  return tokens;
}

TEST(RouterTokenizerTest, TheVocabularyInsideAModelIsTaken) {
  std::vector<std::string> tokens = Bytes();
  tokens.emplace_back("the ");
  ASSERT_OK_AND_ASSIGN(const RouterTokenizer opened, OpenRouterTokenizer(WriteGguf("model.gguf", tokens)));
  const auto& tokenizer = opened.tokenizer;
  EXPECT_EQ(tokenizer->vocab_size(), 258);
  EXPECT_THAT(tokenizer->Encode("the a"), ElementsAre(257, 98));
  EXPECT_EQ(tokenizer->Decode({257, 98}), "the a");
}

TEST(RouterTokenizerTest, AVocabularyThatIsNoTokenizerIsNoErrorOfTheModel) {
  std::vector<std::string> tokens = Bytes();
  tokens.erase(tokens.begin() + 1 + 'a');
  for (const std::string& path : {WriteGguf("without_a.gguf", tokens), WriteGguf("empty.gguf", {}),
                                  WriteGguf("no_escape.gguf", {"<s>", "\\x"})}) {
    ASSERT_OK_AND_ASSIGN(const RouterTokenizer opened, OpenRouterTokenizer(path));
    EXPECT_EQ(opened.tokenizer, nullptr);
    EXPECT_THAT(opened.unusable, HasSubstr(path));
  }
}

TEST(RouterTokenizerTest, AModelThatCannotBeReadIsAnError) {
  const std::string path = absl::StrCat(::testing::TempDir(), "/cut.gguf");
  std::ofstream(path, std::ios::binary) << "GGUF\3";
  EXPECT_THAT(OpenRouterTokenizer(path), StatusIs(absl::StatusCode::kDataLoss, HasSubstr(path)));
}

TEST(RouterTokenizerTest, OtherFilesAreVocabularies) {
  ASSERT_OK_AND_ASSIGN(const RouterTokenizer opened,
                       OpenRouterTokenizer("services/tokenizer/testdata/small_vocabulary.txt"));
  EXPECT_EQ(opened.tokenizer->name(), "world");
  EXPECT_THAT(OpenRouterTokenizer("/nonexistent/vocabulary.txt"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("/nonexistent/vocabulary.txt")));
}

}  // namespace
}  // namespace rwkv::router
