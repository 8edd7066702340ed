#include "services/tokenizer/neox_words.h"

#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace rwkv::tokenizer {
namespace {

std::vector<std::string> Words(absl::string_view text) {
  std::vector<std::string> words;
  while (!text.empty()) {
    const size_t size = FirstWordSize(text);
    words.emplace_back(text.substr(0, size));
    text.remove_prefix(size);
  }
  return words;
}

TEST(NeoxWordsTest, CutsAsThePatternDoes) {
  struct Case {
    const char* text;
    std::vector<std::string> words;
  };
  const Case kCases[] = {
      {"", {}},
      {"a", {"a"}},
      {" ", {" "}},
      {"the old man", {"the", " old", " man"}},
      {"a  b", {"a", " ", " b"}},            // The last blank belongs to the word.
      {"a \n\tb", {"a", " \n", "\t", "b"}},  // A tab cannot.
      {"a\n b", {"a", "\n", " b"}},
      {"a\nb", {"a", "\n", "b"}},  // The only white space before a word stays.
      {"a  ", {"a", "  "}},
      {"a\u3000\u3000b", {"a", "\u3000", "\u3000", "b"}},
      {"x12y", {"x", "12", "y"}},
      {" 12+3", {" 12", "+", "3"}},
      {"it's they'll", {"it", "'s", " they", "'ll"}},
      {"IT'S", {"IT", "'", "S"}},  // Contractions are lower case.
      {" 's", {" '", "s"}},        // The blank's word is not a contraction.
      {"''s", {"''", "s"}},
      {"'sup", {"'s", "up"}},
      {"'rev", {"'re", "v"}},
      {"'lx", {"'", "lx"}},
      {"a.b, c!!", {"a", ".", "b", ",", " c", "!!"}},
      {"e\u0301a", {"e", "\u0301", "a"}},  // Marks are other.
      {"\u4F60\u597D\uFF0C", {"\u4F60\u597D", "\uFF0C"}},
  };
  for (const Case& c : kCases) EXPECT_EQ(Words(c.text), c.words) << c.text;
}

}  // namespace
}  // namespace rwkv::tokenizer
