#include "services/common/periodic.h"

#include <memory>

#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/time.h"
#include "gtest/gtest.h"

namespace rwkv::common {
namespace {

TEST(PeriodicTest, RunsAgainAndAgain) {
  absl::Mutex mu;
  int runs = 0;
  Periodic periodic(absl::Milliseconds(1), [&] {
    absl::MutexLock lock(&mu);
    ++runs;
  });
  absl::MutexLock lock(&mu);
  const auto enough = [&] { return runs >= 3; };
  EXPECT_TRUE(mu.AwaitWithTimeout(absl::Condition(&enough), absl::Seconds(30)));
}

TEST(PeriodicTest, EndsAtOnceHoweverLongTheInterval) {
  absl::Notification ran;
  auto periodic = std::make_unique<Periodic>(absl::Hours(1), [&] { ran.Notify(); });
  ASSERT_TRUE(ran.WaitForNotificationWithTimeout(absl::Seconds(30)));
  periodic.reset();  // Would take an hour, and a second Notify() would crash.
}

}  // namespace
}  // namespace rwkv::common
