// Links over NCCL: rows from device to device, and what becomes of a pair whose other end is late, silent or gone.
#include "services/worker/link/nccl_link.h"

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "grpcpp/security/server_credentials.h"
#include "grpcpp/server.h"
#include "grpcpp/server_builder.h"
#include "gtest/gtest.h"
#include "kernels/base/device.h"
#include "kernels/base/stream.h"
#include "kernels/cuda/testing/emulated_cuda.h"
#include "kernels/cuda/testing/fake_runtime.h"
#include "rwkv/v1/worker.pb.h"
#include "services/common/channel.h"
#include "services/worker/link/device_links.h"
#include "services/worker/link/grpc_link.h"
#include "services/worker/link/link.h"
#include "services/worker/link/nccl.h"
#include "services/worker/link/testing/fake_nccl.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr LinkShape kShape = {3, 2, 8};

// Of one end: memory and a stream on the emulated device, and its NCCL.
struct Side {
  explicit Side(const std::string& identity, const LinkShape& shape = kShape) : shape(shape) {
    NcclLimits limits;
    limits.init = limits.call = absl::Seconds(20);
    limits.abort = absl::Milliseconds(300);
    links = *MakeNcclLinks(
        nccl::kFakeNccl, identity, [this] { return device->MakeCurrent(); }, limits);
    x = *kernels::DeviceArray<float>::Create(*device, shape.max_rows * shape.width);
    v_first = *kernels::DeviceArray<float>::Create(*device, shape.max_rows * shape.v_first_width);
    done = *device->NewEvent();
  }

  void Fill(uint64_t step) {
    for (int64_t i = 0; i < x.size(); ++i) x.data()[i] = static_cast<float>(step * 100 + i) + 0.1f;
    for (int64_t i = 0; i < v_first.size(); ++i) v_first.data()[i] = -static_cast<float>(step + i) / 3;
  }
  absl::Status Move(DeviceRows& rows, int64_t count) {
    absl::Status status = rows.Move(count, x.data(), v_first.data(), *stream);
    return status.ok() ? stream->Record(*done) : status;
  }
  bool DoneSoon(const std::function<bool()>& or_else = [] { return false; }) {
    const absl::Time limit = absl::Now() + absl::Seconds(20);
    while (!done->Done()) {
      if (or_else() || absl::Now() > limit) return false;
      std::this_thread::yield();
    }
    return true;
  }

  const LinkShape shape;
  std::unique_ptr<kernels::Device> device = *kernels::cuda::OpenEmulatedDevice();
  std::unique_ptr<kernels::Stream> stream = *device->NewStream();
  std::unique_ptr<kernels::Event> done;
  kernels::DeviceArray<float> x, v_first;
  std::unique_ptr<DeviceLinks> links;
  absl::Notification stop;
};

class NcclLinkTest : public ::testing::Test {
 protected:
  NcclLinkTest() {
    kernels::cuda::ResetFake();
    nccl::ResetFake();
  }
  ~NcclLinkTest() override {
    EXPECT_EQ(nccl::CommunicatorsOfFake(), 0) << "a communicator is left";
    EXPECT_THAT(nccl::ViolationsOfFake(), IsEmpty());
    EXPECT_THAT(kernels::cuda::ViolationsOfFake(), IsEmpty());
    nccl::ResetFake();
  }
};

// Runs both ends of a pair, each on its thread, from the join on.
void RunPair(Side& sender, Side& receiver, const std::function<void(DeviceRows&)>& send,
             const std::function<void(DeviceRows&)>& receive) {
  absl::StatusOr<std::string> id = sender.links->NewPairId();
  ASSERT_THAT(id, IsOk());
  const auto run = [&id](Side& side, bool sends, const std::function<void(DeviceRows&)>& body) {
    absl::StatusOr<std::unique_ptr<DeviceRows>> rows = side.links->Join(*id, sends, side.shape, side.stop);
    ASSERT_THAT(rows, IsOk());
    body(**rows);
    EXPECT_THAT((*rows)->End(), IsOk());
    EXPECT_TRUE(side.DoneSoon()) << "the stream does not go on";
  };
  std::thread other([&] { run(receiver, false, receive); });
  run(sender, true, send);
  other.join();
}

TEST_F(NcclLinkTest, RowsArriveInOrderAndWhole) {
  for (const bool eager : {false, true}) {
    kernels::cuda::SetEager(eager);
    Side sender("a"), receiver("b");
    absl::Notification checked;  // Until then the sender stays: an end that left is an error of the pair.
    RunPair(
        sender, receiver,
        [&](DeviceRows& rows) {
          for (uint64_t step = 1; step <= 30; ++step) {
            sender.Fill(step);
            ASSERT_THAT(sender.Move(rows, 1 + step % 8), IsOk());
            ASSERT_TRUE(sender.DoneSoon());
          }
          checked.WaitForNotificationWithTimeout(absl::Seconds(60));
        },
        [&](DeviceRows& rows) {
          for (uint64_t step = 1; step <= 30; ++step) {
            receiver.Fill(1000);
            ASSERT_THAT(receiver.Move(rows, 1 + step % 8), IsOk());
            ASSERT_TRUE(receiver.DoneSoon());
            const int64_t x = (1 + step % 8) * kShape.width;
            EXPECT_EQ(receiver.x.data()[0], static_cast<float>(step * 100) + 0.1f);
            EXPECT_EQ(receiver.x.data()[x - 1], static_cast<float>(step * 100 + x - 1) + 0.1f);
            if (x < receiver.x.size()) EXPECT_EQ(receiver.x.data()[x], static_cast<float>(100'000 + x) + 0.1f);
            EXPECT_EQ(receiver.v_first.data()[1], -static_cast<float>(step + 1) / 3);
            EXPECT_THAT(rows.Check(), IsOk());
          }
          checked.Notify();
        });
  }
  kernels::cuda::SetEager(false);
  EXPECT_EQ(nccl::TransfersOfFake(), 2 * 2 * 30) << "x and v_first are one group";
}

// What the stream is given behind a transfer finds it done, without the host in between.
TEST_F(NcclLinkTest, StepsFollowEachOtherInTheStream) {
  Side sender("a"), receiver("b");
  kernels::DeviceArray<float> pinned =
      *kernels::DeviceArray<float>::Create(*receiver.device, 4 * kShape.width, kernels::MemoryKind::kPinned);
  constexpr int64_t kRowBytes = kShape.width * sizeof(float);
  RunPair(
      sender, receiver,
      [&](DeviceRows& rows) {
        sender.Fill(1);
        for (int i = 0; i < 4; ++i) {
          ASSERT_THAT(sender.Move(rows, 1), IsOk());
          ASSERT_THAT(sender.stream->Zero(sender.x.data(), (i + 1) * static_cast<int64_t>(sizeof(float))), IsOk());
        }
        ASSERT_TRUE(sender.DoneSoon());
      },
      [&](DeviceRows& rows) {
        for (int i = 0; i < 4; ++i) {
          ASSERT_THAT(receiver.Move(rows, 1), IsOk());
          ASSERT_THAT(receiver.stream->Copy(pinned.data() + i * kShape.width, receiver.x.data(), kRowBytes), IsOk());
        }
        ASSERT_THAT(receiver.stream->Record(*receiver.done), IsOk());
        ASSERT_TRUE(receiver.DoneSoon());
      });
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) {
      EXPECT_EQ(pinned.data()[i * kShape.width + j], j < i ? 0.0f : static_cast<float>(100 + j) + 0.1f) << i << j;
    }
  }
}

TEST_F(NcclLinkTest, AModelWithoutFirstValuesHasOneTransfer) {
  const LinkShape shape = {3, 0, 8};
  Side sender("a", shape), receiver("b", shape);
  sender.Fill(2);
  RunPair(
      sender, receiver,
      [&](DeviceRows& rows) {
        ASSERT_THAT(sender.Move(rows, 2), IsOk());
        ASSERT_TRUE(sender.DoneSoon());
      },
      [&](DeviceRows& rows) {
        ASSERT_THAT(receiver.Move(rows, 2), IsOk());
        ASSERT_TRUE(receiver.DoneSoon());
      });
  EXPECT_EQ(receiver.x.data()[5], sender.x.data()[5]);
}

TEST_F(NcclLinkTest, JoinEndsWhereNobodyComes) {
  Side side("a");
  NcclLimits limits;
  limits.init = absl::Milliseconds(50);
  const auto links = *MakeNcclLinks(
      nccl::kFakeNccl, "a", [] { return absl::OkStatus(); }, limits);
  EXPECT_THAT(links->Join(*links->NewPairId(), true, kShape, side.stop),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("did not come in 50ms")));
  EXPECT_THAT(links->Join("short", true, kShape, side.stop), StatusIs(absl::StatusCode::kInvalidArgument));
}

TEST_F(NcclLinkTest, JoinEndsWhereTheLibraryNeverGetsReady) {
  nccl::FakeFaults faults;
  faults.never_ready = true;
  nccl::ResetFake(faults);
  Side side("a");
  const std::string id = *side.links->NewPairId();
  std::thread stopper([&side] { side.stop.Notify(); });
  EXPECT_THAT(side.links->Join(id, true, kShape, side.stop),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("aborted")));
  stopper.join();
}

TEST_F(NcclLinkTest, AnEndThatSaysNothingIsLeftAndTheStreamGoesOn) {
  nccl::FakeFaults faults;
  faults.hang_at = 2;
  nccl::ResetFake(faults);
  Side sender("a"), receiver("b");
  std::atomic<bool> over = false;
  RunPair(
      sender, receiver,
      [&](DeviceRows& rows) {
        ASSERT_THAT(sender.Move(rows, 1), IsOk());
        ASSERT_TRUE(sender.DoneSoon());
        ASSERT_THAT(sender.Move(rows, 1), IsOk());
        sender.DoneSoon([&] { return over.load(); });
      },
      [&](DeviceRows& rows) {
        ASSERT_THAT(receiver.Move(rows, 1), IsOk());
        ASSERT_TRUE(receiver.DoneSoon());
        ASSERT_THAT(receiver.Move(rows, 1), IsOk());
        const absl::Time until = absl::Now() + absl::Milliseconds(50);
        EXPECT_FALSE(receiver.DoneSoon([&] { return absl::Now() > until; }));
        EXPECT_THAT(rows.Check(), IsOk()) << "nobody knows";
        over = true;
      });
}

TEST_F(NcclLinkTest, AnEndThatAbortsIsToldToTheOther) {
  Side sender("a"), receiver("b");
  RunPair(
      sender, receiver,
      [&](DeviceRows& rows) {
        ASSERT_THAT(sender.Move(rows, 1), IsOk());
        ASSERT_TRUE(sender.DoneSoon());
        EXPECT_THAT(rows.End(), IsOk());
        EXPECT_THAT(sender.Move(rows, 1), StatusIs(absl::StatusCode::kUnavailable)) << "and not NCCL's any more";
        EXPECT_THAT(rows.Check(), StatusIs(absl::StatusCode::kUnavailable));
      },
      [&](DeviceRows& rows) {
        ASSERT_THAT(receiver.Move(rows, 1), IsOk());
        ASSERT_TRUE(receiver.DoneSoon());
        EXPECT_FALSE(receiver.DoneSoon() && receiver.Move(rows, 1).ok() &&
                     receiver.DoneSoon([&] { return !rows.Check().ok(); }));
        EXPECT_THAT(rows.Check(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("remote process exited")));
      });
}

TEST_F(NcclLinkTest, AnErrorThatComesLaterIsTold) {
  nccl::FakeFaults faults;
  faults.fail_at = 0;
  nccl::ResetFake(faults);
  Side sender("a"), receiver("b");
  std::atomic<int> told = 0;
  const auto body = [&told](Side& side) {
    return [&side, &told](DeviceRows& rows) {
      // The other end may have heard of it, and gone, before this one's call.
      if (side.Move(rows, 1).ok()) EXPECT_FALSE(side.DoneSoon([&] { return !rows.Check().ok() || told > 0; }));
      if (!rows.Check().ok()) ++told;
    };
  };
  RunPair(sender, receiver, body(sender), body(receiver));
  EXPECT_GE(told, 1);
}

TEST_F(NcclLinkTest, AnAbortThatHangsIsToldSoThatTheProcessEnds) {
  Side sender("a"), receiver("b");
  absl::Notification over;
  RunPair(
      sender, receiver,
      [&](DeviceRows& rows) {
        nccl::FakeFaults faults;
        faults.abort_hangs = true;
        nccl::ResetFake(faults);
        EXPECT_THAT(rows.End(), StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("abort of a communicator")));
        nccl::ResetFake();
        over.Notify();
      },
      [&](DeviceRows&) { over.WaitForNotificationWithTimeout(absl::Seconds(20)); });
  const absl::Time limit = absl::Now() + absl::Seconds(20);
  while (nccl::CommunicatorsOfFake() > 0 && absl::Now() < limit) std::this_thread::yield();
}

// A pipeline of three: the first pair fails and is made anew while the second stays as it is.
TEST_F(NcclLinkTest, APairIsMadeAnewWhileAnotherGoesOn) {
  Side first("a"), second("b"), sender("c"), receiver("d");
  const auto once = [](Side& side) {
    return [&side](DeviceRows& rows) {
      ASSERT_THAT(side.Move(rows, 1), IsOk());
      ASSERT_TRUE(side.DoneSoon());
    };
  };
  RunPair(
      sender, receiver,
      [&](DeviceRows& rows) {
        once(sender)(rows);
        RunPair(first, second, once(first), once(second));
        RunPair(first, second, once(first), once(second));
        once(sender)(rows);
      },
      [&](DeviceRows& rows) {
        once(receiver)(rows);
        once(receiver)(rows);
      });
  EXPECT_EQ(nccl::TransfersOfFake(), 8);
}

TEST(AgreeTest, BothStagesDecide) {
  class Links final : public DeviceLinks {
   public:
    absl::string_view kind() const override { return "nccl"; }
    int version() const override { return 22809; }
    std::string device() const override { return "cuda/1"; }
    absl::StatusOr<std::string> NewPairId() override { return "id"; }
    absl::StatusOr<std::unique_ptr<DeviceRows>> Join(const std::string&, bool, const LinkShape&,
                                                     const absl::Notification&) override {
      return absl::UnimplementedError("");
    }
  } links;
  v1::LinkOffer offer;
  offer.set_kind("nccl");
  offer.set_version(22809);
  offer.set_device("cuda/0");
  const LinkChoice choice = {LinkKind::kAuto, &links, ""};
  EXPECT_TRUE(Agree(offer, choice)->by_device);
  EXPECT_TRUE(Agree(offer, {LinkKind::kDevice, &links, ""})->by_device);

  struct Row {
    const char* name;
    std::function<void(v1::LinkOffer&, LinkChoice&)> change;
    const char* says;
  };
  for (const Row& row : std::vector<Row>{
           {"told here", [](v1::LinkOffer&, LinkChoice&c) { c.kind = LinkKind::kGrpc; }, "this stage shall use gRPC"},
           {"none here",
            [](v1::LinkOffer&, LinkChoice&c) {
              c = {LinkKind::kAuto, nullptr, "no GPU"};
            },
            "no GPU"},
           {"none there",
            [](v1::LinkOffer&o, LinkChoice&) {
              o.clear_kind();
              o.set_why_none("no library");
            },
            "the stage before: no library"},
           {"versions", [](v1::LinkOffer&o, LinkChoice&) { o.set_version(22805); }, "has nccl 22805, this one nccl"},
           {"kinds", [](v1::LinkOffer&o, LinkChoice&) { o.set_kind("other"); }, "has other"},
           {"one GPU", [](v1::LinkOffer&o, LinkChoice&) { o.set_device("cuda/1"); },
            "both stages compute on cuda/1"}}) {
    SCOPED_TRACE(row.name);
    v1::LinkOffer changed_offer = offer;
    LinkChoice changed = choice;
    row.change(changed_offer, changed);
    absl::StatusOr<LinkAgreement> agreement = Agree(changed_offer, changed);
    ASSERT_THAT(agreement, IsOk());
    EXPECT_FALSE(agreement->by_device);
    EXPECT_THAT(agreement->why_not, HasSubstr(row.says));
    changed_offer.set_required(true);
    EXPECT_THAT(Agree(changed_offer, changed), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr(row.says)));
    if (changed.kind == LinkKind::kGrpc) continue;
    changed_offer.set_required(false);
    changed.kind = LinkKind::kDevice;
    EXPECT_THAT(Agree(changed_offer, changed), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr(row.says)));
  }
}

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

TEST_F(NcclLinkTest, HeadersGoByGrpcAndRowsFromDeviceToDevice) {
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

TEST_F(NcclLinkTest, GrpcCarriesTheRowsWhereOneSideWantsIt) {
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

TEST_F(NcclLinkTest, StagesThatDoNotFitAreRefusedWithTheReason) {
  Stage before(LinkKind::kDevice, "one GPU"), after(LinkKind::kAuto, "one GPU");
  const auto receiver = after.transport.Accept("e");
  const auto sender = before.transport.Dial(after.address, "e");
  EXPECT_THAT(sender->Connect(), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("compute on one GPU")));
}

TEST_F(NcclLinkTest, AbortWakesAJoinThatWaits) {
  Stage after(LinkKind::kAuto, "b");
  const auto receiver = after.transport.Accept("e");
  std::thread join([&] { EXPECT_THAT(receiver->Join(), StatusIs(absl::StatusCode::kUnavailable)); });
  receiver->Abort();
  join.join();
}

}  // namespace
}  // namespace rwkv::worker
