// For tests of what a user may not do, where everything runs as root:
//
//   GTEST_FLAG_SET(death_test_style, "threadsafe");  // A process of its own, which runs this test alone.
//   EXPECT_EXIT({ BecomeNobody(); std::exit(Open().ok() ? 1 : 0); }, ::testing::ExitedWithCode(0), "");
#pragma once

#include <string>

namespace rwkv::testing {

// From now on the process is no longer root (uid and gid 65534); nothing where it is not. Ends it if that cannot be.
void BecomeNobody();

// A folder under /tmp that any user may enter and write into, whatever the umask is; the same one in the processes that
// this one starts. The caller removes it.
std::string MakeOpenFolder();

}  // namespace rwkv::testing
