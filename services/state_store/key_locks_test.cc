#include "services/state_store/key_locks.h"

#include <atomic>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::state_store {
namespace {

using absl::StatusCode;
using testing::HasSubstr;
using testing::IsOk;
using testing::StatusIs;

TEST(KeyLocksTest, HeldKeyIsWaitedForUntilTheTimeout) {
  KeyLocks locks;
  ASSERT_OK_AND_ASSIGN(const KeyLocks::Guard guard, locks.Lock({"a", "b"}));
  EXPECT_THAT(locks.Lock({"c", "b"}, absl::Milliseconds(1)),
              StatusIs(StatusCode::kUnavailable, HasSubstr("b is busy")));
  EXPECT_THAT(locks.Lock({"c"}, absl::Milliseconds(1)), IsOk());  // Nothing stays held by a call that gave up.
}

TEST(KeyLocksTest, KeyNamedTwiceIsTakenOnce) {
  KeyLocks locks;
  { ASSERT_OK_AND_ASSIGN(const KeyLocks::Guard guard, locks.Lock({"a", "a"})); }
  EXPECT_THAT(locks.Lock({"a"}, absl::Milliseconds(1)), IsOk());
}

TEST(KeyLocksTest, MovedGuardUnlocksOnce) {
  KeyLocks locks;
  {
    ASSERT_OK_AND_ASSIGN(KeyLocks::Guard guard, locks.Lock({"a"}));
    const KeyLocks::Guard moved(std::move(guard));
    EXPECT_THAT(locks.Lock({"a"}, absl::Milliseconds(1)), StatusIs(StatusCode::kUnavailable));
  }
  EXPECT_THAT(locks.Lock({"a"}, absl::Milliseconds(1)), IsOk());
}

TEST(KeyLocksTest, OnlyOneHoldsAKeyAndNoOrderDeadlocks) {
  KeyLocks locks;
  constexpr int kKeys = 5;
  std::atomic<int> holders[kKeys] = {};
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&, i] {
      for (int j = 0; j < 200; ++j) {
        const int first = (i + j) % kKeys, second = (i * 3 + j * 2) % kKeys;
        const auto guard = locks.Lock({absl::StrCat(first), absl::StrCat(second)});
        ASSERT_OK(guard);
        for (const int key : {first, second}) {
          if (key == second && first == second) continue;
          ASSERT_EQ(holders[key].fetch_add(1), 0);
        }
        for (const int key : {first, second}) {
          if (key == second && first == second) continue;
          holders[key].fetch_sub(1);
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace rwkv::state_store
