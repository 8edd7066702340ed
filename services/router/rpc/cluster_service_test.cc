#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/cluster.pb.h"
#include "services/router/rpc/services_fixture.h"
#include "services/router/testing/fake_cluster.h"
#include "services/worker/client/fake_worker.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using ::rwkv::testing::IsOk;
using ::testing::HasSubstr;
using worker::FakePipeline;

using ClusterServiceTest = ServicesTest;

TEST_F(ClusterServiceTest, StatusNamesEveryProcess) {
  StartServer();
  v1::GetStatusResponse status;
  ASSERT_THAT(Call(*cluster_stub_, &v1::Cluster::Stub::GetStatus, v1::GetStatusRequest(), &status), IsOk());
  ASSERT_EQ(status.processes_size(), 5);
  EXPECT_EQ(status.processes(0).role(), "router");
  EXPECT_EQ(status.processes(0).address(), "router:1");
  EXPECT_EQ(status.processes(0).health(), "serving");
  EXPECT_EQ(status.processes(1).role(), "worker");
  EXPECT_EQ(status.processes(1).first_layer(), 0);
  EXPECT_EQ(status.processes(1).end_layer(), 2);
  EXPECT_EQ(status.processes(2).stage_index(), 1);
  EXPECT_EQ(status.processes(2).end_layer(), 4);
  EXPECT_EQ(status.processes(3).role(), "state_store");
  EXPECT_EQ(status.processes(3).address(), "store:1");
  EXPECT_EQ(status.processes(3).health(), "serving");
  EXPECT_EQ(status.processes(4).role(), "state_store");
  EXPECT_EQ(status.processes(4).address(), "store:2");
  EXPECT_EQ(status.processes(4).health(), "unreachable");
  EXPECT_EQ(status.processes(4).message(), "store:2 is away");
  EXPECT_EQ(status.pipeline_state(), "serving");
  EXPECT_EQ(status.model().name(), "fake");

  cluster_->pipeline().Kill(1);
  ASSERT_TRUE(WaitUntil([this] { return !cluster_->router().fleet().state().serving; }));
  cluster_->store().FailWith(absl::UnavailableError("away"));
  status.Clear();
  ASSERT_THAT(Call(*cluster_stub_, &v1::Cluster::Stub::GetStatus, v1::GetStatusRequest(), &status), IsOk());
  EXPECT_EQ(status.processes(0).health(), "not serving");
  EXPECT_EQ(status.processes(2).health(), "unreachable");
  EXPECT_EQ(status.processes(3).health(), "unreachable");
  EXPECT_THAT(status.pipeline_state(), HasSubstr("connecting: "));
  cluster_->store().FailWith(absl::OkStatus());
}

TEST_F(ClusterServiceTest, WhoDrainsIsNotServing) {
  StartServer();
  v1::GetStatusResponse status;
  ASSERT_THAT(Call(*cluster_stub_, &v1::Cluster::Stub::GetStatus, v1::GetStatusRequest(), &status), IsOk());
  EXPECT_EQ(status.processes(0).health(), "serving");
  cluster_->pipeline().SetDraining(1, true);
  // The router leaves that pipeline, its only one, as soon as it hears of it.
  ASSERT_THAT(Call(*cluster_stub_, &v1::Cluster::Stub::GetStatus, v1::GetStatusRequest(), &status), IsOk());
  EXPECT_EQ(status.processes(1).health(), "serving");
  EXPECT_EQ(status.processes(2).health(), "not serving");
  EXPECT_EQ(status.processes(2).message(), "draining");
  cluster_->router().Drain(absl::Now() + kTestLimit);
  ASSERT_THAT(Call(*cluster_stub_, &v1::Cluster::Stub::GetStatus, v1::GetStatusRequest(), &status), IsOk());
  EXPECT_EQ(status.processes(0).health(), "not serving");
  EXPECT_EQ(status.processes(0).message(), "draining");
  EXPECT_EQ(status.running_turns(), 0);
}

TEST_F(ClusterServiceTest, TurnsAreCounted) {
  FakePipeline::Options pipeline;
  pipeline.slots = 2;
  StartServer(pipeline);
  cluster_->pipeline().PauseSteps();
  std::vector<FakeCluster::Call> calls;
  for (uint32_t i = 0; i < 3; ++i) calls.push_back(cluster_->Start(Request(kPrompt, 2)));
  EXPECT_TRUE(WaitUntil([&] {
    v1::GetStatusResponse status;
    EXPECT_THAT(Call(*cluster_stub_, &v1::Cluster::Stub::GetStatus, v1::GetStatusRequest(), &status), IsOk());
    return status.running_turns() == 2 && status.waiting_turns() == 1;
  }));
  cluster_->pipeline().ResumeSteps();
  for (const FakeCluster::Call& call : calls) EXPECT_THAT(cluster_->Finish(call).status, IsOk());
}

}  // namespace
}  // namespace rwkv::router
