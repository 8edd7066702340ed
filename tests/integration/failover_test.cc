// Two pipelines, a spare, two routers: whoever is killed or stopped under streaming sessions, each stream is that of an
// undisturbed run.
#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "grpcpp/channel.h"
#include "grpcpp/client_context.h"
#include "gtest/gtest.h"
#include "rwkv/v1/cluster.grpc.pb.h"
#include "rwkv/v1/cluster.pb.h"
#include "services/common/health.h"
#include "tests/testing/conversations.h"
#include "tests/testing/local_cluster.h"
#include "tests/testing/random_model.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/wait_until.h"

namespace rwkv {
namespace {

using ::rwkv::testing::Conversations;
using ::rwkv::testing::IsOk;
using ::rwkv::testing::IsOkAndHolds;
using ::rwkv::testing::LocalCluster;

LocalCluster::Options TwoOfEach() {
  testing::RandomModelOptions model;
  model.layers = 4;
  model.vocab_size = Conversations::kVocabulary;
  LocalCluster::Options options;
  options.model = absl::StrCat(::testing::TempDir(), "/failover.safetensors");
  EXPECT_OK(testing::WriteRandomModel(model, options.model));
  options.stages = 2;
  options.pipelines = 2;
  options.spares = {1};
  options.routers = 2;
  options.worker_flags = {"--slots=8", "--threads=1"};
  options.router_flags = {"--lease_ttl=3s", "--snapshot_interval_tokens=64"};
  return options;
}

class FailoverTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto cluster = LocalCluster::Start(TwoOfEach());
    ASSERT_THAT(cluster, IsOk());
    cluster_ = *std::move(cluster);
    conversations_ = std::make_unique<Conversations>(cluster_.get(), Conversations::Options());
    conversations_->Start();
  }

  // Brings back who is gone, and holds every conversation to an undisturbed one.
  void Compare() {
    conversations_->Stop();
    ASSERT_THAT(cluster_->RestartAll(), IsOk());
    ASSERT_THAT(cluster_->WaitUntilServing(), IsOk());
    conversations_->Compare();
  }

  void KillAndRestart(const std::string& name) {
    ASSERT_THAT(cluster_->Kill(name), IsOk());
    conversations_->ExpectProgress();  // Nobody waits for it.
    ASSERT_THAT(cluster_->Restart(name), IsOk());
    conversations_->ExpectProgress();
  }

  void FreezeAndThaw(const std::string& name) {
    ASSERT_THAT(cluster_->Freeze(name), IsOk());
    conversations_->ExpectProgress();
    ASSERT_THAT(cluster_->Thaw(name), IsOk());
    conversations_->ExpectProgress();
  }

  std::unique_ptr<LocalCluster> cluster_;
  std::unique_ptr<Conversations> conversations_;
};

TEST_F(FailoverTest, AnyWorkerIsKilledOrStopped) {
  for (const char* worker : {"worker-0", "worker-3"}) KillAndRestart(worker);
  FreezeAndThaw("worker-1");
  FreezeAndThaw("worker-2");
  KillAndRestart("worker-4");
  Compare();
}

TEST_F(FailoverTest, AnyRouterIsKilledOrStopped) {
  KillAndRestart("router-0");
  KillAndRestart("router-1");
  FreezeAndThaw("router-0");
  Compare();
}

TEST_F(FailoverTest, ARouterAndAWorkerAtOnceAndAllOfAPipeline) {
  ASSERT_THAT(cluster_->Kill("router-1"), IsOk());
  KillAndRestart("worker-2");
  ASSERT_THAT(cluster_->Restart("router-1"), IsOk());
  conversations_->ExpectProgress();
  ASSERT_THAT(cluster_->Kill("worker-0"), IsOk());
  KillAndRestart("worker-1");
  ASSERT_THAT(cluster_->Restart("worker-0"), IsOk());
  conversations_->ExpectProgress();
  Compare();
}

TEST_F(FailoverTest, EachRouterTellsWhatEveryPipelineHasToDo) {
  for (const char* router : {"router-0", "router-1"}) {  // Conversations are at one of them: the other tells, too.
    const auto stub = v1::Cluster::NewStub(cluster_->Channel(router));
    v1::GetStatusResponse status;
    EXPECT_TRUE(testing::WaitUntil([&] {
      grpc::ClientContext context;
      if (!stub->GetStatus(&context, v1::GetStatusRequest(), &status).ok() || status.lanes_size() != 2) return false;
      return std::any_of(status.lanes().begin(), status.lanes().end(),
                         [](const v1::LaneStatus& lane) { return lane.turns() > 0 && lane.slots_used() > 0; });
    })) << router
        << ": " << status.ShortDebugString();
  }
  Compare();
}

// Workers of another cut of the layers come up beside the old ones, which then drain; and back again.
TEST(ReshardingTest, TurnsMoveToAnotherCutOfTheLayersAndBack) {
  LocalCluster::Options options = TwoOfEach();
  options.pipelines = 1;
  options.spares = {};
  options.stages_of_another = 3;
  options.routers = 1;
  auto cluster = LocalCluster::Start(options);
  ASSERT_THAT(cluster, IsOk());
  Conversations conversations(cluster->get(), Conversations::Options());
  conversations.Start();
  const std::vector<std::vector<std::string>> cuts = {{"worker-0", "worker-1"}, {"worker-2", "worker-3", "worker-4"}};
  for (const int old : {0, 1, 0}) {
    for (const std::string& worker : cuts[old]) ASSERT_THAT((*cluster)->Terminate(worker), IsOk());
    conversations.ExpectProgress();
    for (const std::string& worker : cuts[old]) ASSERT_THAT((*cluster)->Restart(worker), IsOk());
    ASSERT_THAT((*cluster)->WaitUntilServing(), IsOk());
  }
  conversations.Compare();
  EXPECT_LT(conversations.longest_pause(), absl::Seconds(10));
}

TEST(StandbyTest, ARouterMoreThanPipelinesStandsByAndTakesOver) {
  LocalCluster::Options options = TwoOfEach();
  options.pipelines = 1;
  options.spares = {};
  auto cluster = LocalCluster::Start(options);
  ASSERT_THAT(cluster, IsOk());
  const auto serving = [&](int router, const std::string& name = "") {
    return common::CheckHealth((*cluster)->Channel(absl::StrCat("router-", router)), absl::Now() + absl::Seconds(5),
                               name);
  };
  int driver = -1;
  ASSERT_TRUE(testing::WaitUntil([&] {
    for (int i = 0; i < 2; ++i) {
      const absl::StatusOr<bool> is_serving = serving(i);
      if (is_serving.ok() && *is_serving) driver = i;
    }
    return driver >= 0;
  }));
  const int standby = 1 - driver;
  EXPECT_THAT(serving(standby), IsOkAndHolds(false));
  EXPECT_THAT(serving(standby, "live"), IsOkAndHolds(true));
  ASSERT_THAT((*cluster)->Kill(absl::StrCat("router-", driver)), IsOk());
  // In two seconds, on a machine with nothing else to do; what would be wrong waits for a timeout, of which the shortest
  // has thirty.
  const auto took_over = [&] {
    const absl::StatusOr<bool> is_serving = serving(standby);
    return is_serving.ok() && *is_serving;
  };
  ASSERT_TRUE(testing::WaitUntil(took_over, absl::Seconds(25)));
  // It falls when there is nothing left to serve with, and the process is still alive.
  ASSERT_THAT((*cluster)->Kill("worker-1"), IsOk());
  ASSERT_TRUE(testing::WaitUntil([&] {
    const absl::StatusOr<bool> is_serving = serving(standby);
    return is_serving.ok() && !*is_serving;
  }));
  EXPECT_THAT(serving(standby, "live"), IsOkAndHolds(true));
}

}  // namespace
}  // namespace rwkv
