// Generate: each token once, over lost connections, cancels and pauses.
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/generation.pb.h"
#include "services/common/grpc_status.h"
#include "services/router/client/cancellation.h"
#include "services/router/client/router_client.h"
#include "services/router/client/router_client_fixture.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using ::rwkv::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

using GenerateCallTest = RouterClientTest;

const absl::Status kLost = absl::UnavailableError("the connection is lost");

TEST_F(GenerateCallTest, EachIndexIsSeenOnceOverLostConnections) {
  generation_.Expect(
      {{{0, 1}, false, kLost}, {{}, false, kLost}, {{2, 3, 4}, false, kLost}, {{5}, true, absl::OkStatus()}});
  std::vector<int> seen;
  EXPECT_OK(Generate(Resumable(), seen));
  EXPECT_THAT(seen, ElementsAre(0, 1, 2, 3, 4, 5, -1));
  std::vector<uint64_t> resumed;
  for (const v1::GenerateRequest& request : generation_.requests()) {
    resumed.push_back(request.resume_from());
    EXPECT_EQ(request.text(), "Hi");
    EXPECT_EQ(request.request_id(), "r");
  }
  EXPECT_THAT(resumed, ElementsAre(0, 2, 2, 5));
}

TEST_F(GenerateCallTest, StartsWhereTheCallerSays) {
  generation_.Expect({{{7}, false, kLost}, {{8}, true, absl::OkStatus()}});
  v1::GenerateRequest request = Resumable();
  request.set_resume_from(7);
  std::vector<int> seen;
  EXPECT_OK(Generate(request, seen));
  EXPECT_THAT(seen, ElementsAre(7, 8, -1));
}

TEST_F(GenerateCallTest, TokensSentAgainAreSkipped) {
  generation_.Expect({{{0, 1}, false, kLost}, {{0, 1, 2}, true, absl::OkStatus()}});
  std::vector<int> seen;
  EXPECT_OK(Generate(Resumable(), seen));
  EXPECT_THAT(seen, ElementsAre(0, 1, 2, -1));
}

TEST_F(GenerateCallTest, AConnectionLostAfterTheFinishLosesNothing) {
  generation_.Expect({{{0}, true, kLost}});
  std::vector<int> seen;
  EXPECT_OK(Generate(Resumable(), seen));
  EXPECT_THAT(seen, ElementsAre(0, -1));
}

TEST_F(GenerateCallTest, AMissingTokenIsDataLoss) {
  generation_.Expect({{{0, 2}, true, absl::OkStatus()}});
  std::vector<int> seen;
  EXPECT_THAT(Generate(Resumable(), seen), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("index 2")));
  EXPECT_THAT(seen, ElementsAre(0));
}

TEST_F(GenerateCallTest, AMissingFinishIsDataLoss) {
  generation_.Expect({{{0, 1}, false, absl::OkStatus()}});
  std::vector<int> seen;
  EXPECT_THAT(Generate(Resumable(), seen), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("last message")));
}

TEST_F(GenerateCallTest, WithoutSessionOrRequestIdALostConnectionIsReturned) {
  for (const bool session : {false, true}) {
    generation_.Expect({{{0}, false, kLost}, {{1}, true, absl::OkStatus()}});
    v1::GenerateRequest request = Resumable();
    if (session) {
      request.clear_request_id();
    } else {
      request.clear_session_id();
    }
    std::vector<int> seen;
    EXPECT_THAT(Generate(request, seen), StatusIs(absl::StatusCode::kUnavailable));
    EXPECT_THAT(seen, ElementsAre(0));
  }
  EXPECT_EQ(generation_.requests().size(), 2);
}

TEST_F(GenerateCallTest, AttemptsWithoutProgressAreBounded) {
  options_.max_resumes = 3;
  std::vector<int> seen;
  EXPECT_THAT(Generate(Resumable(), seen), StatusIs(absl::StatusCode::kUnavailable));
  EXPECT_EQ(generation_.requests().size(), 4);
}

TEST_F(GenerateCallTest, ProgressGivesNewAttempts) {
  options_.max_resumes = 1;
  std::vector<Script> scripts;
  for (uint64_t index = 0; index < 10; ++index) scripts.push_back({{index}, index == 9, kLost});
  generation_.Expect(scripts);
  std::vector<int> seen;
  EXPECT_OK(Generate(Resumable(), seen));
  EXPECT_EQ(seen.size(), 11);
}

// Each loss comes after a token, so each pause is the first one. Were they to double, the twelfth would be 20 s.
TEST_F(GenerateCallTest, AfterProgressThePausesBeginAnew) {
  options_.first_pause = absl::Milliseconds(10);
  options_.last_pause = absl::Hours(1);
  options_.stream_timeout = absl::Seconds(10);
  std::vector<Script> scripts;
  for (uint64_t index = 0; index < 12; ++index) scripts.push_back({{index}, index == 11, kLost});
  generation_.Expect(scripts);
  std::vector<int> seen;
  EXPECT_OK(Generate(Resumable(), seen));
  EXPECT_EQ(seen.size(), 13);
}

TEST_F(GenerateCallTest, ItComesBackWhenTheServerSays) {
  constexpr absl::Duration kAsked = absl::Milliseconds(150);  // The client's own pauses are 1 and 2 ms.
  const absl::Status away = common::WithRetryInfo(kLost, kAsked);
  generation_.Expect({{{0}, false, away}, {{}, false, away}, {{1}, true, absl::OkStatus()}});
  std::vector<int> seen;
  const absl::Time begin = absl::Now();
  EXPECT_OK(Generate(Resumable(), seen));
  EXPECT_GE(absl::Now() - begin, 2 * kAsked);
  EXPECT_THAT(seen, ElementsAre(0, 1, -1));
}

TEST_F(GenerateCallTest, OtherErrorsAreReturnedWithTheirDetails) {
  generation_.Expect({{{}, false, common::InvalidFieldError("sampling.top_p", "must be in (0, 1], not 2")}});
  std::vector<int> seen;
  const absl::Status status = Generate(Resumable(), seen);
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("not 2")));
  EXPECT_EQ(common::GetInvalidField(status), "sampling.top_p");
  EXPECT_EQ(generation_.requests().size(), 1);
}

TEST_F(GenerateCallTest, AnErrorOfTheCallbackEndsTheCallOnTheServerToo) {
  generation_.Expect({{{0, 1}, false, absl::OkStatus(), /*hang=*/true}});
  EXPECT_THAT(
      Client()->Generate(Resumable(), [](const v1::GenerateResponse&) { return absl::OutOfRangeError("enough"); }),
      StatusIs(absl::StatusCode::kOutOfRange, HasSubstr("enough")));
  EXPECT_TRUE(generation_.left().WaitForNotificationWithTimeout(absl::Seconds(10)));
}

TEST_F(GenerateCallTest, CancelEndsACallThatWaitsForATokenOnTheServerToo) {
  generation_.Expect({{{0}, false, absl::OkStatus(), /*hang=*/true}});
  Cancellation cancellation;
  absl::Notification first;
  std::thread canceller([&] {
    EXPECT_TRUE(first.WaitForNotificationWithTimeout(absl::Seconds(10))) << "no token";
    cancellation.Cancel();
  });
  const absl::Status status = Client()->Generate(
      Resumable(),
      [&](const v1::GenerateResponse&) {
        first.Notify();
        return absl::OkStatus();
      },
      &cancellation);
  canceller.join();
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kCancelled));
  EXPECT_TRUE(generation_.left().WaitForNotificationWithTimeout(absl::Seconds(10)));
  std::vector<int> seen;
  EXPECT_THAT(Generate(Resumable(), seen, &cancellation), StatusIs(absl::StatusCode::kCancelled));
}

TEST_F(GenerateCallTest, CancelEndsAPauseBetweenAttempts) {
  options_.first_pause = options_.last_pause = absl::Hours(1);
  generation_.Expect({{{0}, false, kLost}});
  Cancellation cancellation;
  absl::Notification first;
  std::thread canceller([&] {
    EXPECT_TRUE(first.WaitForNotificationWithTimeout(absl::Seconds(10))) << "no token";
    cancellation.Cancel();
  });
  const absl::Status status = Client()->Generate(
      Resumable(),
      [&](const v1::GenerateResponse&) {
        first.Notify();
        return absl::OkStatus();
      },
      &cancellation);
  canceller.join();
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kCancelled));
}

TEST_F(GenerateCallTest, StreamsAndCallsHaveDeadlines) {
  options_.stream_timeout = absl::Milliseconds(100);
  options_.call_timeout = absl::Milliseconds(100);
  generation_.Expect({{{0}, false, absl::OkStatus(), /*hang=*/true}});
  std::vector<int> seen;
  EXPECT_THAT(Generate(Resumable(), seen), StatusIs(absl::StatusCode::kDeadlineExceeded));
  v1::TokenizeRequest request;
  request.set_data("hang");
  EXPECT_THAT(Client()->Tokenize(request), StatusIs(absl::StatusCode::kDeadlineExceeded));
}

TEST_F(GenerateCallTest, AGenerateMayHaveADeadlineOfItsOwn) {
  generation_.Expect({{{0}, false, absl::OkStatus(), /*hang=*/true}});
  const auto ignore = [](const v1::GenerateResponse&) { return absl::OkStatus(); };
  EXPECT_THAT(Client()->Generate(Resumable(), ignore, nullptr, absl::Now() + absl::Milliseconds(100)),
              StatusIs(absl::StatusCode::kDeadlineExceeded));
}

}  // namespace
}  // namespace rwkv::router
