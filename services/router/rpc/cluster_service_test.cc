

#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/cluster.pb.h"
#include "services/router/rpc/services_fixture.h"
#include "services/router/testing/fake_cluster.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using ::rwkv::testing::IsOk;
using ::testing::HasSubstr;

using ClusterServiceTest = ServicesTest;

TEST_F(ClusterServiceTest, StatusNamesEveryProcess) {
  StartServer();
  v1::GetStatusResponse status;
  ASSERT_THAT(Call(*cluster_stub_, &v1::Cluster::Stub::GetStatus, v1::GetStatusRequest(), &status), IsOk());
  ASSERT_EQ(status.processes_size(), 4);
  EXPECT_EQ(status.processes(0).role(), "router");
  EXPECT_EQ(status.processes(0).address(), "router:1");
  EXPECT_EQ(status.processes(0).health(), "serving");
  EXPECT_EQ(status.processes(1).role(), "worker");
  EXPECT_EQ(status.processes(1).first_layer(), 0);
  EXPECT_EQ(status.processes(1).end_layer(), 2);
  EXPECT_EQ(status.processes(2).stage_index(), 1);
  EXPECT_EQ(status.processes(2).end_layer(), 4);
  EXPECT_EQ(status.processes(3).role(), "state_store");
  EXPECT_EQ(status.processes(3).health(), "serving");
  EXPECT_EQ(status.pipeline_state(), "serving");
  EXPECT_EQ(status.model().name(), "fake");

  cluster_->pipeline().Kill(1);
  ASSERT_TRUE(WaitUntil([this] { return !cluster_->router().pipeline().state().serving; }));
  cluster_->store().FailWith(absl::UnavailableError("away"));
  status.Clear();
  ASSERT_THAT(Call(*cluster_stub_, &v1::Cluster::Stub::GetStatus, v1::GetStatusRequest(), &status), IsOk());
  EXPECT_EQ(status.processes(0).health(), "not serving");
  EXPECT_EQ(status.processes(2).health(), "unreachable");
  EXPECT_EQ(status.processes(3).health(), "unreachable");
  EXPECT_THAT(status.pipeline_state(), HasSubstr("connecting: "));
  cluster_->store().FailWith(absl::OkStatus());
}

}  // namespace
}  // namespace rwkv::router
