// Processes that are told to go while they start: each ends as it should, whatever it had begun by then.
#include <sys/types.h>

#include <algorithm>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <random>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/files.h"
#include "tests/testing/local_cluster.h"
#include "tests/testing/random_model.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/wait_until.h"

namespace rwkv {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::LocalCluster;

constexpr absl::Duration kLongest = absl::Milliseconds(200);  // From its start to the SIGTERM; it listens well before.
// Of all rounds; a busy machine makes fewer of them.
constexpr absl::Duration kEnough = absl::Seconds(25);
constexpr int kRounds = 60;
constexpr int kLeastRounds = 5;

// From the first line of main() on; before, SIGTERM ends any process as it comes. While it is still this program's
// child, about to become another program, all signals are blocked for a moment.
bool BlocksSigterm(pid_t pid) {
  std::error_code error;
  const auto program = std::filesystem::read_symlink(absl::StrCat("/proc/", pid, "/exe"), error);
  if (error || program == std::filesystem::read_symlink("/proc/self/exe", error)) return false;
  for (absl::string_view line : absl::StrSplit(testing::ReadFile(absl::StrCat("/proc/", pid, "/status")), '\n')) {
    uint64_t blocked = 0;
    if (!absl::ConsumePrefix(&line, "SigBlk:")) continue;
    return absl::SimpleHexAtoi(absl::StripAsciiWhitespace(line), &blocked) && (blocked >> (SIGTERM - 1) & 1) != 0;
  }
  return false;
}

TEST(StartStopTest, WhoeverIsToldToGoWhileItStartsEndsWell) {
  testing::RandomModelOptions model;
  LocalCluster::Options options;
  options.stages = 1;
  options.model = absl::StrCat(::testing::TempDir(), "/start_stop.safetensors");
  ASSERT_THAT(WriteRandomModel(model, options.model), IsOk());
  const auto cluster = LocalCluster::Start(options);
  ASSERT_THAT(cluster, IsOk());

  const uint32_t seed = std::random_device()();
  std::mt19937 random(seed);
  const std::vector<std::string> names = (*cluster)->process_names();
  const absl::Time begin = absl::Now();
  int rounds = 0;
  for (; rounds < kRounds && (rounds < kLeastRounds || absl::Now() - begin < kEnough); ++rounds) {
    SCOPED_TRACE(absl::StrCat("round ", rounds, " of seed ", seed));
    // All at once: each looks for the others, which come, go, or are not there.
    std::vector<std::pair<absl::Time, std::string>> ends;
    for (const std::string& name : names) {
      ASSERT_THAT((*cluster)->Terminate(name), IsOk());
      ASSERT_THAT((*cluster)->BeginRestart(name), IsOk());
      const absl::Duration after = std::uniform_real_distribution<>(0, 1)(random) * kLongest;
      ends.emplace_back(absl::Now() + after, name);
    }
    std::sort(ends.begin(), ends.end());
    for (const auto& [when, name] : ends) {
      ASSERT_TRUE(testing::WaitUntil([&, name = name] { return BlocksSigterm((*cluster)->pid(name)); })) << name;
      absl::SleepFor(when - absl::Now());  // The moment is what the test is about.
      ASSERT_THAT((*cluster)->BeginTerminate(name), IsOk());
    }
    for (const std::string& name : names) ASSERT_THAT((*cluster)->Terminate(name), IsOk());
  }
  std::printf("%d rounds in %s\n", rounds, absl::FormatDuration(absl::Now() - begin).c_str());
  ASSERT_THAT((*cluster)->RestartAll(), IsOk());
  EXPECT_THAT((*cluster)->WaitUntilServing(), IsOk()) << "it left something behind";
}

}  // namespace
}  // namespace rwkv
