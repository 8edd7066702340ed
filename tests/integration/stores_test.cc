// Two stores over a PostgreSQL and an S3: whichever of the four is killed, stopped or restarted under streaming
// sessions, each stream is that of an undisturbed run.
#include <csignal>
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/conversations.h"
#include "tests/testing/local_cluster.h"
#include "tests/testing/shared_cluster.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_servers.h"

namespace rwkv {
namespace {

using ::rwkv::testing::Conversations;
using ::rwkv::testing::IsOk;
using ::rwkv::testing::LocalCluster;
using ::rwkv::testing::SharedServers;

class StoresTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto servers = SharedServers::Launch();
    if (absl::IsFailedPrecondition(servers.status())) GTEST_SKIP() << servers.status().message();
    ASSERT_THAT(servers, IsOk());
    servers_ = *std::move(servers);
    auto options = testing::TwoOfEverything(servers_, /*slots=*/8);
    ASSERT_THAT(options, IsOk());
    auto cluster = LocalCluster::Start(*options);
    ASSERT_THAT(cluster, IsOk());
    cluster_ = *std::move(cluster);
    conversations_ = std::make_unique<Conversations>(cluster_.get(), Conversations::Options());
    conversations_->Start();
  }

  void Compare() {
    conversations_->Stop();
    ASSERT_THAT(cluster_->RestartAll(), IsOk());
    ASSERT_THAT(cluster_->WaitUntilServing(), IsOk());
    conversations_->Compare();
  }

  SharedServers servers_;
  std::unique_ptr<LocalCluster> cluster_;
  std::unique_ptr<Conversations> conversations_;
};

TEST_F(StoresTest, EitherStoreIsKilledOrStopped) {
  for (const std::string& store : cluster_->Names("state_store")) {
    ASSERT_THAT(cluster_->Kill(store), IsOk());
    conversations_->ExpectProgress();  // At the other one.
    ASSERT_THAT(cluster_->Restart(store), IsOk());
    conversations_->ExpectProgress();
  }
  for (const std::string& store : cluster_->Names("state_store")) {
    ASSERT_THAT(cluster_->Freeze(store), IsOk());
    conversations_->ExpectProgress();
    ASSERT_THAT(cluster_->Thaw(store), IsOk());
    conversations_->ExpectProgress();
  }
  // One drains, as in an upgrade.
  ASSERT_THAT(cluster_->Terminate("state_store-0"), IsOk());
  conversations_->ExpectProgress();
  ASSERT_THAT(cluster_->Restart("state_store-0"), IsOk());
  Compare();
}

TEST_F(StoresTest, BothStoresAreKilledAtOnceAndARouterWithOne) {
  for (const std::string& store : cluster_->Names("state_store")) ASSERT_THAT(cluster_->Kill(store), IsOk());
  absl::SleepFor(absl::Seconds(1));  // The outage itself: nothing can go on, and nothing may be given up.
  for (const std::string& store : cluster_->Names("state_store")) ASSERT_THAT(cluster_->Restart(store), IsOk());
  conversations_->ExpectProgress();
  ASSERT_THAT(cluster_->Kill("router-0"), IsOk());
  ASSERT_THAT(cluster_->Kill("state_store-1"), IsOk());
  conversations_->ExpectProgress();
  Compare();
}

TEST_F(StoresTest, PostgresIsShutDownFastAtOnceAndKilled) {
  for (const int signal : {SIGINT, SIGQUIT, SIGKILL}) {
    if (signal == SIGKILL) {
      servers_.postgres->Kill();
    } else {
      servers_.postgres->Shutdown(signal);
    }
    absl::SleepFor(absl::Seconds(1));  // The outage itself: nothing is waited for.
    ASSERT_TRUE(conversations_->NoneFailed()) << "while PostgreSQL is away after signal " << signal;
    ASSERT_THAT(servers_.postgres->Restart(), IsOk());
    conversations_->ExpectProgress();
  }
  // And while it restarts, a store with changes under way is killed.
  servers_.postgres->Shutdown(SIGQUIT);
  ASSERT_THAT(cluster_->Kill("state_store-0"), IsOk());
  ASSERT_THAT(servers_.postgres->Restart(), IsOk());
  conversations_->ExpectProgress();
  Compare();
}

TEST_F(StoresTest, WithoutS3StreamsGoOnAndStatesAreMadeAgain) {
  servers_.s3->Kill();
  conversations_->ExpectProgress();
  // What a worker held is nowhere else, or in an S3 that is away: its sessions are read again from the log.
  ASSERT_THAT(cluster_->Kill("worker-0"), IsOk());
  conversations_->ExpectProgress();
  ASSERT_THAT(servers_.s3->Restart(), IsOk());
  ASSERT_THAT(cluster_->Restart("worker-0"), IsOk());
  conversations_->ExpectProgress();
  servers_.s3->Freeze();
  conversations_->ExpectProgress();
  servers_.s3->Thaw();
  conversations_->ExpectProgress();
  Compare();
}

}  // namespace
}  // namespace rwkv
