#include "services/tokenizer/unicode.h"

#include <string>

#include "absl/strings/escaping.h"
#include "gtest/gtest.h"

namespace rwkv::tokenizer {
namespace {

TEST(UnicodeTest, CharactersHaveTheirKind) {
  struct Case {
    const char* text;
    CharacterKind kind;
  };
  const Case kCases[] = {
      {"a", CharacterKind::kLetter},          {"Z", CharacterKind::kLetter},
      {"\u00AA", CharacterKind::kLetter},  // Lo
      {"\u01C5", CharacterKind::kLetter},  // Lt
      {"\u02B0", CharacterKind::kLetter},  // Lm
      {"\u0438", CharacterKind::kLetter},     {"\u4E16", CharacterKind::kLetter},
      {"\U00020000", CharacterKind::kLetter},                                      // Beyond the basic plane.
      {"0", CharacterKind::kNumber},          {"\u0663", CharacterKind::kNumber},  // Nd
      {"\u2167", CharacterKind::kNumber},                                          // Nl
      {"\u00BD", CharacterKind::kNumber},                                          // No
      {" ", CharacterKind::kSpace},           {"\t", CharacterKind::kSpace},
      {"\v", CharacterKind::kSpace},          {"\u00A0", CharacterKind::kSpace},
      {"\u1680", CharacterKind::kSpace},      {"\u2028", CharacterKind::kSpace},
      {"\u3000", CharacterKind::kSpace},      {"\xC2\x85", CharacterKind::kSpace},  // U+0085, a control character
      {"\u200B", CharacterKind::kOther},                                            // Zero-width space is none.
      {"\uFEFF", CharacterKind::kOther},                                            // Nor is the byte order mark,
      {"\u180E", CharacterKind::kOther},  // nor the Mongolian vowel separator, any more.
      {"\u0301", CharacterKind::kOther},  // Marks break words.
      {"\u093F", CharacterKind::kOther},      {"_", CharacterKind::kOther},
      {"\x7F", CharacterKind::kOther},        {"\U0001F600", CharacterKind::kOther},
      {"\U0010FFFF", CharacterKind::kOther},
  };
  for (const Case& c : kCases) {
    const Character character = FirstCharacter(std::string(c.text) + "x");
    EXPECT_EQ(character.kind, c.kind) << absl::CHexEscape(c.text);
    EXPECT_EQ(character.size, std::string(c.text).size()) << absl::CHexEscape(c.text);
  }
}

TEST(UnicodeTest, NfcComposesAndReorders) {
  struct Case {
    const char* text;
    const char* normalized;
  };
  const Case kCases[] = {
      {"", ""},
      {"plain text, \u00E9", "plain text, \u00E9"},
      {"e\u0301", "\u00E9"},
      {"q\u0307\u0323", "q\u0323\u0307"},  // By combining class.
      {"e\u0327\u0301", "\u0229\u0301"},   // The first that composes.
      {"\u0344", "\u0308\u0301"},          // Decomposes, and does not come back.
      {"\u212B", "\u00C5"},                // Angstrom sign
      {"\u0958", "\u0915\u093C"},          // Excluded from composition.
      {"\u1100\u1161\u11A8", "\uAC01"},    // Hangul
      {"\uAC00\u11A8", "\uAC01"},
      {"\u304B\u3099", "\u304C"},
      {"\u1F82", "\u1F82"},  // Four code points when decomposed.
      {"\u03B1\u0345\u0300\u0313", "\u1FB2\u0313"},
      {"a\u0301\xF0\x9F\x98\x80"
       "b",
       "\u00E1\xF0\x9F\x98\x80"
       "b"},
      {"\uFFFF\U0010FFFF\u0301", "\uFFFF\U0010FFFF\u0301"},  // No characters, but code points.
      {"\uFB01\u2460", "\uFB01\u2460"},                      // Compatibility mappings are not applied.
  };
  for (const Case& c : kCases) EXPECT_EQ(NormalizeNfc(c.text), c.normalized) << absl::CHexEscape(c.text);
}

// Sorting by insertion, as utf8proc_decompose() does, would take hours.
TEST(UnicodeTest, ALongRunOfMarksIsSortedInTime) {
  std::string marks = "a";
  std::string above, below;
  for (int i = 0; i < 200000; ++i) {
    marks += "\u0301\u0323";
    above += "\u0301";
    below += "\u0323";
  }
  EXPECT_EQ(NormalizeNfc(marks), "\u1EA1" + below.substr(2) + above);
}

}  // namespace
}  // namespace rwkv::tokenizer
