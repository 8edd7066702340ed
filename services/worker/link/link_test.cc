// Every link transport, by the same rules.
#include "services/worker/link/link.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "gmock/gmock.h"
#include "grpcpp/client_context.h"
#include "grpcpp/security/server_credentials.h"
#include "grpcpp/server.h"
#include "grpcpp/server_builder.h"
#include "gtest/gtest.h"
#include "rwkv/v1/worker.grpc.pb.h"
#include "rwkv/v1/worker.pb.h"
#include "services/common/channel.h"
#include "services/common/grpc_status.h"
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

// A frame with memory of its own, full of 7 where it has no rows.
class TestFrame {
 public:
  TestFrame() = default;
  TestFrame(uint64_t step, int64_t rows) {
    frame_.header.step_id = step;
    frame_.header.rows = rows;
    for (int64_t i = 0; i < rows * kShape.width; ++i) x_[i] = static_cast<float>(step * 100 + i) + 0.1f;
    for (int64_t i = 0; i < rows * kShape.v_first_width; ++i) v_first_[i] = -static_cast<float>(i) / 3;
  }

  LinkFrame& frame() {
    frame_.x = x_.data();
    frame_.v_first = v_first_.data();
    return frame_;
  }
  const std::vector<float>& x() const { return x_; }
  const std::vector<float>& v_first() const { return v_first_; }

 private:
  LinkFrame frame_;
  std::vector<float> x_ = std::vector<float>(kShape.max_rows * kShape.width, 7.0f);
  std::vector<float> v_first_ = std::vector<float>(kShape.max_rows * kShape.v_first_width, 7.0f);
};

absl::Status Send(LinkSender& sender, uint64_t step, int64_t rows) {
  return sender.Send(TestFrame(step, rows).frame());
}
absl::Status Receive(LinkReceiver& receiver) { return receiver.Receive(TestFrame().frame()); }

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
      TestFrame sent(step, step % 9);
      LinkFrame& frame = sent.frame();
      if (step == 7) {
        frame.header.refused = {{1, absl::AbortedError("slot 1")}, {4, absl::InvalidArgumentError("slot 4")}};
      }
      EXPECT_THAT(sender->Send(frame), IsOk());
      std::fill_n(frame.x, frame.header.rows * kShape.width, -1.0f);  // The sender's again.
    }
  });
  for (uint64_t step = 1; step <= 50; ++step) {
    TestFrame received;
    LinkFrame& frame = received.frame();
    ASSERT_THAT(receiver->Receive(frame), IsOk());
    const TestFrame expected(step, step % 9);
    EXPECT_EQ(frame.header.step_id, step);
    EXPECT_EQ(frame.header.rows, static_cast<int64_t>(step % 9));
    EXPECT_EQ(received.x(), expected.x()) << "its rows, and nothing behind them";
    EXPECT_EQ(received.v_first(), expected.v_first());
    ASSERT_EQ(frame.header.refused.size(), step == 7 ? 2u : 0u);
    if (step == 7) {
      EXPECT_EQ(frame.header.refused[1].entry, 4);
      EXPECT_EQ(frame.header.refused[1].status, absl::InvalidArgumentError("slot 4"));
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
  ASSERT_THAT(Send(*sender, 1, 2), IsOk());
  EXPECT_THAT(Receive(*receiver), IsOk());
}

TEST_P(LinkTest, AbortWakesAWaitingConnect) {
  const auto sender = pair_->upstream().Dial(pair_->address(), "never");
  std::thread connect([&] { EXPECT_THAT(sender->Connect(), StatusIs(absl::StatusCode::kUnavailable)); });
  sender->Abort();
  connect.join();
  EXPECT_THAT(Send(*sender, 1, 1), StatusIs(absl::StatusCode::kUnavailable));
}

TEST_P(LinkTest, OurAbortWakesReceive) {
  const auto receiver = pair_->downstream().Accept("e");
  const auto sender = pair_->upstream().Dial(pair_->address(), "e");
  ASSERT_THAT(sender->Connect(), IsOk());
  std::thread receive([&] { EXPECT_THAT(Receive(*receiver), StatusIs(absl::StatusCode::kUnavailable)); });
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
  std::thread receive([&] { EXPECT_THAT(Receive(*receiver), StatusIs(absl::StatusCode::kUnavailable)); });
  sender->Abort();
  receive.join();
  EXPECT_TRUE(told.WaitForNotificationWithTimeout(absl::Seconds(30)));
  EXPECT_THAT(Receive(*receiver), StatusIs(absl::StatusCode::kUnavailable)) << "for good";
}

TEST_P(LinkTest, ABreakThatHasHappenedIsToldAtOnce) {
  const auto receiver = pair_->downstream().Accept("e");
  auto sender = pair_->upstream().Dial(pair_->address(), "e");
  ASSERT_THAT(sender->Connect(), IsOk());
  sender.reset();
  EXPECT_THAT(Receive(*receiver), StatusIs(absl::StatusCode::kUnavailable));
  bool told = false;
  receiver->NotifyBroken([&told](const absl::Status&) { told = true; });
  EXPECT_TRUE(told);
}

TEST_P(LinkTest, OurOwnAbortIsNotToldUs) {
  const auto receiver = pair_->downstream().Accept("e");
  bool told = false;
  receiver->Abort();
  receiver->NotifyBroken([&told](const absl::Status&) { told = true; });
  EXPECT_FALSE(told);
}

TEST_P(LinkTest, AReceiverThatWasReplacedTakesNoOtherWithIt) {
  auto old = pair_->downstream().Accept("e");
  const auto receiver = pair_->downstream().Accept("e");
  old.reset();
  const auto sender = pair_->upstream().Dial(pair_->address(), "e");
  ASSERT_THAT(sender->Connect(), IsOk());
  ASSERT_THAT(Send(*sender, 1, 2), IsOk());
  EXPECT_THAT(Receive(*receiver), IsOk());
}

// The bound: a receiver that takes nothing makes Send wait, and its end makes Send fail.
TEST_P(LinkTest, SendWaitsForASlowReceiverAndEndsWithIt) {
  auto receiver = pair_->downstream().Accept("e");
  const auto sender = pair_->upstream().Dial(pair_->address(), "e");
  ASSERT_THAT(sender->Connect(), IsOk());
  std::thread send([&] {
    absl::Status status;
    for (uint64_t step = 1; status.ok(); ++step) status = Send(*sender, step, 8);
    EXPECT_THAT(status, StatusIs(absl::StatusCode::kUnavailable));
  });
  ASSERT_THAT(Receive(*receiver), IsOk());
  receiver.reset();
  send.join();
}

TEST_P(LinkTest, AnotherEpochGoesOverTheSamePair) {
  for (const std::string epoch : {"e1", "e2", "e3"}) {
    const auto receiver = pair_->downstream().Accept(epoch);
    const auto sender = pair_->upstream().Dial(pair_->address(), epoch);
    ASSERT_THAT(sender->Connect(), IsOk());
    ASSERT_THAT(Send(*sender, 1, 3), IsOk());
    EXPECT_THAT(Receive(*receiver), IsOk());
  }
}

INSTANTIATE_TEST_SUITE_P(
    Transports, LinkTest,
    ::testing::Values(Kind{"inproc", +[]() -> std::unique_ptr<Pair> { return std::make_unique<InprocPair>(); }},
                      Kind{"grpc", +[]() -> std::unique_ptr<Pair> { return std::make_unique<GrpcPair>(); }}),
    [](const ::testing::TestParamInfo<Kind>& info) { return std::string(info.param.name); });

TEST_P(LinkTest, ReadyTellsWhetherReceiveWouldWait) {
  const auto receiver = pair_->downstream().Accept("e");
  const auto sender = pair_->upstream().Dial(pair_->address(), "e");
  ASSERT_THAT(sender->Connect(), IsOk());
  EXPECT_FALSE(receiver->Ready());
  ASSERT_THAT(Send(*sender, 1, 1), IsOk());
  ASSERT_THAT(Send(*sender, 2, 1), IsOk());
  ASSERT_THAT(Receive(*receiver), IsOk());
  const absl::Time deadline = absl::Now() + absl::Seconds(30);
  while (!receiver->Ready() && absl::Now() < deadline) std::this_thread::yield();
  EXPECT_TRUE(receiver->Ready()) << "the second frame";
  ASSERT_THAT(Receive(*receiver), IsOk());
  EXPECT_FALSE(receiver->Ready());
  receiver->Abort();
  EXPECT_TRUE(receiver->Ready()) << "with an error";
}

TEST_P(LinkTest, FramesAreAnnouncedInOrderBeforeTheyCanBeTaken) {
  const auto receiver = pair_->downstream().Accept("e");
  absl::Mutex mu;
  std::vector<absl::optional<uint64_t>> coming;
  receiver->NotifyFrames([&](absl::optional<uint64_t> own_after) {
    absl::MutexLock lock(&mu);
    coming.push_back(own_after);
  });
  const auto sender = pair_->upstream().Dial(pair_->address(), "e");
  ASSERT_THAT(sender->Connect(), IsOk());
  for (uint64_t step = 1; step <= 3; ++step) {
    TestFrame sent(step, 1);
    if (step == 2) {
      sent.frame().header.own_step.add_entries()->set_slot(7);
      sent.frame().header.commands_before = 5;
    }
    ASSERT_THAT(sender->Send(sent.frame()), IsOk());
  }
  for (uint64_t step = 1; step <= 3; ++step) {
    TestFrame received;
    ASSERT_THAT(receiver->Receive(received.frame()), IsOk());
    absl::MutexLock lock(&mu);
    ASSERT_GE(coming.size(), step);
    EXPECT_EQ(coming[step - 1], step == 2 ? absl::make_optional<uint64_t>(5) : absl::nullopt);
    const LinkHeader& header = received.frame().header;
    EXPECT_EQ(header.is_own(), step == 2);
    if (header.is_own()) {
      EXPECT_EQ(header.own_step.entries(0).slot(), 7);
      EXPECT_EQ(header.commands_before, 5u);
    }
  }
}

TEST_P(LinkTest, WhatIsReturnedComesBackInOrderUntilTheEnd) {
  auto receiver = pair_->downstream().Accept("e");
  auto sender = pair_->upstream().Dial(pair_->address(), "e");
  absl::Mutex mu;
  std::vector<uint64_t> drawn;
  sender->NotifyDrawn([&](v1::StepResult result) {
    absl::MutexLock lock(&mu);
    drawn.push_back(result.entries(0).token_id());
  });
  ASSERT_THAT(sender->Connect(), IsOk());
  ASSERT_THAT(Send(*sender, 1, 1), IsOk());
  ASSERT_THAT(Receive(*receiver), IsOk());
  v1::StepResult result;
  result.add_entries();
  std::vector<uint64_t> returned;
  for (uint32_t token = 0; token < 100; ++token) {
    result.mutable_entries(0)->set_token_id(token);
    ASSERT_THAT(receiver->Return(result), IsOk());
    returned.push_back(token);
  }
  {
    absl::MutexLock lock(&mu);
    const auto all = [&] { return drawn.size() >= returned.size(); };
    EXPECT_TRUE(mu.AwaitWithTimeout(absl::Condition(&all), absl::Seconds(30)));
    EXPECT_EQ(drawn, returned);
  }
  sender.reset();  // And its thread with it.
  EXPECT_THAT(Receive(*receiver), StatusIs(absl::StatusCode::kUnavailable));
  absl::Status status;
  const absl::Time deadline = absl::Now() + absl::Seconds(30);
  while (status.ok() && absl::Now() < deadline) status = receiver->Return(result);
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kUnavailable));
}

TEST_P(LinkTest, AFrameOutOfOrderIsAnError) {
  const auto receiver = pair_->downstream().Accept("e");
  const auto sender = pair_->upstream().Dial(pair_->address(), "e");
  ASSERT_THAT(sender->Connect(), IsOk());
  ASSERT_THAT(Send(*sender, 2, 1), IsOk());
  EXPECT_THAT(Receive(*receiver), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("step 2 where 1 is due")));
}

LinkHeader OwnOf(int entries) {
  LinkHeader header{3, 2, {}};
  for (int i = 0; i < entries; ++i) header.own_step.add_entries();
  return header;
}

TEST(CheckHeaderTest, NamesWhatIsWrong) {
  EXPECT_THAT(CheckHeader({3, 8, {}}, kShape, 3), IsOk());
  struct Row {
    const char* name;
    LinkHeader header;
    const char* says;
  };
  for (const Row& row : std::vector<Row>{
           {"order", {4, 2, {}}, "step 4 where 3 is due"},
           {"rows", {3, 9, {}}, "9 rows, room for 8"},
           {"negative", {3, -1, {}}, "-1 rows"},
           {"twice", {3, 2, {{2, absl::AbortedError("")}, {2, absl::AbortedError("")}}}, "entry 2 after 2"},
           {"own", OwnOf(9), "9 entries of the first stage's own"},
           {"with OK", {3, 2, {{0, absl::OkStatus()}}}, "refused entry 0"}}) {
    SCOPED_TRACE(row.name);
    EXPECT_THAT(CheckHeader(row.header, kShape, 3), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(row.says)));
  }
}

TEST(GrpcLinkTest, AnAbortEndsAReturnThatNobodyReads) {
  GrpcPair pair;
  const auto receiver = pair.downstream().Accept("e");
  const auto sender = pair.upstream().Dial(pair.address(), "e");
  absl::Notification ended;
  sender->NotifyDrawn([&](const v1::StepResult&) { ended.WaitForNotificationWithTimeout(absl::Seconds(60)); });
  ASSERT_THAT(sender->Connect(), IsOk());
  ASSERT_THAT(Send(*sender, 1, 1), IsOk());
  ASSERT_THAT(Receive(*receiver), IsOk());
  std::thread returns([&] {
    v1::StepResult result;
    result.add_entries()->set_hidden_sum(std::string(1 << 16, 'x'));
    absl::Status status;
    for (int i = 0; i < 1000 && status.ok(); ++i) status = receiver->Return(result);
    EXPECT_THAT(status, StatusIs(absl::StatusCode::kUnavailable));
    ended.Notify();
  });
  receiver->Abort();
  returns.join();
}

TEST(GrpcLinkTest, ASecondLinkOfAnEpochIsRefused) {
  GrpcPair pair;
  const auto receiver = pair.downstream().Accept("e");
  const auto first = pair.upstream().Dial(pair.address(), "e");
  const auto second = pair.upstream().Dial(pair.address(), "e");
  ASSERT_THAT(first->Connect(), IsOk());
  EXPECT_THAT(second->Connect(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("has its link already")));
  ASSERT_THAT(Send(*first, 1, 1), IsOk());
  EXPECT_THAT(Receive(*receiver), IsOk());
}

TEST(GrpcLinkTest, ACallThatIsNoLinkIsRefusedInWords) {
  GrpcPair pair;
  const auto receiver = pair.downstream().Accept("e");
  const auto stub = v1::Link::NewStub(common::MakeChannel(pair.address()));
  const auto call = [&stub](const std::vector<v1::TransferRequest>& requests) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
    const auto stream = stub->Transfer(&context);
    for (const v1::TransferRequest& request : requests) (void)stream->Write(request);
    (void)stream->WritesDone();
    v1::TransferResponse response;
    while (stream->Read(&response)) {
    }
    return common::FromGrpcStatus(stream->Finish());
  };
  EXPECT_THAT(call({}), StatusIs(absl::StatusCode::kCancelled, HasSubstr("no epoch was named")));
  v1::TransferRequest hello;
  hello.set_epoch("e");
  hello.set_width(kShape.width);
  v1::TransferRequest wrong = hello;
  wrong.set_step_id(1);
  EXPECT_THAT(call({wrong}), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("must have step 0 and no rows")));
  wrong.set_step_id(0);
  wrong.set_rows(1);
  EXPECT_THAT(call({wrong}), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("must have step 0 and no rows")));
  // None of these was the epoch's link. This one is, and then says nonsense.
  wrong = hello;
  wrong.set_epoch("f");
  EXPECT_THAT(call({hello, wrong}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("a frame of epoch f in epoch e")));
  EXPECT_THAT(Receive(*receiver), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("epoch f in epoch e")));
}

TEST(GrpcLinkTest, AReceiverThatGoesLeavesTheNextOneOfItsEpoch) {
  GrpcPair pair;
  auto gone = pair.downstream().Accept("e");
  const auto receiver = pair.downstream().Accept("e");
  gone.reset();
  const auto sender = pair.upstream().Dial(pair.address(), "e");
  ASSERT_THAT(sender->Connect(), IsOk());
  ASSERT_THAT(Send(*sender, 1, 1), IsOk());
  EXPECT_THAT(Receive(*receiver), IsOk());
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
