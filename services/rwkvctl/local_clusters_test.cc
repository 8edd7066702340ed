#include "services/rwkvctl/local_clusters.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::rwkvctl {
namespace {

using ::rwkv::testing::IsOkAndHolds;
using ::rwkv::testing::StatusIs;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

class LocalClustersTest : public ::testing::Test {
 protected:
  LocalClustersTest() : folder_(absl::StrCat(::testing::TempDir(), "/clusters")) {
    std::filesystem::remove_all(folder_);
    std::filesystem::create_directories(folder_);
  }
  void Write(const std::string& name, const std::string& router, int64_t pid, uint64_t started) {
    std::ofstream(folder_ + "/" + name) << "router=" << router << "\npid=" << pid << "\nstarted=" << started
                                        << "\ndata_dir=/data/" << name << "\nmodel=/m=1/" << name << ".pth\n";
  }
  absl::StatusOr<std::string> Router() {
    const absl::StatusOr<LocalCluster> only = OnlyCluster(RunningClusters(folder_));
    if (!only.ok()) return only.status();
    return only->router;
  }

  const std::string folder_;
};

TEST_F(LocalClustersTest, TheOnlyOneThatRunsIsTaken) {
  EXPECT_THAT(Router(), StatusIs(absl::StatusCode::kNotFound, AllOf(HasSubstr("run.sh"), HasSubstr("--router"))));
  Write("a", "127.0.0.1:1", getpid(), StartTicks(getpid()));
  EXPECT_THAT(Router(), IsOkAndHolds("127.0.0.1:1"));
  // Another was started later and has stopped: its file is gone; or it crashed, and its file stays.
  Write("b", "127.0.0.1:2", getpid(), StartTicks(getpid()) + 1);
  EXPECT_THAT(Router(), IsOkAndHolds("127.0.0.1:1"));
  Write("a", "127.0.0.1:1,127.0.0.1:4", getpid(), StartTicks(getpid()));
  EXPECT_THAT(Router(), IsOkAndHolds("127.0.0.1:1,127.0.0.1:4"));
  Write("c", "127.0.0.1:3", getppid(), StartTicks(getppid()));
  EXPECT_THAT(Router(), StatusIs(absl::StatusCode::kFailedPrecondition,
                                 AllOf(HasSubstr("--router 127.0.0.1:1,127.0.0.1:4 (/m=1/a.pth, in /data/a)"),
                                       HasSubstr("--router 127.0.0.1:3"), ::testing::Not(HasSubstr("127.0.0.1:2")))));
}

TEST_F(LocalClustersTest, AClusterThatLostItsFirstRouterIsFound) {
  const uint64_t here = StartTicks(getpid());
  const auto write = [&](const std::string& pids, const std::string& started) {
    std::ofstream(folder_ + "/a") << "router=127.0.0.1:1,127.0.0.1:2\npid=" << pids << "\nstarted=" << started << "\n";
  };
  write(absl::StrCat(getpid(), ",", getpid()), absl::StrCat(here + 1, ",", here));
  EXPECT_THAT(Router(), IsOkAndHolds("127.0.0.1:1,127.0.0.1:2"));
  write(absl::StrCat(getpid(), ",", getpid()), absl::StrCat(here + 1, ",", here + 2));
  EXPECT_THAT(Router(), StatusIs(absl::StatusCode::kNotFound));
  write(absl::StrCat(getpid(), ",", getpid()), absl::StrCat(here + 1));  // Of the second nothing is said.
  EXPECT_THAT(Router(), StatusIs(absl::StatusCode::kNotFound));
}

TEST_F(LocalClustersTest, TheClusterOfAnAddressIsFound) {
  Write("a", "127.0.0.1:1,127.0.0.1:4", getpid(), StartTicks(getpid()));
  Write("b", "127.0.0.1:3", getpid(), StartTicks(getpid()));
  std::ofstream(folder_ + "/b", std::ios::app) << "tls_authorities=/b/ca.crt\napi_key_file=/b/api_key\n";
  const std::vector<LocalCluster> clusters = RunningClusters(folder_);
  const LocalCluster* const a = ClusterOf("127.0.0.1:4", clusters);
  ASSERT_NE(a, nullptr);
  EXPECT_EQ(a->data_dir, "/data/a");
  EXPECT_EQ(a->tls_authorities, "");
  const LocalCluster* const b = ClusterOf("127.0.0.1:3", clusters);
  ASSERT_NE(b, nullptr);
  EXPECT_EQ(b->tls_authorities, "/b/ca.crt");
  EXPECT_EQ(b->api_key_file, "/b/api_key");
  EXPECT_NE(ClusterOf("127.0.0.1:4,127.0.0.1:1", clusters), nullptr);
  EXPECT_EQ(ClusterOf("127.0.0.1:1,127.0.0.1:3", clusters), nullptr);
  EXPECT_EQ(ClusterOf("127.0.0.1:2", clusters), nullptr);
}

TEST_F(LocalClustersTest, FilesThatSaySomethingElseArePassedOver) {
  std::ofstream(folder_ + "/empty");
  std::ofstream(folder_ + "/nonsense") << "router\n=\npid=x\n";
  Write("no_address", "nowhere", getpid(), StartTicks(getpid()));
  Write("no_process", "127.0.0.1:1", -1, 0);
  std::filesystem::create_directories(folder_ + "/folder");
  EXPECT_THAT(RunningClusters(folder_), IsEmpty());
  EXPECT_THAT(RunningClusters(folder_ + "/missing"), IsEmpty());
}

TEST_F(LocalClustersTest, ADeadProcessThatNobodyWaitedForIsDead) {
  const pid_t child = fork();
  if (child == 0) {
    for (;;) pause();
  }
  const uint64_t started = StartTicks(child);
  EXPECT_NE(started, 0u);
  Write("a", "127.0.0.1:1", child, started);
  EXPECT_THAT(Router(), IsOkAndHolds("127.0.0.1:1"));
  kill(child, SIGKILL);
  siginfo_t info;
  ASSERT_EQ(waitid(P_PID, child, &info, WEXITED | WNOWAIT), 0);
  EXPECT_EQ(StartTicks(child), 0u);
  EXPECT_THAT(RunningClusters(folder_), IsEmpty());
  waitpid(child, nullptr, 0);
}

}  // namespace
}  // namespace rwkv::rwkvctl
