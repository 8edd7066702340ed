#include "services/router/rpc/uploads.h"

#include <string>

#include "absl/status/status.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/common/grpc_status.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::HasSubstr;

constexpr absl::Duration kLong = absl::Seconds(60);
const UploadLimits kPatient = {kLong, kLong};

void Ignore(const absl::Status&) {}

TEST(UploadsTest, BytesAreTakenAndGivenBack) {
  UploadShares shares(2, 100);
  Upload a(&shares, kPatient, Ignore);
  EXPECT_THAT(a.Keep(60), IsOk());
  {
    Upload b(&shares, kPatient, Ignore);
    EXPECT_THAT(b.Keep(40), IsOk());
    const absl::Status refused = a.Keep(1);
    EXPECT_THAT(refused, StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("have 100 bytes")));
    EXPECT_TRUE(common::GetRetryDelay(refused).has_value());
  }
  EXPECT_THAT(a.Keep(40), IsOk());
  EXPECT_THAT(a.Keep(1), StatusIs(absl::StatusCode::kResourceExhausted));
}

TEST(UploadsTest, WorkIsBoundedAndNothingIsTakenBeforeIt) {
  UploadShares shares(1, 100);
  Upload silent(&shares, kPatient, Ignore);
  EXPECT_THAT(silent.ExpectPiece(), IsOk());
  {
    Upload a(&shares, kPatient, Ignore);
    EXPECT_THAT(a.BeginWork(), IsOk());
    EXPECT_THAT(silent.Keep(1), StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("1 documents are in work")));
    EXPECT_THAT(silent.BeginWork(), StatusIs(absl::StatusCode::kResourceExhausted));
  }
  EXPECT_THAT(silent.Keep(1), IsOk());
  EXPECT_THAT(silent.BeginWork(), IsOk());
}

TEST(UploadsTest, ALatePieceIsSaidOnce) {
  UploadShares shares(1, 100);
  absl::Notification late;
  absl::Status status;
  Upload upload(&shares, {absl::Milliseconds(5), kLong}, [&](const absl::Status& why) {
    status = why;
    late.Notify();  // Twice would abort.
  });
  EXPECT_THAT(upload.ExpectPiece(), IsOk());
  ASSERT_TRUE(late.WaitForNotificationWithTimeout(kLong)) << "nobody was told";
  EXPECT_THAT(status,
              StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("no piece of the document came for 5ms")));
  EXPECT_FALSE(upload.PieceCame());
}

TEST(UploadsTest, PiecesInTimeDoNotExtendTheWhole) {
  UploadShares shares(1, 100);
  absl::Notification late;
  absl::Status status;
  const auto is_late = StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("did not come within 20ms"));
  Upload silent(&shares, {kLong, absl::Milliseconds(20)}, [&](const absl::Status& why) {
    status = why;
    late.Notify();
  });
  EXPECT_THAT(silent.ExpectPiece(), IsOk());
  ASSERT_TRUE(late.WaitForNotificationWithTimeout(kLong)) << "nobody was told";
  EXPECT_THAT(status, is_late);
  // Nor for one whose pieces come without end. The alarm may be faster than the next piece.
  absl::Notification busy_late;
  absl::Status expected;
  Upload busy(&shares, {kLong, absl::Milliseconds(20)}, [&](const absl::Status& why) {
    expected = why;
    busy_late.Notify();
  });
  for (const absl::Time limit = absl::Now() + kLong; absl::Now() < limit;) {
    if (const absl::Status next = busy.ExpectPiece(); !next.ok()) {
      expected = next;
      break;
    }
    if (busy.PieceCame()) continue;
    ASSERT_TRUE(busy_late.WaitForNotificationWithTimeout(kLong)) << "nobody was told";
    break;
  }
  EXPECT_THAT(expected, is_late);
}

TEST(UploadsTest, WhoExpectsNothingIsNotLate) {
  UploadShares shares(1, 100);
  absl::Notification other_late;
  Upload done(&shares, {absl::Milliseconds(5), kLong}, [](const absl::Status& why) { ADD_FAILURE() << why; });
  EXPECT_THAT(done.ExpectPiece(), IsOk());
  ASSERT_TRUE(done.PieceCame());
  {
    Upload gone(&shares, {absl::Milliseconds(10), kLong}, [](const absl::Status& why) { ADD_FAILURE() << why; });
    EXPECT_THAT(gone.ExpectPiece(), IsOk());
  }
  // An alarm that was set later and has gone off: theirs would have, too.
  Upload other(&shares, {absl::Milliseconds(30), kLong}, [&](const absl::Status&) { other_late.Notify(); });
  EXPECT_THAT(other.ExpectPiece(), IsOk());
  EXPECT_TRUE(other_late.WaitForNotificationWithTimeout(kLong));
}

}  // namespace
}  // namespace rwkv::router
