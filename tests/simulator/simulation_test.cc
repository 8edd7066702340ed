#include "tests/simulator/simulation.h"

#include <cstdint>
#include <ctime>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace rwkv::simulator {
namespace {

using ::testing::HasSubstr;

Options Seed(uint64_t seed) {
  Options options;
  options.seed = seed;
  return options;
}

// Of 10,000 seeds on two processors, three minutes; of the process, whatever else runs on the machine.
constexpr double kMostProcessorSeconds = 180;

// Laws B1, B2, B3, N1, S1, S4, T1, T2, T3, one family a turn, one driver a worker: whatever fails when.
void RunSeeds(uint64_t first, uint64_t count) {
  const std::clock_t begin = std::clock();
  uint64_t reused = 0;
  for (uint64_t seed = first; seed < first + count; ++seed) {
    const Result result = Simulate(Seed(seed));
    reused += result.reused_tokens;
    if (result.violation.empty()) continue;
    Options needed = Seed(seed);
    needed.faults = Shrink(needed);
    needed.all_faults = false;
    std::string faults;
    for (const int fault : needed.faults) absl::StrAppend(&faults, "\n  ", result.faults[fault].ToString());
    FAIL() << "seed " << seed << ": " << result.violation << faults << "\n  " << ReplayCommand(needed);
  }
  EXPECT_GT(reused, count);  // The prefix cache is met, too.
  EXPECT_LT(static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC, kMostProcessorSeconds);
}

TEST(SimulationTest, NoLawIsBroken) { RunSeeds(1, 5000); }
TEST(SimulationTest, NoLawIsBrokenByOtherSeeds) { RunSeeds(100001, 5000); }

TEST(SimulationTest, TheSameSeedIsTheSameRun) {
  for (uint64_t seed = 1; seed <= 50; ++seed) {
    const Result a = Simulate(Seed(seed)), b = Simulate(Seed(seed));
    EXPECT_EQ(a.digest, b.digest) << "seed " << seed;
    EXPECT_EQ(a.events, b.events);
    EXPECT_EQ(a.tokens, b.tokens);
  }
}

// What an event touched is all that it can change: who looks at everything else does what was done anyway.
TEST(SimulationTest, TheCoreLooksAtAllThatAnEventChanges) {
  for (uint64_t seed = 1; seed <= 1000; ++seed) {
    Options options = Seed(seed);
    const Result touched = Simulate(options);
    options.looks_at_all = true;
    const Result all = Simulate(options);
    ASSERT_EQ(touched.digest, all.digest) << "seed " << seed;
    ASSERT_EQ(touched.events, all.events) << "seed " << seed;
  }
}

struct BrokenCase {
  const char* name;
  Broken broken;
  std::vector<const char*> laws;  // One of these is seen to be broken.
};

Broken With(bool Broken::*part) {
  Broken broken;
  broken.*part = true;
  return broken;
}

// A check that cannot fail is none: with each part broken some seed says so.
TEST(SimulationTest, EveryBrokenPartIsFound) {
  const BrokenCase cases[] = {
      {"store_forgets_appends", With(&Broken::store_forgets_appends), {"T1"}},
      {"store_forgets_requests", With(&Broken::store_forgets_requests), {"T1", "T2", "T3"}},
      {"store_fences_nobody", With(&Broken::store_fences_nobody), {"T1", "T2", "T3", "S1"}},
      {"store_keeps_snapshots", With(&Broken::store_keeps_snapshots), {"S1", "T3"}},
      {"store_keeps_branches", With(&Broken::store_keeps_branches), {"T3", "S1"}},
      {"worker_keeps_states", With(&Broken::worker_keeps_states), {"T3", "S1"}},
      {"worker_clears_nothing", With(&Broken::worker_clears_nothing), {"T3", "S1"}},
      {"worker_saves_late", With(&Broken::worker_saves_late), {"S1"}},
      {"worker_stops_in_silence", With(&Broken::worker_stops_in_silence), {"T3"}},
      {"worker_feeds_unasked", With(&Broken::worker_feeds_unasked), {"T3", "S1"}},
      {"worker_answers_early", With(&Broken::worker_answers_early), {"T3: value"}},
      {"worker_checks_no_sums", With(&Broken::worker_checks_no_sums), {"N1", "T3", "S1"}},
      {"store_compares_nothing", With(&Broken::store_compares_nothing), {"N1", "T3"}},
      {"store_scopes_nothing", With(&Broken::store_scopes_nothing), {"B3", "N1"}},
      {"door_checks_nothing", With(&Broken::door_checks_nothing), {"B2"}},
      {"core_queues_all", With(&Broken::core_queues_all), {"B1"}},
      {"core_floods_clients", With(&Broken::core_floods_clients), {"B1"}},
      {"core_refuses_in_silence", With(&Broken::core_refuses_in_silence), {"B1"}},
      {"tenants_share_ids", With(&Broken::tenants_share_ids), {"B3"}},
      {"family_is_hidden", With(&Broken::family_is_hidden), {"N1", "T3"}},
      {"worker_has_two_drivers", With(&Broken::worker_has_two_drivers), {"two drivers"}},
  };
  for (const BrokenCase& one : cases) {
    std::string violation;
    for (uint64_t seed = 1; seed <= 20000 && violation.empty(); ++seed) {
      Options options = Seed(seed);
      options.broken = one.broken;
      violation = Simulate(options).violation;
    }
    bool is_law = false;
    for (const char* law : one.laws) is_law |= violation.find(law) != std::string::npos;
    EXPECT_TRUE(is_law) << one.name << ": " << (violation.empty() ? "was not noticed" : violation);
  }
}

TEST(SimulationTest, AFailingRunIsShrunk) {
  for (uint64_t seed = 1; seed <= 3000; ++seed) {
    Options options = Seed(seed);
    options.broken.family_is_hidden = true;
    const Result result = Simulate(options);
    if (result.violation.empty() || result.faults.size() < 4) continue;
    options.faults = Shrink(options);
    options.all_faults = false;
    EXPECT_LT(options.faults.size(), result.faults.size());
    EXPECT_FALSE(Simulate(options).violation.empty());
    EXPECT_THAT(ReplayCommand(options), HasSubstr(absl::StrCat("--first_seed=", seed)));
    return;
  }
  FAIL() << "no run fails";
}

}  // namespace
}  // namespace rwkv::simulator
