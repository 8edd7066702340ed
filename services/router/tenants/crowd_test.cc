#include "services/router/tenants/crowd.h"

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/common/grpc_status.h"
#include "tests/testing/fake_clock.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::AllOf;
using ::testing::HasSubstr;

class CrowdTest : public ::testing::Test {
 protected:
  using Places = std::vector<std::shared_ptr<Crowd::Place>>;

  Crowd::Options Options(int capacity) {
    Crowd::Options options;
    options.capacity = capacity;
    options.weight = [this](const std::string& tenant) { return weights_.count(tenant) ? weights_[tenant] : 1; };
    options.random = [this] { return random_; };
    options.refused = [this](const absl::Status&) { ++refused_; };
    return options;
  }
  // How many of `calls` came in.
  int Enter(Crowd& crowd, const std::string& tenant, int calls, Places* places) {
    int in = 0;
    for (int i = 0; i < calls; ++i) {
      absl::StatusOr<std::shared_ptr<Crowd::Place>> place = crowd.Enter(tenant);
      if (!place.ok()) continue;
      places->push_back(*std::move(place));
      ++in;
    }
    return in;
  }
  static absl::Duration PauseOf(const absl::StatusOr<std::shared_ptr<Crowd::Place>>& refused) {
    EXPECT_THAT(refused.status(), StatusIs(absl::StatusCode::kResourceExhausted));
    return common::GetRetryDelay(refused.status()).value_or(absl::ZeroDuration());
  }

  testing::FakeClock clock_;
  uint64_t random_ = 500;  // Pauses as they are on average.
  int refused_ = 0;
  std::map<std::string, double> weights_;
};

TEST_F(CrowdTest, OneIsAsManyAsThereAreAndPlacesComeBack) {
  Crowd crowd(Options(3), &clock_);
  Places places;
  EXPECT_EQ(Enter(crowd, "", 5, &places), 3);
  EXPECT_EQ(refused_, 2);
  EXPECT_THAT(crowd.Enter("").status(), StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("3 run or wait")));
  places[0]->Leave();
  places[0]->Leave();
  EXPECT_EQ(Enter(crowd, "", 2, &places), 1);
  places.clear();
  EXPECT_EQ(Enter(crowd, "", 5, &places), 3);
}

TEST_F(CrowdTest, AFloodKeepsNobodyElseOut) {
  Crowd crowd(Options(10), &clock_);
  Places flood, quiet;
  EXPECT_EQ(Enter(crowd, "flood", 100, &flood), 10);
  EXPECT_EQ(Enter(crowd, "quiet", 4, &quiet), 4);
  EXPECT_THAT(crowd.Enter("flood").status(),
              StatusIs(absl::StatusCode::kResourceExhausted,
                       AllOf(HasSubstr("14 run or wait"), HasSubstr("10 of them of tenant flood"))));
  // What is over its share is refused, too, however many others have.
  EXPECT_EQ(Enter(crowd, "quiet", 100, &quiet), 5);
}

TEST_F(CrowdTest, SharesAreByWeight) {
  weights_ = {{"large", 3}};
  Crowd crowd(Options(8), &clock_);
  Places places;
  EXPECT_EQ(Enter(crowd, "small", 8, &places), 8);
  EXPECT_EQ(Enter(crowd, "large", 100, &places), 23);  // 23/3 < 8/1, 24/3 is not.
  EXPECT_EQ(Enter(crowd, "small", 1, &places), 0);
}

TEST_F(CrowdTest, WhoComesBackIsLetIn) {
  Crowd crowd(Options(1), &clock_);
  Places places;
  EXPECT_EQ(Enter(crowd, "acme", 2, &places), 1);
  const auto again = crowd.EnterAgain("acme");
  ASSERT_NE(again, nullptr);
  places.clear();
  EXPECT_EQ(Enter(crowd, "acme", 1, &places), 0) << "it counts";
}

TEST_F(CrowdTest, ALargerFloodStaysAwayForLonger) {
  Crowd crowd(Options(4), &clock_);
  Places places;
  ASSERT_EQ(Enter(crowd, "flood", 4, &places), 4);
  // Of a closed loop of so many callers: what each pause makes of refusals a second.
  for (const int callers : {8, 200, 2000}) {
    absl::Duration pause;
    for (int second = 0; second < 60; ++second) {
      const int calls = std::max(1, static_cast<int>(callers / std::max(1.0, absl::ToDoubleSeconds(pause))));
      for (int i = 0; i < calls; ++i) pause = PauseOf(crowd.Enter("flood"));
      clock_.Advance(absl::Seconds(1));
    }
    if (callers == 8) EXPECT_EQ(pause, Crowd::kMinPause);
    if (callers == 200) EXPECT_GE(pause, absl::Seconds(8));
    if (callers == 2000) EXPECT_EQ(pause, Crowd::kMaxPause);
  }
  // And when it is over the pause is short again.
  for (int second = 0; second < 10; ++second) {
    (void)PauseOf(crowd.Enter("flood"));
    clock_.Advance(absl::Seconds(1));
  }
  EXPECT_EQ(PauseOf(crowd.Enter("flood")), Crowd::kMinPause);
}

TEST_F(CrowdTest, PausesAreSpread) {
  Crowd crowd(Options(1), &clock_);
  Places places;
  ASSERT_EQ(Enter(crowd, "", 1, &places), 1);
  random_ = 0;
  EXPECT_EQ(PauseOf(crowd.Enter("")), Crowd::kMinPause / 2);
  random_ = 999;
  EXPECT_GT(PauseOf(crowd.Enter("")), 1.4 * Crowd::kMinPause);
}

TEST_F(CrowdTest, WhereManyGetInManyMayTry) {
  Crowd crowd(Options(2), &clock_);
  Places others;
  ASSERT_EQ(Enter(crowd, "", 1, &others), 1);
  for (int second = 0; second < 20; ++second) {
    for (int i = 0; i < 100; ++i) {
      const auto place = crowd.Enter("");
      ASSERT_THAT(place, IsOk());
      EXPECT_EQ(PauseOf(crowd.Enter("")), Crowd::kMinPause);  // As many as come in.
      clock_.Advance(absl::Milliseconds(10));
    }
  }
}

}  // namespace
}  // namespace rwkv::router
