// Whole transports whose rows go over NCCL.
#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/notification.h"
#include "gmock/gmock.h"
#include "grpcpp/security/server_credentials.h"
#include "grpcpp/server.h"
#include "grpcpp/server_builder.h"
#include "gtest/gtest.h"
#include "rwkv/v1/worker.pb.h"
#include "services/common/channel.h"
#include "services/worker/link/device_links.h"
#include "services/worker/link/grpc_link.h"
#include "services/worker/link/link.h"
#include "services/worker/link/nccl_side.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::HasSubstr;

using NcclTransportTest = NcclLinkTest;

// A worker's transport on a port, with its choice.
class Stage {
 public:
  Stage(LinkKind kind, const std::string& identity)
      : side(identity),
        transport(
            kShape, [](const std::string& address) { return common::MakeChannel(address); },
            LinkChoice{kind, side.links.get(), ""}) {
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(transport.service());
    server = builder.BuildAndStart();
    address = "127.0.0.1:" + std::to_string(port);
  }
  ~Stage() { server->Shutdown(std::chrono::system_clock::now()); }

  Side side;
  GrpcLinkTransport transport;
  std::unique_ptr<grpc::Server> server;
  std::string address;
};

TEST_F(NcclTransportTest, HeadersGoByGrpcAndRowsFromDeviceToDevice) {
  Stage before(LinkKind::kAuto, "a"), after(LinkKind::kDevice, "b");
  for (const std::string epoch : {"e1", "e2", "e3"}) {
    const auto receiver = after.transport.Accept(epoch);
    const auto sender = before.transport.Dial(after.address, epoch);
    std::thread send([&] {
      ASSERT_THAT(sender->Connect(), IsOk());
      ASSERT_NE(sender->device_rows(), nullptr);
      for (uint64_t step = 1; step <= 5; ++step) {
        LinkFrame frame;
        frame.header = {step, 3, {{1, absl::AbortedError("slot 1")}}};
        frame.rows = sender->device_rows();
        before.side.Fill(step);
        ASSERT_THAT(sender->Send(frame), IsOk());
        ASSERT_THAT(before.side.Move(*frame.rows, 3), IsOk());
        ASSERT_TRUE(before.side.DoneSoon());
      }
      EXPECT_THAT(sender->device_rows()->End(), IsOk());
    });
    ASSERT_THAT(receiver->Join(), IsOk());
    for (uint64_t step = 1; step <= 5; ++step) {
      LinkFrame frame;
      ASSERT_THAT(receiver->Receive(frame), IsOk());
      EXPECT_EQ(frame.header.step_id, step);
      EXPECT_EQ(frame.header.rows, 3);
      ASSERT_EQ(frame.header.refused.size(), 1u);
      ASSERT_NE(frame.rows, nullptr);
      ASSERT_THAT(after.side.Move(*frame.rows, frame.header.rows), IsOk());
      ASSERT_TRUE(after.side.DoneSoon());
      EXPECT_EQ(after.side.x.data()[8], static_cast<float>(step * 100 + 8) + 0.1f);
    }
    send.join();
    EXPECT_THAT(receiver->device_rows()->End(), IsOk());
  }
}

TEST_F(NcclTransportTest, GrpcCarriesTheRowsWhereOneSideWantsIt) {
  Stage before(LinkKind::kAuto, "a"), after(LinkKind::kGrpc, "b");
  const auto receiver = after.transport.Accept("e");
  const auto sender = before.transport.Dial(after.address, "e");
  ASSERT_THAT(sender->Connect(), IsOk());
  ASSERT_THAT(receiver->Join(), IsOk());
  EXPECT_EQ(sender->device_rows(), nullptr);
  EXPECT_EQ(receiver->device_rows(), nullptr);
  std::vector<float> x(3, 5.0f), v_first(2, 6.0f), received(24), received_first(16);
  LinkFrame frame;
  frame.header = {1, 1, {}};
  frame.x = x.data();
  frame.v_first = v_first.data();
  ASSERT_THAT(sender->Send(frame), IsOk());
  LinkFrame arrived;
  arrived.x = received.data();
  arrived.v_first = received_first.data();
  ASSERT_THAT(receiver->Receive(arrived), IsOk());
  EXPECT_EQ(received[2], 5.0f);
  EXPECT_EQ(received_first[1], 6.0f);
}

TEST_F(NcclTransportTest, StagesThatDoNotFitAreRefusedWithTheReason) {
  Stage before(LinkKind::kDevice, "one GPU"), after(LinkKind::kAuto, "one GPU");
  const auto receiver = after.transport.Accept("e");
  const auto sender = before.transport.Dial(after.address, "e");
  EXPECT_THAT(sender->Connect(), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("compute on one GPU")));
}

TEST_F(NcclTransportTest, AbortWakesAJoinThatWaits) {
  Stage after(LinkKind::kAuto, "b");
  const auto receiver = after.transport.Accept("e");
  std::thread join([&] { EXPECT_THAT(receiver->Join(), StatusIs(absl::StatusCode::kUnavailable)); });
  receiver->Abort();
  join.join();
}

}  // namespace
}  // namespace rwkv::worker
