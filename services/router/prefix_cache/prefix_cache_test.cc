#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/router/prefix_cache/prefix_ends.h"
#include "services/router/prefix_cache/recent_inputs.h"

namespace rwkv::router {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::Le;
using ::testing::SizeIs;

PrefixCacheOptions Enabled() {
  PrefixCacheOptions options;
  options.enabled = true;
  options.min_tokens = 100;
  options.chunk_tokens = 200;
  return options;
}

TEST(PrefixEndsTest, AreMarksChunksWhatIsSharedAndTheEnd) {
  struct Case {
    const char* name;
    uint64_t tokens;
    std::vector<uint64_t> marks;
    uint64_t shared;
    std::vector<uint64_t> ends;
  };
  const Case cases[] = {
      {"short", 100, {}, 0, {}},
      {"just long enough", 101, {}, 0, {100}},
      {"chunks", 501, {}, 0, {200, 400, 500}},
      {"a chunk that is the end", 401, {}, 0, {200, 400}},
      {"a mark in a short one", 60, {50}, 0, {50}},
      {"marks", 501, {30, 450}, 0, {30, 200, 400, 450, 500}},
      {"a mark that nobody keeps", 501, {15}, 0, {200, 400, 500}},
      {"a mark at the end", 60, {60}, 0, {59}},
      {"a mark on a chunk", 501, {200}, 0, {200, 400, 500}},
      {"shared", 501, {}, 333, {200, 333, 400, 500}},
      {"shared, but little", 501, {}, 99, {200, 400, 500}},
      {"all of it shared", 501, {}, 501, {200, 400, 500}},
      {"tiny", 16, {16}, 16, {}},
      {"nothing", 0, {1}, 0, {}},
  };
  for (const Case& c : cases) EXPECT_EQ(PrefixEnds(Enabled(), c.tokens, c.marks, c.shared), c.ends) << c.name;
  EXPECT_THAT(PrefixEnds(PrefixCacheOptions(), 501, {30}, 300), IsEmpty());
}

TEST(PrefixEndsTest, ALongInputHasLargerChunks) {
  EXPECT_THAT(PrefixEnds(Enabled(), 1801, {}, 0), ElementsAre(400, 800, 1200, 1600, 1800));
  for (const uint64_t tokens : {2'000u, 65'536u, 1'000'000u}) {
    EXPECT_THAT(PrefixEnds(Enabled(), tokens, {}, 0), SizeIs(Le(kMostChunks + 1)));
  }
  EXPECT_THAT(PrefixEnds(Enabled(), 1'000'000, {kLongestPrefix, kLongestPrefix + 1}, 900'000),
              AllOf(Contains(kLongestPrefix), Each(Le(kLongestPrefix))));
}

TEST(RecentInputsTest, SayHowMuchIsShared) {
  RecentInputs recent;
  EXPECT_EQ(recent.Add("a", {1, 2, 3, 4}), 0);
  EXPECT_EQ(recent.Add("a", {1, 2, 9}), 2);
  EXPECT_EQ(recent.Add("b", {1, 2, 3, 4}), 0);
  EXPECT_EQ(recent.Add("a", {1, 2, 3, 4, 5}), 4);
  EXPECT_EQ(recent.Add("a", {1, 2, 9}), 3);
  EXPECT_EQ(recent.Add("a", {2}), 0);
}

TEST(RecentInputsTest, TheOldestAreForgotten) {
  RecentInputs recent;
  for (uint32_t i = 0; i <= RecentInputs::kMostInputs; ++i) recent.Add("a", {i, i});
  EXPECT_EQ(recent.Add("a", {1, 1}), 2);
  EXPECT_EQ(recent.Add("a", {0, 0}), 0);

  const std::vector<uint32_t> half(RecentInputs::kMostTokens / 2, 7);
  for (const char* const scope : {"b", "c", "d"}) recent.Add(scope, half);
  EXPECT_EQ(recent.Add("d", {7, 7}), 2);
  EXPECT_EQ(recent.Add("b", {7, 7}), 0);
}

}  // namespace
}  // namespace rwkv::router
