#include "services/worker/model/layer_range.h"

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {

void PrintTo(const LayerRange& range, std::ostream* os) { *os << range.ToString(); }

namespace {

using testing::IsOkAndHolds;
using testing::StatusIs;

TEST(LayerRangeTest, ParsesWhatItPrints) {
  EXPECT_THAT(ParseLayerRange("0:6", 12), IsOkAndHolds(LayerRange{0, 6}));
  EXPECT_THAT(ParseLayerRange("6:12", 12), IsOkAndHolds(LayerRange{6, 12}));
  EXPECT_THAT(ParseLayerRange((LayerRange{3, 4}).ToString(), 12), IsOkAndHolds(LayerRange{3, 4}));
}

TEST(LayerRangeTest, RefusesRangesThatAreNone) {
  for (const char* text : {"", ":", "0", "0:", ":6", "0:6:7", "a:b", "0:6x", " 0:6", "0: 6", "+0:6", "-1:6", "6:0",
                           "3:3", "0:13", "12:13", "0:99999999999", "0x0:6", "0/6"}) {
    EXPECT_THAT(ParseLayerRange(text, 12), StatusIs(absl::StatusCode::kInvalidArgument)) << "\"" << text << "\"";
  }
}

TEST(LayerRangeTest, StagesCoverTheModelEvenlyTheFirstTakingTheRest) {
  for (int layers = 1; layers <= 13; ++layers) {
    for (int stages = 1; stages <= layers; ++stages) {
      SCOPED_TRACE(absl::StrCat(layers, " layers, ", stages, " stages"));
      int next = 0;
      for (int stage = 0; stage < stages; ++stage) {
        ASSERT_OK_AND_ASSIGN(const LayerRange range, LayersOfStage(stage, stages, layers));
        EXPECT_EQ(range.begin, next);
        EXPECT_EQ(range.size(), layers / stages + (stage < layers % stages ? 1 : 0));
        next = range.end;
      }
      EXPECT_EQ(next, layers);
    }
  }
}

TEST(LayerRangeTest, ParsesStages) {
  EXPECT_THAT(ParseStage("0/1", 12), IsOkAndHolds(LayerRange{0, 12}));
  EXPECT_THAT(ParseStage("1/2", 5), IsOkAndHolds(LayerRange{3, 5}));
  EXPECT_THAT(ParseStage("12/13", 12),
              StatusIs(absl::StatusCode::kInvalidArgument, testing::HasSubstr("only 12 layers")));
  for (const char* text :
       {"", "/", "0", "0/", "/1", "1/1", "2/1", "0/0", "-1/2", "0/-1", "0/1/2", "a/b", " 0/1", "0:1"}) {
    EXPECT_THAT(ParseStage(text, 12), StatusIs(absl::StatusCode::kInvalidArgument)) << "\"" << text << "\"";
  }
}

TEST(LayerRangeTest, TheOrdinalOfANameIsItsStage) {
  EXPECT_THAT(ParseStageOf("worker-0", "ordinal/2", 12), IsOkAndHolds(LayerRange{0, 6}));
  EXPECT_THAT(ParseStageOf("worker-1", "ordinal/2", 12), IsOkAndHolds(LayerRange{6, 12}));
  EXPECT_THAT(ParseStageOf("big-model-worker-4", "ordinal/2", 12), IsOkAndHolds(LayerRange{0, 6})) << "pipeline 2";
  EXPECT_THAT(ParseStageOf("worker", "1/2", 12), IsOkAndHolds(LayerRange{6, 12})) << "said outright";
  for (const char* name : {"", "worker", "worker-", "worker-x", "worker-1x", "4", "worker-+1"}) {
    EXPECT_THAT(ParseStageOf(name, "ordinal/2", 12),
                StatusIs(absl::StatusCode::kInvalidArgument, testing::HasSubstr("-NUMBER")))
        << name;
  }
  for (const char* text : {"ordinal", "ordinal/", "ordinal/0", "ordinal/-2", "ordinal/x", "ordinal/2/3"}) {
    EXPECT_THAT(ParseStageOf("worker-0", text, 12), StatusIs(absl::StatusCode::kInvalidArgument)) << text;
  }
}

}  // namespace
}  // namespace rwkv::worker
