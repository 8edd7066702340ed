#include "services/common/rpc_server.h"

#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <memory>
#include <string>
#include <thread>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "grpcpp/client_context.h"
#include "grpcpp/server_context.h"
#include "grpcpp/support/server_callback.h"
#include "gtest/gtest.h"
#include "prometheus/gauge.h"
#include "rwkv/v1/cluster.grpc.pb.h"
#include "services/common/address.h"
#include "services/common/channel.h"
#include "services/common/grpc_status.h"
#include "services/common/health.h"
#include "services/common/main_loop.h"
#include "services/common/metrics.h"
#include "tests/testing/files.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_limit.h"

namespace rwkv::common {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::IsOkAndHolds;
using ::rwkv::testing::StatusIs;
using ::testing::HasSubstr;

constexpr char kService[] = "rwkv.v1.Cluster";

constexpr absl::Duration kPatience = absl::Seconds(30);

absl::Time Limit() { return absl::Now() + kPatience; }

// GetStatus waits inside the handler until the test lets it go or the call is cancelled.
class SlowService : public v1::Cluster::Service {
 public:
  grpc::Status GetStatus(grpc::ServerContext* context, const v1::GetStatusRequest* /*request*/,
                         v1::GetStatusResponse* response) override {
    response->set_pipeline_state("serving");
    if (!slow) return grpc::Status::OK;
    entered.Notify();
    while (!go_on.WaitForNotificationWithTimeout(absl::Milliseconds(5))) {
      if (context->IsCancelled()) {
        cancelled.Notify();
        return grpc::Status::CANCELLED;
      }
    }
    return grpc::Status::OK;
  }

  bool slow = false;  // Set before the server starts.
  absl::Notification entered;
  absl::Notification go_on;
  absl::Notification cancelled;
};

class CallbackService : public v1::Cluster::CallbackService {
 public:
  grpc::ServerUnaryReactor* GetStatus(grpc::CallbackServerContext* context, const v1::GetStatusRequest* /*request*/,
                                      v1::GetStatusResponse* /*response*/) override {
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    reactor->Finish(ToGrpcStatus(InvalidFieldError("nothing", "is wrong")));
    return reactor;
  }
};

absl::Status CallGetStatus(const std::string& address, std::string* pipeline_state = nullptr) {
  const auto stub = v1::Cluster::NewStub(MakeChannel(address));
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(Limit()));
  v1::GetStatusResponse response;
  const absl::Status status = FromGrpcStatus(stub->GetStatus(&context, {}, &response));
  if (pipeline_state != nullptr) *pipeline_state = response.pipeline_state();
  return status;
}

TEST(RpcServerTest, ServesBothKindsOfHandlers) {
  SlowService sync_service;
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<RpcServer> sync_server, RpcServer::Start({}, {&sync_service}));
  std::string state;
  EXPECT_THAT(CallGetStatus(sync_server->address(), &state), IsOk());
  EXPECT_EQ(state, "serving");

  CallbackService callback_service;
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<RpcServer> callback_server, RpcServer::Start({}, {&callback_service}));
  const absl::Status status = CallGetStatus(callback_server->address());
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kInvalidArgument, "nothing: is wrong"));
  EXPECT_EQ(GetInvalidField(status), "nothing");
}

TEST(RpcServerTest, HealthFollowsSetServing) {
  SlowService service;
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<RpcServer> server, RpcServer::Start({}, {&service}));
  const auto channel = MakeChannel(server->address());
  EXPECT_THAT(CheckHealth(channel, Limit()), IsOkAndHolds(false));
  EXPECT_THAT(CheckHealth(channel, Limit(), kService), IsOkAndHolds(false));
  server->SetServing(true);
  EXPECT_THAT(CheckHealth(channel, Limit()), IsOkAndHolds(true));
  EXPECT_THAT(CheckHealth(channel, Limit(), kService), IsOkAndHolds(true));
  EXPECT_THAT(CheckHealth(channel, Limit(), "no.such.Service"), StatusIs(absl::StatusCode::kNotFound));
  server->SetServing(false);
  EXPECT_THAT(CheckHealth(channel, Limit()), IsOkAndHolds(false));
}

TEST(RpcServerTest, WhoDoesNotServeIsAliveUntilItSaysOtherwise) {
  SlowService service;
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<RpcServer> server, RpcServer::Start({}, {&service}));
  const auto channel = MakeChannel(server->address());
  EXPECT_THAT(CheckHealth(channel, Limit(), RpcServer::kLive), IsOkAndHolds(true));
  server->SetServing(true);
  server->SetLive(false);
  EXPECT_THAT(CheckHealth(channel, Limit(), RpcServer::kLive), IsOkAndHolds(false));
  EXPECT_THAT(CheckHealth(channel, Limit()), IsOkAndHolds(true));
}

TEST(RpcServerTest, MetricsSayWhetherItTakesWork) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Metrics> metrics, Metrics::Create(""));
  prometheus::Gauge& ready = metrics->Gauge("rwkv_server_ready", "1: takes work, as the health of the process says.");
  prometheus::Gauge& draining = metrics->Gauge("rwkv_server_draining", "1: has been told to end.");
  SlowService service;
  RpcServer::Options options;
  options.metrics = metrics.get();
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<RpcServer> server, RpcServer::Start(options, {&service}));
  EXPECT_EQ(ready.Value(), 0);
  server->SetServing(true);
  EXPECT_EQ(ready.Value(), 1);
  EXPECT_EQ(draining.Value(), 0);
  server->Shutdown(absl::Now());
  EXPECT_EQ(ready.Value(), 0);
  EXPECT_EQ(draining.Value(), 1);
}

TEST(RpcServerTest, HealthOfNobodyEndsAtTheDeadline) {
  std::string address;
  {
    SlowService service;
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<RpcServer> server, RpcServer::Start({}, {&service}));
    address = server->address();
  }
  EXPECT_THAT(CheckHealth(MakeChannel(address), absl::Now() + absl::Milliseconds(50)),
              StatusIs(absl::StatusCode::kDeadlineExceeded));
}

TEST(RpcServerTest, PortFileTellsAddressesAndPid) {
  const std::string path = ::testing::TempDir() + "/port_file";
  std::ofstream(path) << "grpc=stale\n";
  SlowService service;
  RpcServer::Options options;
  options.port_file = path;
  options.metrics_address = "127.0.0.1:9";
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<RpcServer> server, RpcServer::Start(options, {&service}));
  EXPECT_EQ(testing::ReadFile(path),
            absl::StrCat("grpc=", server->address(), "\nmetrics=127.0.0.1:9\npid=", getpid(), "\n"));
}

TEST(RpcServerTest, PortFileThatCannotBeWrittenIsAnErrorThatNamesIt) {
  SlowService service;
  RpcServer::Options options;
  options.port_file = ::testing::TempDir() + "/no/such/folder/port_file";
  EXPECT_THAT(RpcServer::Start(options, {&service}),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr(options.port_file)));
}

TEST(RpcServerTest, PortInUseIsUnavailableAndNamed) {
  SlowService service;
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<RpcServer> first, RpcServer::Start({}, {&service}));
  SlowService other;
  RpcServer::Options options;
  options.listen_address = first->address();
  options.port_file = ::testing::TempDir() + "/old_port_file";
  std::ofstream(options.port_file) << "grpc=stale\n";
  EXPECT_THAT(RpcServer::Start(options, {&other}),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr(first->address())));
  EXPECT_FALSE(std::ifstream(options.port_file)) << "it would be taken for this server's";
  EXPECT_THAT(CallGetStatus(first->address()), IsOk());
}

TEST(RpcServerTest, AddressThatIsNoneIsRefused) {
  SlowService service;
  RpcServer::Options options;
  options.listen_address = "localhost";
  EXPECT_THAT(RpcServer::Start(options, {&service}), StatusIs(absl::StatusCode::kInvalidArgument));
}

TEST(RpcServerTest, PortCanBeTakenAgainAtOnce) {
  RpcServer::Options options;
  for (int round = 0; round < 3; ++round) {
    SlowService service;
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<RpcServer> server, RpcServer::Start(options, {&service}));
    options.listen_address = server->address();
    EXPECT_THAT(CallGetStatus(server->address()), IsOk());
  }
}

TEST(RpcServerTest, OversizeMessageIsRefusedAndTheServerGoesOn) {
  SlowService service;
  RpcServer::Options options;
  options.max_receive_bytes = 1000;
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<RpcServer> server, RpcServer::Start(options, {&service}));
  const auto stub = v1::Cluster::NewStub(MakeChannel(server->address()));
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(Limit()));
  v1::GetStatusRequest request;
  // An unknown length-delimited field (number 1,000) of 2,000 bytes.
  std::string bytes = "\xc2\x3e\xd0\x0f" + std::string(2000, 'x');
  ASSERT_TRUE(request.ParseFromString(bytes));
  v1::GetStatusResponse response;
  EXPECT_THAT(FromGrpcStatus(stub->GetStatus(&context, request, &response)),
              StatusIs(absl::StatusCode::kResourceExhausted));
  EXPECT_THAT(CallGetStatus(server->address()), IsOk());
}

TEST(RpcServerTest, SignalDrainsInOrderAndRunningCallEnds) {
  SlowService service;
  service.slow = true;
  RpcServer::Options options;
  options.drain_timeout = absl::Seconds(30);
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<RpcServer> server, RpcServer::Start(options, {&service}));
  server->SetServing(true);
  const auto health_channel = MakeChannel(server->address());
  EXPECT_THAT(CheckHealth(health_channel, Limit()), IsOkAndHolds(true));
  absl::Status call_status = absl::UnknownError("not called");
  std::thread caller([&] { call_status = CallGetStatus(server->address()); });
  ASSERT_TRUE(service.entered.WaitForNotificationWithTimeout(kPatience)) << "the call has not come";

  kill(getpid(), SIGTERM);  // Blocked in every thread; ServeUntilSignal takes it.
  bool drained = false;
  EXPECT_THAT(server->ServeUntilSignal([&](absl::Time deadline) {
    EXPECT_GT(deadline, absl::Now());
    EXPECT_THAT(CheckHealth(health_channel, Limit()), IsOkAndHolds(false)) << "still answers, but not serving";
    service.go_on.Notify();
    drained = true;
  }),
              IsOk());
  caller.join();
  EXPECT_TRUE(drained);
  EXPECT_THAT(call_status, IsOk());
}

TEST(RpcServerTest, ServingCannotComeBackDuringTheDrain) {
  SlowService service;
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<RpcServer> server, RpcServer::Start({}, {&service}));
  server->SetServing(true);
  const auto channel = MakeChannel(server->address());
  EXPECT_THAT(CheckHealth(channel, Limit()), IsOkAndHolds(true));
  kill(getpid(), SIGTERM);
  EXPECT_THAT(server->ServeUntilSignal([&](absl::Time) {
    server->SetServing(true);
    EXPECT_THAT(CheckHealth(channel, Limit()), IsOkAndHolds(false));
  }),
              IsOk());
}

TEST(RpcServerTest, CallThatOutlivesTheDeadlineIsCancelled) {
  SlowService service;
  service.slow = true;
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<RpcServer> server, RpcServer::Start({}, {&service}));
  absl::Status call_status;
  std::thread caller([&] { call_status = CallGetStatus(server->address()); });
  ASSERT_TRUE(service.entered.WaitForNotificationWithTimeout(kPatience)) << "the call has not come";
  server->Shutdown(absl::Now() + absl::Milliseconds(20));
  caller.join();
  EXPECT_TRUE(service.cancelled.HasBeenNotified());
  EXPECT_FALSE(call_status.ok());
}

TEST(RpcServerTest, ShutdownFromTwoThreadsAndAgainIsFine) {
  SlowService service;
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<RpcServer> server, RpcServer::Start({}, {&service}));
  std::thread other([&] { server->Shutdown(Limit()); });
  server->Shutdown(Limit());
  other.join();
  server->Shutdown(absl::Now());
  EXPECT_FALSE(CallGetStatus(server->address()).ok());
}

}  // namespace
}  // namespace rwkv::common

// Not gtest's main: the signals must be blocked before gRPC starts its threads.
int main(int argc, char** argv) {
  rwkv::common::PrepareSignals();
  ::testing::InitGoogleTest(&argc, argv);
  rwkv::testing::LimitTests(rwkv::testing::TestSeconds());
  return RUN_ALL_TESTS();
}
