#include "tests/testing/test_limit.h"

#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "gtest/gtest.h"

namespace rwkv::testing {
namespace {

// What the signal's handler writes: it may not compose anything.
char message[1024] = "[  FAILED  ] the test: its time is nearly up, and no case has begun\n";

void Fail(int) {
  (void)!write(STDERR_FILENO, message, strlen(message));
  _exit(1);
}

class CaseNames final : public ::testing::EmptyTestEventListener {
 public:
  void OnTestStart(const ::testing::TestInfo& info) override { Compose(info, "has not ended"); }
  void OnTestEnd(const ::testing::TestInfo& info) override { Compose(info, "has ended, what comes behind it has not"); }

 private:
  static void Compose(const ::testing::TestInfo& info, const char* what) {
    std::snprintf(message, sizeof(message), "[  FAILED  ] %s.%s: %s, and the test's time is nearly up\n",
                  info.test_suite_name(), info.name(), what);
  }
};

}  // namespace

void LimitTests(int seconds) {
  if (seconds == 0) return;
  ::testing::UnitTest::GetInstance()->listeners().Append(new CaseNames);  // gtest's from here on.
  signal(SIGALRM, Fail);
  alarm(static_cast<unsigned>(seconds));
}

int TestSeconds() {
  const char* const given = std::getenv("TEST_TIMEOUT");
  return given == nullptr ? 0 : std::atoi(given) * 9 / 10;
}

}  // namespace rwkv::testing
