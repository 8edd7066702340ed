#include "services/rwkvctl/signal_interrupts.h"

#include <signal.h>
#include <unistd.h>

#include "absl/synchronization/notification.h"
#include "absl/time/time.h"
#include "gtest/gtest.h"

namespace rwkv::rwkvctl {
namespace {

TEST(SignalInterruptsTest, TheHandlerRunsForEachSignal) {
  SignalInterrupts& interrupts = SignalInterrupts::Start();
  for (int round = 0; round < 3; ++round) {
    absl::Notification called;
    interrupts.SetHandler([&] {
      if (!called.HasBeenNotified()) called.Notify();
    });
    ASSERT_EQ(kill(getpid(), SIGINT), 0);
    EXPECT_TRUE(called.WaitForNotificationWithTimeout(absl::Seconds(10)));
    interrupts.SetHandler([] {});  // Whatever comes late meets no dead notification.
  }
}

TEST(SignalInterruptsDeathTest, WithoutAHandlerTheProcessEnds) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        SignalInterrupts::Start();
        kill(getpid(), SIGINT);
        for (;;) pause();
      },
      ::testing::ExitedWithCode(128 + SIGINT), "");
}

}  // namespace
}  // namespace rwkv::rwkvctl
