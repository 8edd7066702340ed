#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/common.pb.h"
#include "tests/testing/equals_proto.h"
#include "tests/testing/fake_clock.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::testing {
namespace {

template <typename Matcher, typename Value>
std::string Explain(const Matcher& matcher, const Value& value) {
  StringMatchResultListener listener;
  ExplainMatchResult(matcher, value, &listener);
  return listener.str();
}

TEST(StatusMatchersTest, IsOkTellsOkFromError) {
  EXPECT_THAT(absl::OkStatus(), IsOk());
  EXPECT_THAT(absl::AbortedError("x"), Not(IsOk()));
  EXPECT_THAT(absl::StatusOr<int>(1), IsOk());
  EXPECT_THAT(absl::StatusOr<int>(absl::AbortedError("x")), Not(IsOk()));
  EXPECT_THAT(Explain(IsOk(), absl::AbortedError("moved")), HasSubstr("ABORTED: moved"));
}

TEST(StatusMatchersTest, StatusIsNeedsCodeAndMessage) {
  const absl::Status status = absl::AbortedError("revision moved");
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kAborted));
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kAborted, HasSubstr("revision")));
  EXPECT_THAT(status, Not(StatusIs(absl::StatusCode::kAborted, HasSubstr("other"))));
  EXPECT_THAT(status, Not(StatusIs(absl::StatusCode::kInternal)));
  EXPECT_THAT(absl::StatusOr<int>(status), StatusIs(absl::StatusCode::kAborted));
  EXPECT_THAT(absl::OkStatus(), StatusIs(absl::StatusCode::kOk));
}

TEST(StatusMatchersTest, IsOkAndHoldsLooksInside) {
  EXPECT_THAT(absl::StatusOr<int>(3), IsOkAndHolds(3));
  EXPECT_THAT(absl::StatusOr<int>(3), IsOkAndHolds(Gt(2)));
  EXPECT_THAT(absl::StatusOr<int>(3), Not(IsOkAndHolds(4)));
  EXPECT_THAT(absl::StatusOr<int>(absl::InternalError("x")), Not(IsOkAndHolds(_)));
  EXPECT_THAT(absl::StatusOr<std::string>("text"), IsOkAndHolds("text"));
}

TEST(EqualsProtoTest, ComparesFieldByField) {
  v1::StatusProto proto;
  proto.set_code(5);
  proto.set_message("gone");
  EXPECT_THAT(proto, EqualsProto(R"pb(message: "gone" code: 5)pb"));
  EXPECT_THAT(proto, EqualsProto(proto));
  EXPECT_THAT(proto, Not(EqualsProto("code: 5")));
  EXPECT_THAT(proto, Not(EqualsProto("no proto")));
  EXPECT_THAT(Explain(EqualsProto("code: 6 message: \"gone\""), proto), HasSubstr("code"));
}

TEST(FakeClockTest, MovesOnlyWhenTold) {
  FakeClock clock;
  const absl::Time start = clock.Now();
  EXPECT_EQ(clock.Now(), start);
  clock.Advance(absl::Seconds(5));
  EXPECT_EQ(clock.Now(), start + absl::Seconds(5));
  clock.Set(absl::UnixEpoch());
  EXPECT_EQ(clock.Now(), absl::UnixEpoch());
}

}  // namespace
}  // namespace rwkv::testing
