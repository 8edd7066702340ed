// Every link transport, by the same rules.
#include "services/worker/link/link.h"

#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/notification.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "grpcpp/security/server_credentials.h"
#include "grpcpp/server.h"
#include "grpcpp/server_builder.h"
#include "gtest/gtest.h"
#include "rwkv/v1/worker.pb.h"
#include "services/common/channel.h"
#include "services/worker/link/grpc_link.h"
#include "services/worker/link/inproc_link.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::HasSubstr;

constexpr LinkShape kShape = {3, 2, 8};

// A stage before and a stage after, and how the first names the second.
class Pair {
 public:
  virtual ~Pair() = default;
  virtual LinkTransport& upstream() = 0;
  virtual LinkTransport& downstream() = 0;
  virtual std::string address() = 0;
};

class InprocPair final : public Pair {
 public:
  LinkTransport& upstream() override { return *upstream_; }
  LinkTransport& downstream() override { return *downstream_; }
  std::string address() override { return "b"; }

 private:
  InprocLinkNetwork network_;
  const std::unique_ptr<LinkTransport> upstream_ = network_.Join("a", kShape);
  const std::unique_ptr<LinkTransport> downstream_ = network_.Join("b", kShape);
};

class GrpcPair final : public Pair {
 public:
  GrpcPair()
      : upstream_(kShape, [](const std::string& address) { return common::MakeChannel(address); }),
        downstream_(kShape, [](const std::string& address) { return common::MakeChannel(address); }) {
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(downstream_.service());
    server_ = builder.BuildAndStart();
    address_ = "127.0.0.1:" + std::to_string(port);
  }
  ~GrpcPair() override { server_->Shutdown(std::chrono::system_clock::now()); }
  LinkTransport& upstream() override { return upstream_; }
  LinkTransport& downstream() override { return downstream_; }
  std::string address() override { return address_; }

 private:
  GrpcLinkTransport upstream_;
  GrpcLinkTransport downstream_;
  std::unique_ptr<grpc::Server> server_;
  std::string address_;
};

LinkFrame MakeFrame(uint64_t step, int64_t rows) {
  LinkFrame frame;
  frame.step_id = step;
  frame.rows = rows;
  for (int64_t i = 0; i < rows * kShape.width; ++i) frame.x.push_back(static_cast<float>(step * 100 + i) + 0.1f);
  for (int64_t i = 0; i < rows * kShape.v_first_width; ++i) frame.v_first.push_back(-static_cast<float>(i) / 3);
  return frame;
}

struct Kind {
  const char* name;
  std::unique_ptr<Pair> (*make)();
};

class LinkTest : public ::testing::TestWithParam<Kind> {
 protected:
  const std::unique_ptr<Pair> pair_ = GetParam().make();
};

TEST_P(LinkTest, FramesArriveInOrderAndWhole) {
  const auto receiver = pair_->downstream().Accept("e");
  const auto sender = pair_->upstream().Dial(pair_->address(), "e");
  ASSERT_THAT(sender->Connect(), IsOk());
  std::thread send([&sender] {
    for (uint64_t step = 1; step <= 50; ++step) {
      LinkFrame frame = MakeFrame(step, step % 9);
      if (step == 7) frame.refused = {{1, absl::AbortedError("slot 1")}, {4, absl::InvalidArgumentError("slot 4")}};
      EXPECT_THAT(sender->Send(std::move(frame)), IsOk());
    }
  });
  for (uint64_t step = 1; step <= 50; ++step) {
    const absl::StatusOr<LinkFrame> frame = receiver->Receive();
    ASSERT_THAT(frame, IsOk());
    const LinkFrame expected = MakeFrame(step, step % 9);
    EXPECT_EQ(frame->step_id, step);
    EXPECT_EQ(frame->rows, expected.rows);
    EXPECT_EQ(frame->x, expected.x);
    EXPECT_EQ(frame->v_first, expected.v_first);
    ASSERT_EQ(frame->refused.size(), step == 7 ? 2u : 0u);
    if (step == 7) {
      EXPECT_EQ(frame->refused[1].entry, 4);
      EXPECT_EQ(frame->refused[1].status, absl::InvalidArgumentError("slot 4"));
    }
  }
  send.join();
}

TEST_P(LinkTest, ConnectWaitsForTheEpochToBeAccepted) {
  const auto sender = pair_->upstream().Dial(pair_->address(), "later");
  absl::Notification connected;
  std::thread connect([&] {
    EXPECT_THAT(sender->Connect(), IsOk());
    connected.Notify();
  });
  const auto other = pair_->downstream().Accept("other");
  const auto receiver = pair_->downstream().Accept("later");
  EXPECT_TRUE(connected.WaitForNotificationWithTimeout(absl::Seconds(30)));
  connect.join();
  ASSERT_THAT(sender->Send(MakeFrame(1, 2)), IsOk());
  EXPECT_THAT(receiver->Receive(), IsOk());
}

TEST_P(LinkTest, AbortWakesAWaitingConnect) {
  const auto sender = pair_->upstream().Dial(pair_->address(), "never");
  std::thread connect([&] { EXPECT_THAT(sender->Connect(), StatusIs(absl::StatusCode::kUnavailable)); });
  sender->Abort();
  connect.join();
  EXPECT_THAT(sender->Send(MakeFrame(1, 1)), StatusIs(absl::StatusCode::kUnavailable));
}

TEST_P(LinkTest, OurAbortWakesReceive) {
  const auto receiver = pair_->downstream().Accept("e");
  const auto sender = pair_->upstream().Dial(pair_->address(), "e");
  ASSERT_THAT(sender->Connect(), IsOk());
  std::thread receive([&] { EXPECT_THAT(receiver->Receive().status(), StatusIs(absl::StatusCode::kUnavailable)); });
  receiver->Abort();
  receive.join();
}

TEST_P(LinkTest, ThePeersAbortWakesReceiveAndIsTold) {
  const auto receiver = pair_->downstream().Accept("e");
  const auto sender = pair_->upstream().Dial(pair_->address(), "e");
  ASSERT_THAT(sender->Connect(), IsOk());
  absl::Notification told;
  receiver->NotifyBroken([&told](const absl::Status& why) {
    EXPECT_THAT(why, StatusIs(absl::StatusCode::kUnavailable));
    told.Notify();
  });
  std::thread receive([&] { EXPECT_THAT(receiver->Receive().status(), StatusIs(absl::StatusCode::kUnavailable)); });
  sender->Abort();
  receive.join();
  EXPECT_TRUE(told.WaitForNotificationWithTimeout(absl::Seconds(30)));
  EXPECT_THAT(receiver->Receive().status(), StatusIs(absl::StatusCode::kUnavailable)) << "for good";
}

TEST_P(LinkTest, ABreakThatHasHappenedIsToldAtOnce) {
  const auto receiver = pair_->downstream().Accept("e");
  auto sender = pair_->upstream().Dial(pair_->address(), "e");
  ASSERT_THAT(sender->Connect(), IsOk());
  sender.reset();
  EXPECT_THAT(receiver->Receive().status(), StatusIs(absl::StatusCode::kUnavailable));
  bool told = false;
  receiver->NotifyBroken([&told](const absl::Status&) { told = true; });
  EXPECT_TRUE(told);
}

// The bound: a receiver that takes nothing makes Send wait, and its end makes Send fail.
TEST_P(LinkTest, SendWaitsForASlowReceiverAndEndsWithIt) {
  auto receiver = pair_->downstream().Accept("e");
  const auto sender = pair_->upstream().Dial(pair_->address(), "e");
  ASSERT_THAT(sender->Connect(), IsOk());
  std::thread send([&] {
    absl::Status status;
    for (uint64_t step = 1; status.ok(); ++step) status = sender->Send(MakeFrame(step, 8));
    EXPECT_THAT(status, StatusIs(absl::StatusCode::kUnavailable));
  });
  ASSERT_THAT(receiver->Receive(), IsOk());
  receiver.reset();
  send.join();
}

TEST_P(LinkTest, AnotherEpochGoesOverTheSamePair) {
  for (const std::string epoch : {"e1", "e2", "e3"}) {
    const auto receiver = pair_->downstream().Accept(epoch);
    const auto sender = pair_->upstream().Dial(pair_->address(), epoch);
    ASSERT_THAT(sender->Connect(), IsOk());
    ASSERT_THAT(sender->Send(MakeFrame(1, 3)), IsOk());
    EXPECT_THAT(receiver->Receive(), IsOk());
  }
}

INSTANTIATE_TEST_SUITE_P(
    Transports, LinkTest,
    ::testing::Values(Kind{"inproc", +[]() -> std::unique_ptr<Pair> { return std::make_unique<InprocPair>(); }},
                      Kind{"grpc", +[]() -> std::unique_ptr<Pair> { return std::make_unique<GrpcPair>(); }}),
    [](const ::testing::TestParamInfo<Kind>& info) { return std::string(info.param.name); });

TEST(CheckFrameTest, NamesWhatIsWrong) {
  EXPECT_THAT(CheckFrame(MakeFrame(3, 8), kShape, 3), IsOk());
  struct Row {
    const char* name;
    std::function<void(LinkFrame&)> spoil;
    const char* says;
  };
  for (const Row& row :
       std::vector<Row>{{"order", [](LinkFrame& f) { f.step_id = 4; }, "step 4 where 3 is due"},
                        {"rows", [](LinkFrame& f) { f.rows = 9; }, "9 rows, room for 8"},
                        {"negative", [](LinkFrame& f) { f.rows = -1; }, "-1 rows"},
                        {"x", [](LinkFrame& f) { f.x.pop_back(); }, "x has 5 numbers"},
                        {"v_first", [](LinkFrame& f) { f.v_first.push_back(1); }, "v_first has 5 numbers"},
                        {"refused twice",
                         [](LinkFrame& f) {
                           f.refused = {{2, absl::AbortedError("")}, {2, absl::AbortedError("")}};
                         },
                         "refused entry 2 after 2"},
                        {"refused with OK",
                         [](LinkFrame& f) {
                           f.refused = {{0, absl::OkStatus()}};
                         },
                         "refused entry 0"}}) {
    SCOPED_TRACE(row.name);
    LinkFrame frame = MakeFrame(3, 2);
    row.spoil(frame);
    EXPECT_THAT(CheckFrame(frame, kShape, 3), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(row.says)));
  }
}

TEST(GrpcLinkTest, TheLargestFrameFitsTheMessageLimit) {
  LinkFrame frame = MakeFrame(1, kShape.max_rows);
  const std::string long_message(2000, 'x');
  for (int i = 0; i < kShape.max_rows; ++i) frame.refused.push_back({i, absl::AbortedError(long_message)});
  EXPECT_LE(static_cast<int64_t>(FrameToProto("an epoch", kShape, frame).ByteSizeLong()), MaxTransferBytes(kShape));
}

TEST(GrpcLinkTest, ASecondLinkOfAnEpochIsRefused) {
  GrpcPair pair;
  const auto receiver = pair.downstream().Accept("e");
  const auto first = pair.upstream().Dial(pair.address(), "e");
  const auto second = pair.upstream().Dial(pair.address(), "e");
  ASSERT_THAT(first->Connect(), IsOk());
  EXPECT_THAT(second->Connect(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("has its link already")));
  ASSERT_THAT(first->Send(MakeFrame(1, 1)), IsOk());
  EXPECT_THAT(receiver->Receive(), IsOk());
}

TEST(GrpcLinkTest, AStageOfAnotherWidthIsRefused) {
  GrpcPair pair;
  const auto receiver = pair.downstream().Accept("e");
  GrpcLinkTransport other({4, 2, 8}, [](const std::string& address) { return common::MakeChannel(address); });
  const auto sender = other.Dial(pair.address(), "e");
  EXPECT_THAT(sender->Connect(), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("width 4")));
}

}  // namespace
}  // namespace rwkv::worker
