// The fake NCCL sees what must not be done: each test is one mistake that a link could make.
#include "services/worker/link/testing/fake_nccl.h"

#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/device.h"
#include "kernels/base/stream.h"
#include "kernels/cuda/testing/emulated_cuda.h"
#include "kernels/cuda/testing/fake_runtime.h"
#include "services/worker/link/nccl.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker::nccl {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::IsOkAndHolds;
using ::rwkv::testing::StatusIs;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr int64_t kFloats = 32;

// Both ends of a pair, on this thread.
class FakeNcclTest : public ::testing::Test {
 protected:
  FakeNcclTest() {
    kernels::cuda::ResetFake();
    ResetFake();
    device_ = *kernels::cuda::OpenEmulatedDevice();
    for (int rank : {0, 1}) {
      stream_[rank] = *device_->NewStream();
      memory_[rank] = *kernels::DeviceArray<float>::Create(*device_, kFloats);
      EXPECT_THAT(stream_[rank]->Zero(memory_[rank].data(), memory_[rank].size_in_bytes()), IsOk());
      EXPECT_THAT(stream_[rank]->Synchronize(), IsOk());
      done_[rank] = *device_->NewEvent();
    }
  }
  ~FakeNcclTest() override {
    ResetFake();
    for (Communicator comm : comm_) {
      if (comm != nullptr) kFakeNccl.comm_abort(comm);
    }
    for (const auto& stream : stream_) EXPECT_THAT(stream->Synchronize(), IsOk());
    EXPECT_EQ(CommunicatorsOfFake(), 0);
  }

  void Init() {
    UniqueId id;
    ASSERT_EQ(kFakeNccl.get_unique_id(&id), kSuccess);
    for (int rank : {0, 1}) {
      Config config;
      ASSERT_EQ(kFakeNccl.comm_init_rank_config(&comm_[rank], 2, id, rank, &config), kInProgress);
    }
    ASSERT_TRUE(Eventually([this] { return AreReady(); }));
  }
  Result Ask(int rank) {
    Result error = kSuccess;
    EXPECT_EQ(kFakeNccl.comm_get_async_error(comm_[rank], &error), kSuccess);
    return error;
  }
  bool AreReady() {
    const bool first = Ask(0) == kSuccess;
    return Ask(1) == kSuccess && first;
  }
  // A group of one end. `parts`: elements of each transfer.
  Result Move(int rank, const std::vector<size_t>& parts = {8}) {
    kFakeNccl.group_start();
    Result result = kSuccess;
    float* at = memory_[rank].data();
    for (size_t part : parts) {
      const Result one = rank == 0 ? kFakeNccl.send(at, part, kFloat32, 1, comm_[0], stream_[0]->handle())
                                   : kFakeNccl.recv(at, part, kFloat32, 0, comm_[1], stream_[1]->handle());
      if (result == kSuccess) result = one;
      at += part;
    }
    const Result end = kFakeNccl.group_end();
    return result == kSuccess ? end : result;
  }
  // Both ends' groups, until NCCL has taken them.
  void MoveBoth(const std::vector<size_t>& sent = {8}, const std::vector<size_t>& received = {8}) {
    ASSERT_EQ(Move(0, sent), kInProgress);
    ASSERT_EQ(Move(1, received), kInProgress);
    ASSERT_TRUE(Eventually([this] { return AreReady(); }));
    for (int rank : {0, 1}) ASSERT_THAT(stream_[rank]->Record(*done_[rank]), IsOk());
  }
  static bool Eventually(const std::function<bool()>& is) {
    const absl::Time limit = absl::Now() + absl::Seconds(20);
    while (!is()) {
      if (absl::Now() > limit) return false;
      std::this_thread::yield();
    }
    return true;
  }
  // Asks both: a question moves a stream.
  bool BothDone() {
    const bool first = done_[0]->Done();
    return done_[1]->Done() && first;
  }

  std::unique_ptr<kernels::Device> device_;
  std::unique_ptr<kernels::Stream> stream_[2];
  std::unique_ptr<kernels::Event> done_[2];
  kernels::DeviceArray<float> memory_[2];
  Communicator comm_[2] = {};
};

TEST_F(FakeNcclTest, WhatIsDoneRightIsNoViolation) {
  Init();
  for (int64_t i = 0; i < kFloats; ++i) memory_[0].data()[i] = static_cast<float>(i);
  MoveBoth({8, 4}, {8, 4});
  ASSERT_TRUE(Eventually([this] { return BothDone(); }));
  EXPECT_EQ(memory_[1].data()[11], 11.0f);
  EXPECT_EQ(memory_[1].data()[12], 0.0f);
  EXPECT_EQ(TransfersOfFake(), 2);
  EXPECT_THAT(ViolationsOfFake(), IsEmpty());
  EXPECT_THAT(kernels::cuda::ViolationsOfFake(), IsEmpty());
}

TEST_F(FakeNcclTest, NothingHasComeBeforeTheStreamGotThere) {
  Init();
  MoveBoth();
  EXPECT_FALSE(done_[1]->Done());
  EXPECT_TRUE(memory_[1].data()[0] != memory_[1].data()[0]) << "read before the wait: NaN";
  ASSERT_TRUE(Eventually([this] { return BothDone(); }));
  EXPECT_EQ(memory_[1].data()[0], 0.0f);
}

TEST_F(FakeNcclTest, TheFirstTransferNeedsTheOtherEndsCall) {
  Init();
  ASSERT_EQ(Move(0), kInProgress);
  for (int i = 0; i < 100; ++i) EXPECT_EQ(Ask(0), kInProgress);
  ASSERT_EQ(Move(1), kInProgress);
  EXPECT_TRUE(Eventually([this] { return AreReady(); }));
}

TEST_F(FakeNcclTest, ABufferThatIsWrittenBeforeItWasSentIsSeen) {
  Init();
  MoveBoth();
  EXPECT_FALSE(done_[0]->Done());  // It has begun.
  memory_[0].data()[3] = 1.0f;
  ASSERT_TRUE(Eventually([this] { return BothDone(); }));
  EXPECT_THAT(ViolationsOfFake(), ElementsAre(HasSubstr("written before it was sent")));
}

TEST_F(FakeNcclTest, CountsThatDifferAreSeen) {
  Init();
  MoveBoth({8}, {7});
  ASSERT_TRUE(Eventually([this] { return !BothDone() && !ViolationsOfFake().empty(); }));
  EXPECT_THAT(ViolationsOfFake(), ElementsAre(HasSubstr("32 bytes are sent and 28 received")));
  EXPECT_EQ(Ask(1), kInternalError);
}

TEST_F(FakeNcclTest, GroupsThatDifferAreSeen) {
  Init();
  MoveBoth({8, 4}, {8});
  ASSERT_TRUE(Eventually([this] { return !BothDone() && !ViolationsOfFake().empty(); }));
  EXPECT_THAT(ViolationsOfFake(), ElementsAre(HasSubstr("a group of 2 meets one of 1")));
}

TEST_F(FakeNcclTest, AGroupBehindOneThatIsNotTakenIsSeen) {
  Init();
  ASSERT_EQ(Move(0), kInProgress);
  EXPECT_EQ(Move(0), kInvalidUsage);
  EXPECT_THAT(ViolationsOfFake(), ElementsAre(HasSubstr("not taken yet")));
}

TEST_F(FakeNcclTest, UseBeforeItIsReadyIsSeen) {
  UniqueId id;
  kFakeNccl.get_unique_id(&id);
  Config config;
  kFakeNccl.comm_init_rank_config(&comm_[0], 2, id, 0, &config);
  EXPECT_EQ(Move(0), kInvalidUsage);
  EXPECT_THAT(ViolationsOfFake(), ElementsAre(HasSubstr("send before the communicator is ready")));
}

TEST_F(FakeNcclTest, BlockingCommunicatorsAndIdsUsedTwiceAreSeen) {
  UniqueId id;
  kFakeNccl.get_unique_id(&id);
  Config config;
  config.blocking = 1;
  EXPECT_EQ(kFakeNccl.comm_init_rank_config(&comm_[0], 2, id, 0, &config), kInvalidArgument);
  config.blocking = 0;
  EXPECT_EQ(kFakeNccl.comm_init_rank_config(&comm_[0], 2, id, 0, &config), kInProgress);
  EXPECT_EQ(kFakeNccl.comm_init_rank_config(&comm_[1], 2, id, 0, &config), kInvalidArgument);
  EXPECT_EQ(kFakeNccl.comm_init_rank_config(&comm_[1], 3, id, 1, &config), kInvalidArgument);
  EXPECT_THAT(ViolationsOfFake(), ElementsAre(HasSubstr("calls block"), HasSubstr("used twice"), HasSubstr("1 of 3")));
}

TEST_F(FakeNcclTest, UseAfterAbortIsSeen) {
  Init();
  kFakeNccl.comm_abort(comm_[0]);
  Result error = kSuccess;
  EXPECT_EQ(kFakeNccl.comm_get_async_error(comm_[0], &error), kInvalidArgument);
  EXPECT_EQ(Move(0), kInvalidArgument);
  EXPECT_EQ(kFakeNccl.comm_abort(comm_[0]), kInvalidArgument);
  comm_[0] = nullptr;
  EXPECT_THAT(ViolationsOfFake(), ElementsAre("a question after abort", "send after abort", "abort after abort"));
}

TEST_F(FakeNcclTest, ASecondThreadIsSeen) {
  Init();
  std::thread([this] { Ask(0); }).join();
  EXPECT_THAT(ViolationsOfFake(), ElementsAre("a question from a second thread"));
}

TEST_F(FakeNcclTest, MemoryThatIsNotTheDevicesIsSeen) {
  Init();
  std::vector<float> host(8);
  kFakeNccl.group_start();
  EXPECT_EQ(kFakeNccl.send(host.data(), 8, kFloat32, 1, comm_[0], stream_[0]->handle()), kInvalidUsage);
  kFakeNccl.group_end();
  EXPECT_EQ(Move(0, {kFloats + 1}), kInvalidUsage);
  EXPECT_THAT(ViolationsOfFake(), ElementsAre(HasSubstr("32 bytes that are not the device's"), HasSubstr("132 bytes")));
}

TEST_F(FakeNcclTest, TransfersOutsideAGroupAreSeen) {
  Init();
  kFakeNccl.send(memory_[0].data(), 8, kFloat32, 1, comm_[0], stream_[0]->handle());
  EXPECT_EQ(kFakeNccl.group_end(), kInvalidUsage);
  EXPECT_THAT(ViolationsOfFake(), ElementsAre("send outside a group", HasSubstr("nobody began")));
}

TEST_F(FakeNcclTest, TheDefaultStreamIsSeen) {
  Init();
  kFakeNccl.group_start();
  kFakeNccl.send(memory_[0].data(), 8, kFloat32, 1, comm_[0], nullptr);
  kFakeNccl.group_end();
  ASSERT_EQ(Move(1), kInProgress);
  EXPECT_TRUE(Eventually([this] {
    Ask(1);
    return Ask(0) == kUnhandledCudaError;
  }));
  EXPECT_THAT(kernels::cuda::ViolationsOfFake(), Contains(HasSubstr("default stream")));
}

TEST_F(FakeNcclTest, FaultsHappenWhereTheyAreAskedFor) {
  Init();
  FakeFaults faults;
  faults.fail_at = 2;  // Transfers are counted at both ends.
  ResetFake(faults);
  MoveBoth();
  ASSERT_TRUE(Eventually([this] { return BothDone(); }));
  MoveBoth();
  EXPECT_TRUE(Eventually([this] {
    BothDone();
    return Ask(0) == kInternalError;
  }));
  EXPECT_FALSE(done_[0]->Done());
  kFakeNccl.comm_abort(comm_[0]);
  comm_[0] = nullptr;
  EXPECT_TRUE(Eventually([this] { return done_[0]->Done(); })) << "an abort lets the stream go on";
  EXPECT_TRUE(Eventually([this] {
    BothDone();
    return Ask(1) == kRemoteError;
  })) << "and the other end hears of it";
}

TEST(ParseFakeFaultsTest, SaysWhatIsNone) {
  EXPECT_THAT(ParseFakeFaults("hang_at=5,slow=1ms,never_ready=true"), IsOk());
  EXPECT_EQ(ParseFakeFaults("hang_at=5")->hang_at, 5);
  EXPECT_THAT(ParseFakeFaults("hang=5"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("hang=5")));
}

}  // namespace
}  // namespace rwkv::worker::nccl
