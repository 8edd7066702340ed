#include "services/rwkvctl/parallel.h"

#include <atomic>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/barrier.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::rwkvctl {
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

}  // namespace
}  // namespace rwkv::rwkvctl
