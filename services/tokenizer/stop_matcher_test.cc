#include "services/tokenizer/stop_matcher.h"

#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/types/optional.h"
#include "gtest/gtest.h"

namespace rwkv::tokenizer {
namespace {

using Stop = absl::optional<size_t>;

TEST(StopMatcherTest, WithoutStopsEverythingPasses) {
  StopMatcher matcher({});
  EXPECT_EQ(matcher.Push("abc").text, "abc");
  EXPECT_EQ(matcher.Finish(), "");
}

TEST(StopMatcherTest, FindsAStopOverPieceBorders) {
  StopMatcher matcher({"\n\nUser:"});
  EXPECT_EQ(matcher.Push("Hi.\n").text, "Hi.");
  EXPECT_EQ(matcher.Push("\nUs").text, "");
  const StopMatcher::Result result = matcher.Push("er: more");
  EXPECT_EQ(result.text, "");
  EXPECT_EQ(result.stop, Stop(0));
}

TEST(StopMatcherTest, HeldTextIsSetFreeWhenItCannotBecomeAStop) {
  StopMatcher matcher({"\n\nUser:"});
  EXPECT_EQ(matcher.Push("a\n").text, "a");
  EXPECT_EQ(matcher.Push("\n").text, "");
  EXPECT_EQ(matcher.Push("\nU").text, "\n");  // The last two line ends may still be the stop's.
  EXPECT_EQ(matcher.Push("x").text, "\n\nUx");
  EXPECT_EQ(matcher.Push("\n").text, "");
  EXPECT_EQ(matcher.Finish(), "\n");
}

TEST(StopMatcherTest, TheFirstCompleteMatchWins) {
  StopMatcher matcher({"abcd", "bc"});
  const StopMatcher::Result result = matcher.Push("xabcdx");
  EXPECT_EQ(result.text, "xa");
  EXPECT_EQ(result.stop, Stop(1));
}

TEST(StopMatcherTest, OfMatchesThatEndTogetherTheLongestWins) {
  StopMatcher matcher({"c", "abc", "bc"});
  const StopMatcher::Result result = matcher.Push("xabc");
  EXPECT_EQ(result.text, "x");
  EXPECT_EQ(result.stop, Stop(1));
}

TEST(StopMatcherTest, NothingComesAfterAStop) {
  StopMatcher matcher({"."});
  EXPECT_EQ(matcher.Push("a.b").text, "a");
  const StopMatcher::Result result = matcher.Push("c");
  EXPECT_EQ(result.text, "");
  EXPECT_EQ(result.stop, Stop(0));
  EXPECT_EQ(matcher.Finish(), "");
}

TEST(StopMatcherTest, StopsThatRepeatThemselves) {
  StopMatcher matcher({"aab"});
  EXPECT_EQ(matcher.Push("aaaa").text, "aa");
  const StopMatcher::Result result = matcher.Push("b");
  EXPECT_EQ(result.text, "");
  EXPECT_EQ(result.stop, Stop(0));
}

// The twin: the whole text at once, every end and every stop tried.
std::pair<std::string, Stop> Twin(const std::vector<std::string>& stops, const std::string& text) {
  for (size_t end = 1; end <= text.size(); ++end) {
    Stop best;
    for (size_t s = 0; s < stops.size(); ++s) {
      const size_t size = stops[s].size();
      if (size <= end && text.compare(end - size, size, stops[s]) == 0 && (!best || size > stops[*best].size()))
        best = s;
    }
    if (best) return {text.substr(0, end - stops[*best].size()), best};
  }
  return {text, absl::nullopt};
}

TEST(StopMatcherTest, CutsDoNotMatterAndNoMoreThanNeededIsHeld) {
  std::mt19937 random(5);
  const auto word = [&](size_t max, int letters) {
    std::string word(1 + random() % max, ' ');
    for (char& c : word) c = static_cast<char>('a' + random() % letters);
    return word;
  };
  int matches = 0;
  for (int round = 0; round < 5000; ++round) {
    std::vector<std::string> stops;
    for (int n = 1 + random() % 3; n > 0; --n) stops.push_back(word(6, 2));
    const std::string text = word(20, 2 + random() % 2);
    const auto [expected_text, expected_stop] = Twin(stops, text);
    StopMatcher matcher(stops);
    std::string shown;
    Stop stop;
    for (size_t begin = 0; begin < text.size() && !stop;) {
      const size_t size = 1 + random() % 4;
      StopMatcher::Result result = matcher.Push(absl::string_view(text).substr(begin, size));
      shown += result.text;
      stop = result.stop;
      begin += size;
      if (stop) break;
      // What is held is the beginning of some stop.
      const std::string held = text.substr(shown.size(), std::min(begin, text.size()) - shown.size());
      bool may_become = held.empty();
      for (const std::string& s : stops) may_become = may_become || s.compare(0, held.size(), held) == 0;
      ASSERT_TRUE(may_become) << held;
    }
    if (!stop) shown += matcher.Finish();
    ASSERT_EQ(shown, expected_text) << text;
    ASSERT_EQ(stop, expected_stop) << text;
    matches += stop.has_value();
  }
  EXPECT_GT(matches, 1000);
}

}  // namespace
}  // namespace rwkv::tokenizer
