#include "services/tokenizer/byte_trie.h"

#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace rwkv::tokenizer {
namespace {

TEST(ByteTrieTest, TheLongestPrefixWins) {
  const ByteTrie trie({"b", "", "ab", "abcd", std::string("\0x", 2)});
  const auto find = [&](const std::string& text) {
    const ByteTrie::Match match = trie.LongestPrefix(text);
    return std::make_pair(match.id, match.size);
  };
  EXPECT_EQ(find("abcde"), std::make_pair(3u, size_t{4}));
  EXPECT_EQ(find("abc"), std::make_pair(2u, size_t{2}));
  EXPECT_EQ(find("ba"), std::make_pair(0u, size_t{1}));
  EXPECT_EQ(find(std::string("\0xy", 3)), std::make_pair(4u, size_t{2}));
  for (const std::string none : {"", "a", "x", "\xff"}) {
    EXPECT_EQ(find(none), std::make_pair(ByteTrie::kNone, size_t{0})) << none;
  }
}

TEST(ByteTrieTest, WithoutStringsNothingMatches) {
  for (const std::vector<std::string>& strings : {std::vector<std::string>{}, std::vector<std::string>{"", ""}}) {
    const ByteTrie trie(strings);
    for (int byte = 0; byte < 256; ++byte)
      EXPECT_EQ(trie.LongestPrefix(std::string(3, static_cast<char>(byte))).size, 0);
  }
}

// 256 single bytes, all pairs: the densest.
TEST(ByteTrieTest, DenseTriesWork) {
  std::vector<std::string> strings;
  for (int a = 0; a < 256; ++a) strings.emplace_back(1, static_cast<char>(a));
  for (int a = 0; a < 256; ++a) {
    for (int b = 0; b < 256; ++b) strings.push_back({static_cast<char>(a), static_cast<char>(b)});
  }
  const ByteTrie trie(strings);
  for (uint32_t id = 0; id < strings.size(); ++id) {
    const ByteTrie::Match match = trie.LongestPrefix(strings[id]);
    ASSERT_EQ(match.id, id);
    ASSERT_EQ(match.size, strings[id].size());
  }
}

}  // namespace
}  // namespace rwkv::tokenizer
