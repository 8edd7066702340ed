#include "kernels/cpu/thread_team.h"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::kernels::cpu {
namespace {

using ::rwkv::testing::StatusIs;
using ::testing::AllOf;
using ::testing::Each;
using ::testing::Ge;
using ::testing::HasSubstr;
using ::testing::Lt;

class ThreadTeamTest : public ::testing::TestWithParam<int> {
 protected:
  std::unique_ptr<ThreadTeam> team_ = *ThreadTeam::Create(GetParam());
};

TEST_P(ThreadTeamTest, EveryPartIsComputedOnceByAThreadOfTheTeam) {
  for (const int64_t parts : {0, 1, 2, 3, 17, 1000}) {
    std::vector<std::atomic<int>> times(static_cast<size_t>(parts));
    std::vector<int> threads(static_cast<size_t>(parts));
    team_->Run(parts, [&](int64_t part, int thread) {
      ++times[part];
      threads[part] = thread;
    });
    for (int64_t part = 0; part < parts; ++part) EXPECT_EQ(times[part], 1) << part << " of " << parts;
    EXPECT_THAT(threads, Each(AllOf(Ge(0), Lt(GetParam()))));
  }
}

// A thread's own share comes first, from its front without a gap; what it takes of others comes from their ends.
TEST_P(ThreadTeamTest, AThreadGoesOnFromWhereItWas) {
  constexpr int64_t kParts = 4000;
  const int threads = GetParam();
  std::vector<std::vector<int64_t>> of_thread(static_cast<size_t>(threads));
  for (std::vector<int64_t>& parts : of_thread) parts.reserve(kParts);
  team_->Run(kParts, [&](int64_t part, int thread) { of_thread[static_cast<size_t>(thread)].push_back(part); });
  for (int thread = 0; thread < threads; ++thread) {
    const int64_t begin = kParts * thread / threads, end = kParts * (thread + 1) / threads;
    const std::vector<int64_t>& parts = of_thread[static_cast<size_t>(thread)];
    size_t i = 0;
    while (i < parts.size() && parts[i] == begin + static_cast<int64_t>(i) && parts[i] < end) ++i;
    for (size_t j = i; j < parts.size(); ++j) {
      EXPECT_TRUE(parts[j] < begin || parts[j] >= end) << thread << "'s own " << parts[j] << " behind others'";
      const bool same_share = j > i && parts[j] * threads / kParts == parts[j - 1] * threads / kParts;
      if (same_share) EXPECT_LT(parts[j], parts[j - 1]) << "of thread " << thread;
    }
  }
}

TEST_P(ThreadTeamTest, SharesWithoutPartsAreNotForgotten) {
  for (int64_t i = 0; i < 1000; ++i) {
    const int64_t parts = i % 100 == 99 ? 1000 : 2;
    std::atomic<int64_t> sum(0);
    team_->Run(parts, [&](int64_t part, int) { sum += part; });
    ASSERT_EQ(sum, parts * (parts - 1) / 2) << i;
  }
}

// A late thread must not compute for an operation that is over, nor anybody return before all is done.
TEST_P(ThreadTeamTest, ShortOperationsInARowSeeEachOthersResults) {
  std::vector<int64_t> values(5, 0);
  for (int64_t i = 0; i < 20'000; ++i) {
    team_->Run(5, [&values, i](int64_t part, int) {
      if (values[part] == i) values[part] = i + 1;
    });
  }
  EXPECT_THAT(values, Each(20'000));
}

TEST_P(ThreadTeamTest, SleepersAreWokenForTheNextOperation) {
  for (int i = 0; i < 20; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));  // Longer than they spin; none waits for this.
    std::atomic<int64_t> sum(0);
    team_->Run(100, [&](int64_t part, int) { sum += part; });
    EXPECT_EQ(sum, 4950);
  }
}

// Each of two parts waits for the other, so two threads must be at it: the caller alone would never return.
TEST_P(ThreadTeamTest, ThreadsComputeSideBySide) {
  if (GetParam() == 1) GTEST_SKIP() << "one thread";
  std::atomic<int> arrived(0);
  std::atomic<bool> met(false);
  team_->Run(2, [&](int64_t, int) {
    ++arrived;
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(30);
    while (arrived < 2 && std::chrono::steady_clock::now() < end) std::this_thread::yield();
    if (arrived == 2) met = true;
  });
  EXPECT_TRUE(met) << "the second thread of " << GetParam() << " did not come within 30 s";
}

#if defined(__x86_64__)  // Elsewhere they stay (flush_subnormals.h).
TEST_P(ThreadTeamTest, SubnormalResultsAreZeroOnEveryThreadAndOnlyInside) {
  volatile float smallest = std::numeric_limits<float>::min();
  std::vector<float> halves(64, 1.0f);
  team_->Run(64, [&](int64_t part, int) { halves[part] = smallest * 0.5f; });
  EXPECT_THAT(halves, Each(0.0f));
  EXPECT_GT(smallest * 0.5f, 0.0f);
}
#endif

INSTANTIATE_TEST_SUITE_P(Threads, ThreadTeamTest, ::testing::Values(1, 2, 3, 7),
                         [](const auto& info) { return std::to_string(info.param); });

// As many operations as their numbers last (some minutes of a busy worker), and a few more.
TEST(ThreadTeamNumbersTest, OperationsAreNumberedAnewWithoutAPartLost) {
  const std::unique_ptr<ThreadTeam> team = *ThreadTeam::Create(2);
  int64_t computed[2] = {};
  constexpr int64_t kOperations = (int64_t{1} << 24) + 10;
  for (int64_t i = 0; i < kOperations; ++i) team->Run(2, [&](int64_t part, int) { ++computed[part]; });
  EXPECT_THAT(computed, Each(kOperations));
}

TEST(ThreadTeamCreateTest, ANumberOfThreadsThatCannotBeIsRefused) {
  for (const int threads : {-1, 0, ThreadTeam::kMaxThreads + 1}) {
    EXPECT_THAT(ThreadTeam::Create(threads),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(std::to_string(threads))));
  }
}

}  // namespace
}  // namespace rwkv::kernels::cpu
