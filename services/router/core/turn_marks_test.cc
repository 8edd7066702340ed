#include "services/router/core/turn_marks.h"

#include <vector>

#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace rwkv::router {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

constexpr absl::Duration kTick = absl::Milliseconds(20);
const absl::Time kStart = absl::FromUnixSeconds(1767225600);

std::vector<uint64_t> TakeAll(TurnMarks& marks) {
  std::vector<uint64_t> taken;
  for (absl::optional<uint64_t> turn = marks.Take(0); turn.has_value(); turn = marks.Take(*turn)) {
    taken.push_back(*turn);
  }
  return taken;
}

std::vector<uint64_t> Due(TurnMarks& marks, absl::Time now) {
  marks.MarkDue(now, kTick);
  return TakeAll(marks);
}

TEST(TurnMarksTest, WhoIsMarkedIsTakenOnceInTheOrderOfArrival) {
  TurnMarks marks;
  for (const uint64_t turn : {7, 3, 7}) marks.Mark(turn);
  EXPECT_THAT(TakeAll(marks), ElementsAre(3, 7));
  EXPECT_THAT(TakeAll(marks), IsEmpty());
}

TEST(TurnMarksTest, WhoIsMarkedMeanwhileIsTakenIfItIsBehind) {
  TurnMarks marks;
  marks.Mark(5);
  ASSERT_EQ(marks.Take(0), 5);
  for (const uint64_t turn : {4, 5, 6}) marks.Mark(turn);
  EXPECT_EQ(marks.Take(5), 6);
  EXPECT_EQ(marks.Take(6), absl::nullopt);
  EXPECT_THAT(TakeAll(marks), ElementsAre(4, 5));
}

TEST(TurnMarksTest, WhoseTimeHasComeIsMarkedOnce) {
  TurnMarks marks;
  marks.WakeAt(1, kStart + absl::Seconds(2));
  marks.WakeAt(2, kStart + absl::Seconds(1));
  marks.WakeAt(2, kStart + absl::Seconds(3));  // In place of what was said before.
  marks.WakeAt(3, kStart + absl::Seconds(1));
  marks.WakeAt(3, absl::InfiniteFuture());
  EXPECT_THAT(Due(marks, kStart + absl::Seconds(1)), IsEmpty());
  EXPECT_THAT(Due(marks, kStart + absl::Seconds(2)), ElementsAre(1));
  EXPECT_THAT(Due(marks, kStart + absl::Seconds(3)), ElementsAre(2));
  EXPECT_THAT(Due(marks, kStart + absl::Hours(1)), IsEmpty());
}

TEST(TurnMarksTest, WhoIsPolledIsMarkedWithEveryTick) {
  TurnMarks marks;
  marks.Poll(1, true);
  EXPECT_THAT(Due(marks, kStart), ElementsAre(1));
  EXPECT_THAT(Due(marks, kStart + kTick / 2), IsEmpty());
  EXPECT_THAT(Due(marks, kStart + kTick), ElementsAre(1));
  EXPECT_THAT(Due(marks, kStart), ElementsAre(1)) << "the clock was set back";
  marks.Poll(1, false);
  EXPECT_THAT(Due(marks, kStart + absl::Hours(1)), IsEmpty());
}

TEST(TurnMarksTest, WhoIsOverIsForgotten) {
  TurnMarks marks;
  marks.Mark(1);
  marks.Poll(1, true);
  marks.WakeAt(1, kStart);
  marks.Forget(1);
  EXPECT_THAT(Due(marks, kStart + absl::Hours(1)), IsEmpty());
}

}  // namespace
}  // namespace rwkv::router
