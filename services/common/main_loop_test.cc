#include "services/common/main_loop.h"

#include <signal.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

ABSL_FLAG(int, slots, 4, "A flag to set.");

namespace rwkv::common {
namespace {

using ::testing::ExitedWithCode;

// Runs RunMain in this process and exits with its result; for death tests, because Abseil parses flags once a process.
template <typename Run>
void RunAndExit(std::vector<std::string> arguments, Run run) {
  std::vector<char*> argv;
  arguments.insert(arguments.begin(), "/some/where/demo");
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  std::exit(RunMain(static_cast<int>(arguments.size()), argv.data(), "Does a demo.", run));
}

absl::Status PrintSlots() {
  std::fprintf(stderr, "slots=%d\n", absl::GetFlag(FLAGS_slots));
  return absl::OkStatus();
}

class MainLoopDeathTest : public ::testing::Test {
 protected:
  MainLoopDeathTest() { ::testing::FLAGS_gtest_death_test_style = "threadsafe"; }
};

TEST_F(MainLoopDeathTest, FlagsReachRun) {
  EXPECT_EXIT(RunAndExit({"--slots=7"}, PrintSlots), ExitedWithCode(0), "slots=7");
}

TEST_F(MainLoopDeathTest, ErrorOfRunIsOneLineAndStatusOne) {
  EXPECT_EXIT(RunAndExit({}, [] { return absl::NotFoundError("no\nmodel"); }), ExitedWithCode(1),
              "^demo: NOT_FOUND: no model\n$");
}

TEST_F(MainLoopDeathTest, ExitHandlersAreNotRunUnderThreadsThatLiveOn) {
#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
  GTEST_SKIP() << "sanitizers report from their exit handlers";
#endif
#endif
  EXPECT_EXIT(RunAndExit({},
                         [] {
                           std::atexit([] { std::abort(); });
                           return absl::OkStatus();
                         }),
              ExitedWithCode(0), "");
}

TEST_F(MainLoopDeathTest, UnknownFlagExitsWithTwo) {
  EXPECT_EXIT(RunAndExit({"--slotz=7"}, PrintSlots), ExitedWithCode(2), "slotz");
}

TEST_F(MainLoopDeathTest, BadFlagValueExitsWithTwo) {
  EXPECT_EXIT(RunAndExit({"--slots=many"}, PrintSlots), ExitedWithCode(2), "many");
}

TEST_F(MainLoopDeathTest, StrayArgumentExitsWithTwo) {
  EXPECT_EXIT(RunAndExit({"stray"}, PrintSlots), ExitedWithCode(2), "unexpected argument \"stray\"");
}

TEST_F(MainLoopDeathTest, WhatStandsBehindTwoDashesIsNoFlag) {
  EXPECT_EXIT(RunAndExit({"--slotz=7", "--", "--help"}, PrintSlots), ExitedWithCode(2), "slotz");
  EXPECT_EXIT(RunAndExit({"--", "--help"}, PrintSlots), ExitedWithCode(2), "unexpected argument \"--help\"");
}

TEST_F(MainLoopDeathTest, HelpExitsWithZero) { EXPECT_EXIT(RunAndExit({"--help"}, PrintSlots), ExitedWithCode(0), ""); }

TEST_F(MainLoopDeathTest, FlagfileIsRead) {
  const std::string path = ::testing::TempDir() + "/flags";
  std::FILE* file = std::fopen(path.c_str(), "w");
  ASSERT_NE(file, nullptr);
  std::fputs("--slots=9\n", file);
  std::fclose(file);
  EXPECT_EXIT(RunAndExit({"--flagfile=" + path}, PrintSlots), ExitedWithCode(0), "slots=9");
}

TEST_F(MainLoopDeathTest, SignalsAreBlockedInsideRun) {
  EXPECT_EXIT(RunAndExit({},
                         [] {
                           sigset_t blocked;
                           pthread_sigmask(SIG_BLOCK, nullptr, &blocked);
                           const bool both = sigismember(&blocked, SIGTERM) == 1 && sigismember(&blocked, SIGINT) == 1;
                           raise(SIGPIPE);  // Would end the process if it were not ignored.
                           return both ? absl::OkStatus() : absl::InternalError("not blocked");
                         }),
              ExitedWithCode(0), "");
}

}  // namespace
}  // namespace rwkv::common
