#include "services/tokenizer/completing_tokens.h"

#include <algorithm>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/tokenizer/stop_matcher.h"
#include "services/tokenizer/stream_decoder.h"

namespace rwkv::tokenizer {
namespace {

using ::testing::ElementsAre;
using ::testing::Optional;

class ListTokenizer final : public Tokenizer {
 public:
  explicit ListTokenizer(std::vector<std::string> tokens) : tokens_(std::move(tokens)) {}
  absl::string_view name() const override { return "list"; }
  std::vector<uint32_t> Encode(absl::string_view) const override { return {}; }
  absl::string_view TokenBytes(uint32_t id) const override {
    return id < tokens_.size() ? absl::string_view(tokens_[id]) : absl::string_view();
  }
  uint32_t vocab_size() const override { return static_cast<uint32_t>(tokens_.size()); }
  uint32_t end_of_text() const override { return 0; }

 private:
  const std::vector<std::string> tokens_;
};

TEST(CompletingTokensTest, AreThoseThatBeginWithAnEndOrHaveItInside) {
  const ListTokenizer tokenizer({"", "a", "Us", "er:", ":", "r: yes", "User", "x User: y", "er", "\n", "s:"});
  EXPECT_THAT(CompletingTokens(tokenizer, {"User:"}), Optional(ElementsAre(3, 4, 5, 7)));
  EXPECT_THAT(CompletingTokens(tokenizer, {"User:", "\n"}), Optional(ElementsAre(3, 4, 5, 7, 9)));
  EXPECT_THAT(CompletingTokens(tokenizer, {""}), Optional(ElementsAre()));
  EXPECT_EQ(CompletingTokens(tokenizer, {"a", "b\xEF\xBF\xBD"}), absl::nullopt);
}

// The plain twin: whatever comes, the matcher meets a stop at one of these.
TEST(CompletingTokensTest, NoOtherTokenIsEverTheLastOne) {
  std::mt19937 random(7);  // NOLINT: the same in each run.
  const std::string alphabet[] = {"a", "b", "\n", "\xC3", "\xA4", "\xE2", "\x82", "\xAC", "\xF0", "\x9F"};
  int met = 0;
  for (int round = 0; round < 3000; ++round) {
    const auto draw = [&](int most) {
      std::string text;
      for (int left = 1 + static_cast<int>(random() % most); left > 0; --left) text += alphabet[random() % 10];
      return text;
    };
    std::vector<std::string> tokens;
    for (int i = 0; i < 12; ++i) tokens.push_back(draw(4));
    const std::string valid[] = {"a", "b", "\n", "\xC3\xA4", "\xE2\x82\xAC"};
    std::vector<std::string> stops(1 + random() % 2);
    for (std::string& stop : stops) {
      for (int left = 1 + static_cast<int>(random() % 4); left > 0; --left) stop += valid[random() % 5];
    }
    const ListTokenizer tokenizer(tokens);
    const auto ids = CompletingTokens(tokenizer, stops);
    ASSERT_TRUE(ids.has_value());
    StreamDecoder decoder;
    StopMatcher matcher(stops);
    for (int i = 0; i < 60; ++i) {
      const uint32_t id = random() % tokens.size();
      if (!matcher.Push(decoder.Push(tokens[id])).stop.has_value()) continue;
      ++met;
      EXPECT_TRUE(std::binary_search(ids->begin(), ids->end(), id)) << "round " << round << ", token " << id;
      break;
    }
  }
  EXPECT_GT(met, 500);
}

}  // namespace
}  // namespace rwkv::tokenizer
