// The limit of a test that waits for what never comes: it ends with its name, a little before Bazel would end it without
// a word.
#pragma once

namespace rwkv::testing {

// From now on this process has `seconds` >= 1. Then the test case that runs is reported as failed on standard error, and
// the process exits with 1. By SIGALRM, so that no thread is there beside the tests'. 0: no limit.
void LimitTests(int seconds);

// Nine tenths of what Bazel gives this test (TEST_TIMEOUT), 0 without Bazel: a debugger takes its time.
int TestSeconds();

}  // namespace rwkv::testing
