#include "tests/testing/test_limit.h"

#include <unistd.h>

#include <cstdlib>

#include "gtest/gtest.h"

namespace rwkv::testing {
namespace {

TEST(TestLimitDeathTest, ACaseThatNeverEndsIsNamed) {
  if (TestSeconds() == 0) GTEST_SKIP() << "only Bazel gives tests a limit";
  EXPECT_EXIT(
      {
        alarm(1);
        for (;;) pause();
      },
      ::testing::ExitedWithCode(1), "FAILED.*TestLimitDeathTest.ACaseThatNeverEndsIsNamed: has not ended");
}

TEST(TestLimitTest, ComesBeforeBazels) {
  if (std::getenv("TEST_TIMEOUT") == nullptr) GTEST_SKIP() << "only Bazel gives tests a limit";
  EXPECT_GT(TestSeconds(), 0);
  EXPECT_LT(TestSeconds(), std::atoi(std::getenv("TEST_TIMEOUT")));
}

}  // namespace
}  // namespace rwkv::testing
