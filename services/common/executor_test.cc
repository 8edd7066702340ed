#include "services/common/executor.h"

#include <atomic>
#include <memory>
#include <utility>

#include "absl/synchronization/mutex.h"
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

TEST(ExecutorTest, SoManyRunAtATime) {
  absl::Mutex mutex;
  int running = 0;
  const auto all = [&] { return running == 3; };
  Executor executor(3, 8);
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(executor.TryRun([&] {
      absl::MutexLock lock(&mutex);
      ++running;
      EXPECT_TRUE(mutex.AwaitWithTimeout(absl::Condition(&all), absl::Seconds(10))) << running << " run";
    }));
  }
  executor.Stop();
}

TEST(ExecutorTest, WhatWorkHoldsGoesWhenItHasRun) {
  Executor executor(1, 2);
  absl::Notification gone;
  auto held = std::shared_ptr<int>(new int(7), [&gone](int* value) {
    delete value;
    gone.Notify();
  });
  ASSERT_TRUE(executor.TryRun([held = std::move(held)] {}));
  EXPECT_TRUE(gone.WaitForNotificationWithTimeout(absl::Seconds(30))) << "kept until there is other work";
}

}  // namespace
}  // namespace rwkv::common
