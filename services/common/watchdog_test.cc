#include "services/common/watchdog.h"

#include <atomic>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace rwkv::common {
namespace {

TEST(WatchdogTest, TellsWhenProgressEndsAndComesBack) {
  std::atomic<bool> progress{true};
  absl::Mutex mu;
  std::vector<bool> told;
  const auto wait = [&](size_t count) {
    absl::MutexLock lock(&mu);
    const auto enough = [&told, count] { return told.size() >= count; };
    EXPECT_TRUE(mu.AwaitWithTimeout(absl::Condition(&enough), absl::Seconds(30))) << "it said nothing";
  };
  std::atomic<int> asked{0};
  {
    const Watchdog watchdog(
        absl::Milliseconds(1),
        [&] {
          if (++asked == 3) progress = false;
          return progress.load();
        },
        [&](bool now) {
          absl::MutexLock lock(&mu);
          told.push_back(now);
        });
    wait(1);
    progress = true;
    wait(2);
  }
  EXPECT_THAT(told, ::testing::ElementsAre(false, true));
  EXPECT_GE(asked, 4);
}

}  // namespace
}  // namespace rwkv::common
