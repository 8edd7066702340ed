#include "services/worker/engine/held_results.h"

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace rwkv::worker {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

const absl::Duration kFast = HeldResults::kHold / 5;

v1::StepResult Result(uint64_t step_id, const std::vector<uint64_t>& positions) {
  v1::StepResult result;
  result.set_step_id(step_id);
  for (const uint64_t position : positions) result.add_entries()->set_position(position);
  return result;
}

// "STEP: POSITION POSITION" each.
std::vector<std::string> Texts(const HeldResults::Results& results) {
  std::vector<std::string> texts;
  for (const v1::StepResult& result : results) {
    texts.push_back(absl::StrCat(result.step_id(), ":"));
    for (const v1::EntryResult& entry : result.entries()) absl::StrAppend(&texts.back(), " ", entry.position());
  }
  return texts;
}

class HeldResultsTest : public ::testing::Test {
 protected:
  std::vector<std::string> AddAt(absl::Duration at, v1::StepResult result, bool more = true) {
    return Texts(results_.Add(std::move(result), more, start_ + at));
  }
  const absl::Time start_ = absl::FromUnixSeconds(1000);
  HeldResults results_;
};

TEST_F(HeldResultsTest, TheFirstOfManyIsNotHeldAndThoseBehindItGoTogether) {
  EXPECT_THAT(AddAt(0 * kFast, Result(0, {1, 11})), ElementsAre("0: 1 11"));
  EXPECT_EQ(results_.due(), absl::InfiniteFuture());
  EXPECT_THAT(AddAt(1 * kFast, Result(0, {2, 12})), IsEmpty());
  EXPECT_EQ(results_.due(), start_ + 1 * kFast + HeldResults::kHold);
  EXPECT_THAT(AddAt(2 * kFast, Result(0, {3})), IsEmpty());
  EXPECT_EQ(results_.due(), start_ + 1 * kFast + HeldResults::kHold) << "the oldest counts";
  EXPECT_THAT(AddAt(6 * kFast, Result(0, {4})), ElementsAre("0: 2 12 3 4"));
  EXPECT_EQ(results_.due(), absl::InfiniteFuture());
  EXPECT_THAT(Texts(results_.Take()), IsEmpty());
}

TEST_F(HeldResultsTest, WhoseStepsTakeLongerIsNotHeld) {
  for (int i = 0; i < 5; ++i) {
    EXPECT_THAT(AddAt(i * HeldResults::kHold, Result(0, {7})), ElementsAre("0: 7"));
  }
}

TEST_F(HeldResultsTest, WhatNothingComesBehindTakesTheOthersAlong) {
  AddAt(0 * kFast, Result(0, {1}));
  EXPECT_THAT(AddAt(1 * kFast, Result(0, {2})), IsEmpty());
  EXPECT_THAT(AddAt(2 * kFast, Result(0, {3}), /*more=*/false), ElementsAre("0: 2 3"));
  EXPECT_THAT(AddAt(3 * kFast, Result(0, {4})), IsEmpty());
  EXPECT_THAT(Texts(results_.Take()), ElementsAre("0: 4"));
}

TEST_F(HeldResultsTest, AStepOfTheRoutersComesBehindThoseBeforeIt) {
  AddAt(0 * kFast, Result(0, {1}));
  EXPECT_THAT(AddAt(1 * kFast, Result(0, {2})), IsEmpty());
  EXPECT_THAT(AddAt(2 * kFast, Result(9, {20}), /*more=*/false), ElementsAre("0: 2", "9: 20"));
}

}  // namespace
}  // namespace rwkv::worker
