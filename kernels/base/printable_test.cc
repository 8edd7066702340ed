#include "kernels/base/printable.h"

#include "gtest/gtest.h"

namespace rwkv::kernels {
namespace {

TEST(PrintableTest, KeepsCharactersAndEscapesTheRest) {
  const struct {
    const char* name;
    std::string bytes;
    std::string printable;
  } kCases[] = {
      {"plain text", "model-0.1B v7", "model-0.1B v7"},
      {"two, three and four bytes", "\xc3\xa9 \xe4\xb8\x96\xe7\x95\x8c \xf0\x9f\x90\xa6",
       "\xc3\xa9 \xe4\xb8\x96\xe7\x95\x8c \xf0\x9f\x90\xa6"},
      {"controls", std::string("a\n\t\0\x1b", 5), "a\\n\\t\\x00\\x1b"},
      {"quotes", "\"\\'", "\\\"\\\\\\'"},
      {"a lone byte", "\xff", "\\xff"},
      {"a character cut short", "\xe4\xb8", "\\xe4\\xb8"},
      {"longer than needed", "\xc0\xaf\xe0\x80\xaf", "\\xc0\\xaf\\xe0\\x80\\xaf"},
      {"a surrogate", "\xed\xa0\x80", "\\xed\\xa0\\x80"},
      {"beyond Unicode", "\xf4\x90\x80\x80", "\\xf4\\x90\\x80\\x80"},
      {"a control of two bytes", "\xc2\x85", "\\xc2\\x85"},
      {"a line separator", "\xe2\x80\xa8", "\\xe2\\x80\\xa8"},
      {"nothing", "", ""},
  };
  for (const auto& test : kCases) EXPECT_EQ(Printable(test.bytes), test.printable) << test.name;
}

}  // namespace
}  // namespace rwkv::kernels
