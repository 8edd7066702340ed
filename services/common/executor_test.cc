#include "services/common/executor.h"

#include <atomic>

#include "absl/synchronization/notification.h"
#include "absl/time/time.h"
#include "gtest/gtest.h"

namespace rwkv::common {
namespace {

TEST(ExecutorTest, WorkIsBoundedAndAllThatWasTakenRuns) {
  absl::Notification blocked;
  absl::Notification go_on;
  std::atomic<int> ran{0};
  Executor executor(1, 2);
  ASSERT_TRUE(executor.TryRun([&] {
    blocked.Notify();
    EXPECT_TRUE(go_on.WaitForNotificationWithTimeout(absl::Seconds(30)));
    ++ran;
  }));
  ASSERT_TRUE(blocked.WaitForNotificationWithTimeout(absl::Seconds(30)));
  EXPECT_TRUE(executor.TryRun([&] { ++ran; }));
  EXPECT_TRUE(executor.TryRun([&] { ++ran; }));
  EXPECT_FALSE(executor.TryRun([&] { ++ran; }));
  go_on.Notify();
  executor.Stop();
  EXPECT_EQ(ran, 3);
  EXPECT_FALSE(executor.TryRun([&] { ++ran; }));
}

}  // namespace
}  // namespace rwkv::common
