#include "services/common/parallel.h"

#include <atomic>
#include <set>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/barrier.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::common {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::Each;
using ::testing::ElementsAre;

TEST(ParallelTest, EachJobRunsOnceAndIsCounted) {
  for (const size_t at_once : {1, 3, 8, 100}) {
    std::vector<int> calls(8);
    std::vector<size_t> done;
    EXPECT_THAT(RunInParallel(
                    calls.size(), at_once,
                    [&](size_t i) {
                      ++calls[i];
                      return absl::OkStatus();
                    },
                    [&](size_t count) { done.push_back(count); }),
                IsOk());
    EXPECT_THAT(calls, Each(1)) << at_once;
    EXPECT_THAT(done, ElementsAre(1, 2, 3, 4, 5, 6, 7, 8)) << at_once;
  }
  EXPECT_THAT(RunInParallel(
                  0, 4, [](size_t) { return absl::InternalError("called"); }, [](size_t) {}),
              IsOk());
}

TEST(ParallelTest, AsManyRunTogetherAsAreAllowed) {
  absl::Barrier all(4);  // Returns only when four wait.
  EXPECT_THAT(RunInParallel(
                  4, 4,
                  [&](size_t) {
                    all.Block();
                    return absl::OkStatus();
                  },
                  [](size_t) {}),
              IsOk());
}

TEST(ParallelTest, TheFirstErrorByNumberStopsAll) {
  for (const size_t at_once : {1, 2, 7}) {
    std::atomic<size_t> calls{0};
    EXPECT_THAT(RunInParallel(
                    1000, at_once,
                    [&](size_t i) {
                      ++calls;
                      return i < 5 ? absl::OkStatus() : absl::AbortedError(absl::StrCat("job ", i));
                    },
                    [](size_t) {}),
                StatusIs(absl::StatusCode::kAborted, "job 5"));
    EXPECT_LE(calls, 5 + at_once);
  }
}

// Jobs 0 and 1 run together, and 1 has failed by the time that 0 does.
TEST(ParallelTest, TheErrorOfALaterJobThatCameFirstDoesNotWin) {
  absl::Mutex mutex;
  bool second_began = false;
  const absl::Status status = RunInParallel(
      2, 2,
      [&](size_t i) {
        if (i == 1) {
          absl::MutexLock lock(&mutex);
          second_began = true;
          return absl::InternalError("job 1");
        }
        {
          absl::MutexLock lock(&mutex);
          if (!mutex.AwaitWithTimeout(absl::Condition(&second_began), absl::Seconds(30))) {
            return absl::DeadlineExceededError("job 1 did not begin");
          }
        }
        // Nothing tells when its error is recorded; coming before it would only make this test see less.
        absl::SleepFor(absl::Milliseconds(20));
        return absl::AbortedError("job 0");
      },
      [](size_t) {});
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kAborted, "job 0"));
}

TEST(ParallelTest, NoMoreThreadsThanAllowed) {
  constexpr size_t kJobs = 8;
  absl::Mutex mutex;
  std::set<std::thread::id> threads;
  size_t others = 0;
  const auto done = [&] { return others == kJobs - 1; };
  EXPECT_THAT(RunInParallel(
                  kJobs, 2,
                  [&](size_t i) {
                    absl::MutexLock lock(&mutex);
                    if (i == 0) {  // Keeps one of the two for as long as the other works.
                      return mutex.AwaitWithTimeout(absl::Condition(&done), absl::Seconds(30))
                                 ? absl::OkStatus()
                                 : absl::DeadlineExceededError("the other jobs have not run");
                    }
                    threads.insert(std::this_thread::get_id());
                    ++others;
                    // A third thread would take the next one meanwhile.
                    mutex.AwaitWithTimeout(absl::Condition(&done), absl::Milliseconds(2));
                    return absl::OkStatus();
                  },
                  [](size_t) {}),
              IsOk());
  EXPECT_EQ(threads.size(), 1);
}

}  // namespace
}  // namespace rwkv::common
