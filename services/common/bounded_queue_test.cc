#include "services/common/bounded_queue.h"

#include <memory>
#include <numeric>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace rwkv::common {
namespace {

const absl::Time kNoWait = absl::InfinitePast();

absl::Time Soon() { return absl::Now() + absl::Milliseconds(20); }
absl::Time Limit() { return absl::Now() + absl::Seconds(30); }

TEST(BoundedQueueTest, ItemsComeOutInOrder) {
  BoundedQueue<int> queue(3);
  EXPECT_TRUE(queue.TryPush(1));
  EXPECT_TRUE(queue.TryPush(2));
  EXPECT_TRUE(queue.TryPush(3));
  int item = 0;
  for (int expected : {1, 2, 3}) {
    ASSERT_TRUE(queue.Pop(&item, kNoWait));
    EXPECT_EQ(item, expected);
  }
  EXPECT_FALSE(queue.Pop(&item, kNoWait));
  EXPECT_EQ(item, 3) << "a Pop that fails leaves the item alone";
}

TEST(BoundedQueueTest, FullQueueRefusesAndTimesOut) {
  BoundedQueue<int> queue(1);
  ASSERT_TRUE(queue.TryPush(1));
  EXPECT_FALSE(queue.TryPush(2));
  const absl::Time deadline = Soon();
  EXPECT_FALSE(queue.Push(2, deadline));
  EXPECT_GE(absl::Now(), deadline);
}

TEST(BoundedQueueTest, PopTimesOutOnAnEmptyQueue) {
  BoundedQueue<int> queue(1);
  int item = 0;
  const absl::Time deadline = Soon();
  EXPECT_FALSE(queue.Pop(&item, deadline));
  EXPECT_GE(absl::Now(), deadline);
}

TEST(BoundedQueueTest, CapacityZeroCountsAsOne) {
  BoundedQueue<int> queue(0);
  EXPECT_TRUE(queue.TryPush(1));
  EXPECT_FALSE(queue.TryPush(2));
}

TEST(BoundedQueueTest, ClosedQueueEmptiesAndTakesNothing) {
  BoundedQueue<int> queue(2);
  ASSERT_TRUE(queue.TryPush(1));
  queue.Close();
  queue.Close();
  EXPECT_FALSE(queue.TryPush(2));
  int item = 0;
  EXPECT_TRUE(queue.Pop(&item, Limit()));
  EXPECT_EQ(item, 1);
  EXPECT_FALSE(queue.Pop(&item, Limit()));
}

TEST(BoundedQueueTest, CloseWakesBothKindsOfWaiters) {
  BoundedQueue<int> empty(1);
  BoundedQueue<int> full(1);
  ASSERT_TRUE(full.TryPush(1));
  const absl::Time limit = Limit();
  std::thread popper([&] {
    int item = 0;
    EXPECT_FALSE(empty.Pop(&item, limit));
  });
  std::thread pusher([&] { EXPECT_FALSE(full.Push(2, limit)); });
  empty.Close();
  full.Close();
  popper.join();
  pusher.join();
  EXPECT_LT(absl::Now(), limit) << "woken by the deadline only";
}

TEST(BoundedQueueTest, WaitingPushGoesOnWhenThereIsRoom) {
  BoundedQueue<int> queue(1);
  ASSERT_TRUE(queue.TryPush(1));
  std::thread pusher([&] { EXPECT_TRUE(queue.Push(2, Limit())); });
  int item = 0;
  EXPECT_TRUE(queue.Pop(&item, Limit()));
  EXPECT_TRUE(queue.Pop(&item, Limit()));
  EXPECT_EQ(item, 2);
  pusher.join();
}

TEST(BoundedQueueTest, MoveOnlyItemsPassThrough) {
  BoundedQueue<std::unique_ptr<int>> queue(1);
  ASSERT_TRUE(queue.TryPush(std::make_unique<int>(7)));
  std::unique_ptr<int> item;
  ASSERT_TRUE(queue.Pop(&item, kNoWait));
  EXPECT_EQ(*item, 7);
}

TEST(BoundedQueueTest, ManyThreadsLoseAndDoubleNothing) {
  constexpr int kThreads = 4;
  constexpr int kItems = 500;
  BoundedQueue<int> queue(3);
  std::vector<std::thread> pushers;
  std::vector<std::thread> poppers;
  std::vector<std::vector<int>> popped(kThreads);
  for (int t = 0; t < kThreads; ++t) {
    pushers.emplace_back([&queue, t] {
      for (int i = 0; i < kItems; ++i) EXPECT_TRUE(queue.Push(t * kItems + i, Limit()));
    });
    poppers.emplace_back([&queue, &out = popped[t]] {
      int item = 0;
      while (queue.Pop(&item, Limit())) out.push_back(item);
    });
  }
  for (std::thread& thread : pushers) thread.join();
  queue.Close();
  for (std::thread& thread : poppers) thread.join();
  std::vector<int> all;
  for (const std::vector<int>& part : popped) all.insert(all.end(), part.begin(), part.end());
  std::vector<int> expected(kThreads * kItems);
  std::iota(expected.begin(), expected.end(), 0);
  EXPECT_THAT(all, ::testing::UnorderedElementsAreArray(expected));
}

}  // namespace
}  // namespace rwkv::common
