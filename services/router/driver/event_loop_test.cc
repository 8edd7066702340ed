#include "services/router/driver/event_loop.h"

#include <atomic>
#include <thread>
#include <vector>

#include "absl/synchronization/notification.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace rwkv::router {
namespace {

using ::testing::ElementsAre;

constexpr absl::Duration kLimit = absl::Seconds(30);

TEST(EventLoopTest, RunsEventsInOrderAndThenWhatFollows) {
  std::vector<int> ran;  // Of the loop's thread until Stop() returns.
  absl::Notification done;
  EventLoop loop({}, [&] {
    if (!ran.empty() && ran.back() == 3) ran.push_back(4);
  });
  loop.Post([&] {
    ran.push_back(1);
    loop.Post([&] {
      ran.push_back(3);
      done.Notify();
    });
    ran.push_back(2);
  });
  ASSERT_TRUE(done.WaitForNotificationWithTimeout(kLimit));
  loop.Stop();
  EXPECT_THAT(ran, ElementsAre(1, 2, 3, 4));
}

TEST(EventLoopTest, WhoBringsAnEventRunsItWhenNobodyElseDoes) {
  EventLoop::Options options;
  options.tick = absl::Hours(1);
  std::vector<int> ran;
  EventLoop loop(options, [&] {
    if (!ran.empty() && ran.back() > 0) ran.push_back(0);
  });
  loop.PostAndRun([&] {
    ran.push_back(1);
    loop.PostAndRun([&] { ran.push_back(3); });  // In its turn.
    ran.push_back(2);
  });
  loop.Stop();
  EXPECT_THAT(ran, ElementsAre(1, 2, 0, 3, 0));
}

TEST(EventLoopTest, AnEventThatComesWhileOthersRunIsNotRunBesideThem) {
  EventLoop::Options options;
  options.tick = absl::Hours(1);
  absl::Notification blocked;
  absl::Notification go_on;
  std::atomic<int> running{0};
  const auto alone = [&running] {
    EXPECT_EQ(++running, 1);
    --running;
  };
  std::atomic<int> ran{0};
  EventLoop loop(options, alone);
  std::thread first([&] {
    loop.PostAndRun([&] {
      ++running;
      blocked.Notify();
      EXPECT_TRUE(go_on.WaitForNotificationWithTimeout(kLimit));
      --running;
    });
  });
  ASSERT_TRUE(blocked.WaitForNotificationWithTimeout(kLimit));
  absl::Notification done;
  loop.PostAndRun([&] {  // Returns at once.
    alone();
    ++ran;
  });
  loop.Post([&] {
    alone();
    ++ran;
    done.Notify();
  });
  EXPECT_EQ(ran, 0);
  go_on.Notify();
  first.join();
  EXPECT_TRUE(done.WaitForNotificationWithTimeout(kLimit)) << "the loop's own thread takes over what came meanwhile";
  loop.Stop();
  EXPECT_EQ(ran, 2);
  loop.PostAndRun([&] { ++ran; });
  EXPECT_EQ(ran, 2) << "it has stopped";
}

TEST(EventLoopTest, TicksWithoutEvents) {
  std::atomic<int> ticks{0};
  absl::Notification enough;
  EventLoop::Options options;
  options.tick = absl::Milliseconds(1);
  EventLoop loop(options, [&] {
    if (++ticks == 3) enough.Notify();
  });
  EXPECT_TRUE(enough.WaitForNotificationWithTimeout(kLimit));
}

TEST(EventLoopTest, RequestsAreBoundedAndConsequencesAreNot) {
  absl::Notification blocked;
  absl::Notification go_on;
  EventLoop::Options options;
  options.max_requests = 2;
  std::atomic<int> ran{0};
  EventLoop loop(options, [] {});
  loop.Post([&] {
    blocked.Notify();
    EXPECT_TRUE(go_on.WaitForNotificationWithTimeout(kLimit));
  });
  ASSERT_TRUE(blocked.WaitForNotificationWithTimeout(kLimit));
  EXPECT_TRUE(loop.TryPost([&] { ++ran; }));
  EXPECT_TRUE(loop.TryPost([&] { ++ran; }));
  EXPECT_FALSE(loop.TryPost([&] { ++ran; }));
  for (int i = 0; i < 10; ++i) loop.Post([&] { ++ran; });
  go_on.Notify();
  loop.Stop();
  EXPECT_EQ(ran, 12);
  EXPECT_FALSE(loop.TryPost([&] { ++ran; }));
  loop.Post([&] { ++ran; });
  EXPECT_EQ(ran, 12);
}

}  // namespace
}  // namespace rwkv::router
