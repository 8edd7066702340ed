// A client of two routers.
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "grpcpp/server.h"
#include "grpcpp/server_builder.h"
#include "gtest/gtest.h"
#include "rwkv/v1/generation.pb.h"
#include "services/common/channel.h"
#include "services/common/grpc_status.h"
#include "services/router/client/router_client.h"
#include "services/router/client/router_client_fixture.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::ElementsAre;

const absl::Status kLost = absl::UnavailableError("the connection is lost");
const absl::Status kHeld =
    common::WithRetryInfo(absl::AbortedError("session s is held by router-0"), absl::Milliseconds(1));

class FailoverTest : public RouterClientTest {
 protected:
  FailoverTest() {
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(&other_generation_);
    builder.RegisterService(&other_cluster_);
    other_server_ = builder.BuildAndStart();
    const std::vector<std::shared_ptr<grpc::Channel>> channels = {
        common::MakeChannel(address_), common::MakeChannel(absl::StrCat("127.0.0.1:", port))};
    client_ = MakeRouterClient(channels, options_);
  }
  ~FailoverTest() override { other_server_->Shutdown(std::chrono::system_clock::now()); }

  absl::Status Generate(const v1::GenerateRequest& request) {
    return client_->Generate(request, [this](const v1::GenerateResponse& response) {
      seen_.push_back(response.has_finish() ? -1 : static_cast<int>(response.index()));
      return absl::OkStatus();
    });
  }

  ScriptedGeneration other_generation_;
  FixedCluster other_cluster_;
  std::unique_ptr<grpc::Server> other_server_;
  std::unique_ptr<RouterClient> client_;
  std::vector<int> seen_;
};

TEST_F(FailoverTest, ATurnGoesOnAtTheOtherRouterOnceItHasTheSession) {
  generation_.Expect({{{0, 1}, false, kLost}});
  other_generation_.Expect({{{}, false, kHeld}, {{}, false, kHeld}, {{2, 3}, true, absl::OkStatus()}});
  EXPECT_OK(Generate(Resumable()));
  EXPECT_THAT(seen_, ElementsAre(0, 1, 2, 3, -1));
  ASSERT_EQ(other_generation_.requests().size(), 3);
  EXPECT_EQ(other_generation_.requests()[2].resume_from(), 2);
  // Whoever answered last is asked first.
  other_generation_.Expect({{{0}, true, absl::OkStatus()}});
  EXPECT_OK(Generate(Resumable()));
  EXPECT_EQ(generation_.requests().size(), 1);
}

TEST_F(FailoverTest, ARouterThatStopsAndEndsItsCallsIsLeft) {
  generation_.Expect({{{0, 1}, false, absl::CancelledError("CANCELLED")}});
  other_generation_.Expect({{{2}, true, absl::OkStatus()}});
  EXPECT_OK(Generate(Resumable()));
  EXPECT_THAT(seen_, ElementsAre(0, 1, 2, -1));
}

TEST_F(FailoverTest, ABusySessionIsSaidAtOnceByARouterThatIsThere) {
  generation_.Expect({{{}, false, kHeld}});
  EXPECT_THAT(Generate(Resumable()), StatusIs(absl::StatusCode::kAborted));
}

TEST_F(FailoverTest, ATurnWithoutANameIsNotRepeated) {
  generation_.Expect({{{0}, false, kLost}});
  v1::GenerateRequest request = Resumable();
  request.clear_request_id();
  EXPECT_THAT(Generate(request), StatusIs(absl::StatusCode::kUnavailable));
  EXPECT_THAT(seen_, ElementsAre(0));
  other_generation_.Expect({{{0}, true, absl::OkStatus()}});
  EXPECT_OK(Generate(request)) << "but the next call goes to the other router";
}

TEST_F(FailoverTest, ATurnWithoutASessionIsTriedAtEachRouterUntilItsFirstToken) {
  v1::GenerateRequest request = Resumable();
  request.clear_session_id();
  generation_.Expect({{{}, false, kLost}});
  other_generation_.Expect({{{0}, true, absl::OkStatus()}, {{0}, false, kLost}});
  EXPECT_OK(Generate(request));
  EXPECT_THAT(seen_, ElementsAre(0, -1));
  EXPECT_THAT(Generate(request), StatusIs(absl::StatusCode::kUnavailable)) << "its first token was shown";
  generation_.Expect({{{}, false, kLost}});
  other_generation_.Expect({{{}, false, kLost}});
  EXPECT_THAT(Generate(request), StatusIs(absl::StatusCode::kUnavailable)) << "once each";
  EXPECT_EQ(generation_.requests().size(), 2);
  EXPECT_EQ(other_generation_.requests().size(), 3);
}

TEST_F(FailoverTest, CallsThatChangeNothingAreTriedAtEachRouter) {
  server_->Shutdown(std::chrono::system_clock::now());
  EXPECT_THAT(client_->GetStatus().status(), IsOk());
  other_server_->Shutdown(std::chrono::system_clock::now());
  EXPECT_THAT(client_->GetStatus().status(), StatusIs(absl::StatusCode::kUnavailable));
}

}  // namespace
}  // namespace rwkv::router
