// The fuzzer's laws on seeds worth keeping, and on seeded mutations of them.
#include <cstdint>
#include <random>
#include <string>

#include "absl/strings/string_view.h"
#include "gtest/gtest.h"
#include "services/tokenizer/tokenizer_fuzz_body.h"

namespace rwkv::tokenizer {
namespace {

const std::string kSeeds[] = {
    "",
    "abcabcab  \xE4\xBD\xA0\xE4\xBD",
    "257 'ab' 2\n258 'abc' 3\n259 b'\\xe4\\xbd' 2\n",
    "257 \"it's\" 4\r\n258 '\\u4f60' 3\r\n259 '\\x80' 2",
    "257 '  ' 2\n258 '   ' 3\n259 '\\\\' 1\n",
    "257 '\\U0001f600' 4\n258 '\\ud83d' 3\n",
    "1 'a' 1\n2 'b' 1",
    std::string("\0\xFF\xF0\x9F\x98\x80\xED\xA0\x80", 9),
};

TEST(TokenizerFuzzTest, LawsHoldOnTheSeedsAndTheirMutations) {
  std::mt19937 random(20261122);
  int checked = 0;
  for (const std::string& seed : kSeeds) {
    for (int round = 0; round < 150; ++round, ++checked) {
      std::string input = seed;
      for (int edits = round == 0 ? 0 : 1 + random() % 4; edits > 0; --edits) {
        const size_t place = random() % (input.size() + 1);
        switch (random() % 4) {
          case 0:
            input.insert(place, 1, static_cast<char>(random()));
            break;
          case 1:
            input.erase(place, random() % 4);
            break;
          case 2:
            input.insert(place, input.substr(0, random() % 8));
            break;
          default:
            if (place < input.size()) input[place] = " '\"\\bxu\n0259"[random() % 11];
        }
      }
      CheckTokenizer(reinterpret_cast<const uint8_t*>(input.data()), input.size());
    }
  }
  EXPECT_EQ(checked, 1200);  // A law that does not hold ends the process.
}

}  // namespace
}  // namespace rwkv::tokenizer
