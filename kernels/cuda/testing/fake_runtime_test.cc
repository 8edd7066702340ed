// The device on the fake runtime: what the fake sees of what must not be, and what the device says of faults.
#include "kernels/cuda/testing/fake_runtime.h"

#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/string_view.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/api/op_table.h"
#include "kernels/base/buffer.h"
#include "kernels/base/device.h"
#include "kernels/base/status_macros.h"
#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/kernel_set.h"
#include "kernels/cuda/testing/emulated_cuda.h"
#include "kernels/cuda/testing/emulation.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::kernels::cuda {
namespace {

using ::rwkv::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::StartsWith;

constexpr int64_t kWidth = 64;
constexpr int64_t kBytes = kWidth * static_cast<int64_t>(sizeof(float));

class FakeRuntimeTest : public ::testing::Test {
 protected:
  FakeRuntimeTest() {
    ResetFake();
    device_ = *OpenEmulatedDevice();
    stream_ = *device_->NewStream();
    pinned_ = *DeviceArray<float>::Create(*device_, kWidth, MemoryKind::kPinned);
    out_ = *DeviceArray<float>::Create(*device_, kWidth, MemoryKind::kPinned);
    x_ = *DeviceArray<float>::Create(*device_, kWidth);
    y_ = *DeviceArray<float>::Create(*device_, kWidth);
  }
  ~FakeRuntimeTest() override {
    SetEager(false);
    SetOutOfReach(false);
    ResetFake();
  }

  // pinned -> x -> y = normalised x -> out
  absl::Status Enqueue() {
    for (int64_t i = 0; i < kWidth; ++i) pinned_.data()[i] = static_cast<float>(i % 2);
    RWKV_RETURN_IF_ERROR(stream_->Copy(x_.data(), pinned_.data(), kBytes));
    RWKV_RETURN_IF_ERROR(Normalize());
    return stream_->Copy(out_.data(), y_.data(), kBytes);
  }
  absl::Status Normalize() {
    LayerNormArgs args;
    args.rows = 1;
    args.width = kWidth;
    args.x = args.weight = args.bias = x_.data();
    args.epsilon = 0.0f;
    args.y = y_.data();
    return device_->ops().layer_norm(args, *stream_);
  }

  std::unique_ptr<Device> device_;
  std::unique_ptr<Stream> stream_;
  DeviceArray<float> pinned_, out_, x_, y_;
};

TEST_F(FakeRuntimeTest, NothingHasRunBeforeSomebodyWaits) {
  for (int64_t i = 0; i < kWidth; ++i) pinned_.data()[i] = 1.0f;
  ASSERT_OK(stream_->Copy(x_.data(), pinned_.data(), kBytes));
  for (int64_t i = 0; i < kWidth; ++i) out_.data()[i] = 7.0f;
  ASSERT_OK(stream_->Copy(out_.data(), x_.data(), kBytes));
  EXPECT_TRUE(std::isnan(out_.data()[0])) << "read before the wait";
  pinned_.data()[3] = 2.0f;  // Too early: the copy has not read it.
  ASSERT_OK(stream_->Synchronize());
  EXPECT_EQ(out_.data()[0], 1.0f);
  EXPECT_EQ(out_.data()[3], 2.0f);
}

TEST_F(FakeRuntimeTest, EagerAndLazyStreamsGiveTheSame) {
  std::vector<std::vector<float>> results;
  for (const bool eager : {false, true}) {
    SetEager(eager);
    ASSERT_OK(Enqueue());
    ASSERT_OK(stream_->Synchronize());
    results.emplace_back(out_.data(), out_.data() + kWidth);
    EXPECT_EQ(results.back()[1], 2.0f);
  }
  EXPECT_EQ(results[0], results[1]);
  EXPECT_THAT(ViolationsOfFake(), IsEmpty());
}

TEST_F(FakeRuntimeTest, EventIsDoneOnceTheStreamHasPassedIt) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Event> event, device_->NewEvent());
  EXPECT_TRUE(event->Done());
  ASSERT_OK(Enqueue());
  ASSERT_OK(stream_->Record(*event));
  EXPECT_FALSE(event->Done());
  ASSERT_OK(event->WaitOnHost());
  EXPECT_TRUE(event->Done());
  EXPECT_EQ(out_.data()[1], 2.0f);
}

TEST_F(FakeRuntimeTest, AskingForAnEventComesToAnEnd) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Event> event, device_->NewEvent());
  ASSERT_OK(Enqueue());
  ASSERT_OK(stream_->Record(*event));
  int questions = 1;
  while (!event->Done()) ASSERT_LT(++questions, 10);
}

TEST_F(FakeRuntimeTest, OperationNeitherAllocatesNorWaits) {
  {
    const StepWatch watch;
    ASSERT_OK(Enqueue());
  }
  EXPECT_THAT(ViolationsOfFake(), IsEmpty());
  EXPECT_EQ(CountsOfFake().launches, 1);
  EXPECT_EQ(CountsOfFake().copies, 2);
}

TEST_F(FakeRuntimeTest, AllocatingAndWaitingInAStepAreViolations) {
  const StepWatch watch;
  ASSERT_OK(device_->Allocate(64, MemoryKind::kDevice));
  ASSERT_OK(stream_->Synchronize());
  EXPECT_THAT(ViolationsOfFake(),
              ElementsAre(HasSubstr("allocated in a step"), HasSubstr("waits for a stream in a step")));
}

TEST_F(FakeRuntimeTest, PageableMemoryInACopyIsAViolation) {
  std::vector<float> pageable(kWidth);
  EXPECT_FALSE(stream_->Copy(x_.data(), pageable.data(), kBytes).ok());
  EXPECT_FALSE(stream_->Copy(x_.data(), y_.data(), kBytes + 4).ok());
  EXPECT_THAT(ViolationsOfFake(), ElementsAre(HasSubstr("neither the device's nor pinned"), HasSubstr("260 bytes")));
}

TEST_F(FakeRuntimeTest, FaultOfAKernelStays) {
  FakeFaults faults;
  faults.fail_launch = 1;
  ResetFake(faults);
  ASSERT_OK(Enqueue());
  ASSERT_OK(stream_->Synchronize());
  ASSERT_OK(Enqueue());
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Event> event, device_->NewEvent());
  ASSERT_OK(stream_->Record(*event));
  EXPECT_THAT(event->WaitOnHost(), StatusIs(absl::StatusCode::kInternal, HasSubstr("cudaErrorIllegalAddress")));
  EXPECT_TRUE(event->Done()) << "nobody must wait for what cannot come";
  EXPECT_THAT(stream_->Synchronize(),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("cuda/emulated: synchronize: cudaErrorIllegalAddress")));
  EXPECT_THAT(Normalize(), StatusIs(absl::StatusCode::kInternal, HasSubstr("layer_norm")));
  EXPECT_THAT(device_->Allocate(64, MemoryKind::kDevice), StatusIs(absl::StatusCode::kInternal));
}

// An uncorrectable error of memory, at whichever call or in whichever copy: it is told in words, and stays.
TEST_F(FakeRuntimeTest, BrokenMemoryIsToldWhereverItShows) {
  const auto is_broken = StatusIs(absl::StatusCode::kInternal, HasSubstr("cudaErrorECCUncorrectable"));
  const auto run = [this]() -> absl::Status {
    RWKV_RETURN_IF_ERROR(Enqueue());
    return stream_->Synchronize();
  };
  for (const bool eager : {false, true}) {
    SetEager(eager);
    ResetFake();
    ASSERT_OK(run());
    const int64_t calls = CountsOfFake().calls;
    ASSERT_GT(calls, 5);
    FakeFaults faults;
    for (faults.break_call = 0; faults.break_call < calls; ++faults.break_call) {
      ResetFake(faults);
      EXPECT_THAT(run(), is_broken) << "call " << faults.break_call << " of " << calls;
      EXPECT_THAT(run(), is_broken) << "behind call " << faults.break_call;
    }
    ResetFake(faults);
    EXPECT_OK(run());
    faults.break_call = -1;
    for (faults.break_copy = 0; faults.break_copy < 2; ++faults.break_copy) {
      ResetFake(faults);
      EXPECT_THAT(run(), is_broken) << "copy " << faults.break_copy;
      if (faults.break_copy == 1) EXPECT_TRUE(std::isnan(out_.data()[kWidth - 1])) << "it has come whole";
      EXPECT_THAT(device_->Allocate(64, MemoryKind::kDevice).status(), is_broken);
    }
    ResetFake(faults);
    EXPECT_OK(run());
    EXPECT_EQ(out_.data()[kWidth - 1], 2.0f);
    for (const Moment moment : {Moment::kNextCall, Moment::kNextCopy}) {
      ResetFake();
      BreakMemory(moment);
      EXPECT_THAT(run(), is_broken);
      BreakMemory(moment);
      ResetFake();
      EXPECT_OK(run());
    }
  }
  EXPECT_THAT(ViolationsOfFake(), IsEmpty());
}

// A GPU that says nothing any more: the host's waits end, with words, and so do destructors.
TEST_F(FakeRuntimeTest, WaitsForAKernelThatHangsEnd) {
  DeviceOptions options;
  options.hang_limit = absl::Milliseconds(50);
  FakeFaults faults;
  faults.hang_launch = 1;
  ResetFake(faults);
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Device> device,
                       OpenDevice(kFakeRuntime, kEmulatedKernels, 0, "cuda/hangs", options));
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<Stream> stream, device->NewStream());
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<Event> event, device->NewEvent());
  std::swap(stream, stream_);
  ASSERT_OK(Enqueue());
  ASSERT_OK(stream_->Record(*event));
  ASSERT_OK(event->WaitOnHost());
  ASSERT_OK(Enqueue());
  ASSERT_OK(stream_->Record(*event));
  const absl::Time begin = absl::Now();
  EXPECT_THAT(event->WaitOnHost(), StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("not done after 50ms")));
  EXPECT_GE(absl::Now() - begin, options.hang_limit);
  EXPECT_FALSE(event->Done());
  EXPECT_THAT(stream_->Synchronize(),
              StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("cuda/hangs: synchronize: the GPU hangs")));
  EXPECT_THAT(stream_->Scratch(64).status(), StatusIs(absl::StatusCode::kDeadlineExceeded)) << "it may be in use";
  std::swap(stream, stream_);
  stream.reset();
  event.reset();
  EXPECT_LT(absl::Now() - begin, absl::Seconds(20));
  EXPECT_THAT(ViolationsOfFake(), IsEmpty());
}

TEST_F(FakeRuntimeTest, NoMemoryIsResourceExhaustedAndTheNextAllocationIsTried) {
  FakeFaults faults;
  faults.fail_allocation = 1;
  ResetFake(faults);
  ASSERT_OK(device_->Allocate(64, MemoryKind::kDevice));
  EXPECT_THAT(device_->Allocate(12345, MemoryKind::kPinned),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("no memory for 12345 pinned bytes")));
  ASSERT_OK(device_->Allocate(64, MemoryKind::kDevice));
  EXPECT_THAT(device_->Allocate(int64_t{1} << 50, MemoryKind::kDevice),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("1125899906842624 bytes")));
  EXPECT_THAT(device_->Allocate(-1, MemoryKind::kDevice), StatusIs(absl::StatusCode::kInvalidArgument));
  ASSERT_OK_AND_ASSIGN(const Buffer nothing, device_->Allocate(0, MemoryKind::kDevice));
  EXPECT_EQ(nothing.data(), nullptr);
}

TEST_F(FakeRuntimeTest, MemoryIsGivenBack) {
  const int64_t before = CountsOfFake().allocated_bytes;
  {
    const std::vector<float> weights(3 * 5);
    ASSERT_OK_AND_ASSIGN(const Weight weight,
                         device_->Load({DType::kFloat32, 3, 5, weights.data()}, WeightUse::kProduct));
    EXPECT_GT(CountsOfFake().allocated_bytes, before);
  }
  EXPECT_EQ(CountsOfFake().allocated_bytes, before);
}

TEST_F(FakeRuntimeTest, DeviceThatIsNotThereIsUnimplementedInWords) {
  const auto open = [](const FakeFaults& faults) {
    ResetFake(faults);
    return OpenEmulatedDevice().status();
  };
  FakeFaults faults;
  faults.devices = -1;
  EXPECT_THAT(open(faults), StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("cudaErrorInsufficientDriver")));
  faults.devices = 0;
  EXPECT_THAT(open(faults), StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("cudaErrorNoDevice")));
  faults.devices = 1;
  faults.major = 7;
  EXPECT_THAT(open(faults), StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("compute capability 7.0")));
  faults.major = 8;
  EXPECT_OK(open(faults));
  for (int ordinal : {-1, 1}) {
    EXPECT_THAT(OpenDevice(kFakeRuntime, kEmulatedKernels, ordinal, "cuda:n"),
                StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("cuda:n: this machine has 1 CUDA devices")));
  }
}

// The bits of products depend on tensor cores, those of steps on no graph.
TEST_F(FakeRuntimeTest, ANameSaysWhichTwinsAreMeant) {
  struct Row {
    const char* name;
    bool overlaps, graphs;
    ProductsBy products_by;
    const char* family;
  };
  constexpr ProductsBy kTensor = ProductsBy::kTensorCores;
  constexpr ProductsBy kPlain = ProductsBy::kNoTensorCores;
  constexpr ProductsBy kRounded = ProductsBy::kRounded;
  const char* const tensor = "cuda/tensor/sm_90";
  const char* const rounded = "cuda/tensor/sm_90/rounded";
  for (const Row& row :
       {Row{"cuda/emulated", true, true, kTensor, tensor}, Row{"cuda/emulated/fma", true, true, kPlain, "cuda/fp32"},
        Row{"cuda/emulated/launches", true, false, kTensor, tensor},
        Row{"cuda/emulated/fma/launches", true, false, kPlain, "cuda/fp32"},
        Row{"cuda/emulated/serial", false, true, kTensor, tensor},
        Row{"cuda/emulated/half", true, true, kTensor, "cuda/tensor/sm_90/half_states"},
        Row{"cuda/emulated/serial/fma/launches", false, false, kPlain, "cuda/fp32"},
        Row{"cuda/emulated/rounded", true, true, kRounded, rounded},
        Row{"cuda/emulated/half/serial/rounded/launches", false, false, kRounded,
            "cuda/tensor/sm_90/rounded/half_states"}}) {
    SCOPED_TRACE(row.name);
    absl::string_view rest = row.name;
    const DeviceOptions options = TakeOptions(rest);
    EXPECT_EQ(rest, kEmulatedDevice);
    EXPECT_EQ(options.products_by, row.products_by);
    EXPECT_EQ(options.graphs, row.graphs);
    EXPECT_EQ(options.overlaps, row.overlaps);
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Device> device, OpenEmulatedDevice(row.name));
    EXPECT_EQ(device->name(), row.name);
    EXPECT_EQ(device->numeric_family(), row.family);
    EXPECT_EQ(device->ops().cast_state != nullptr, absl::StrContains(row.name, "/half"));
  }
}

TEST_F(FakeRuntimeTest, KernelsOverlapFromHopperOnUnlessTheyAreToBeSerial) {
  static bool overlaps;
  for (const int major : {8, 9}) {
    FakeFaults faults;
    faults.major = major;
    ResetFake(faults);
    for (const char* name : {"cuda/emulated", "cuda/emulated/serial"}) {
      ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Device> device, OpenEmulatedDevice(name));
      ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Stream> stream, device->NewStream());
      emulation::SetLauncher([](StreamHandle, emulation::Kernel kernel) {
        overlaps = kernel.overlaps;
        return 0;
      });
      LayerNormArgs args;
      args.rows = 1;
      args.width = 4;
      args.x = args.weight = args.bias = x_.data();
      args.y = y_.data();
      overlaps = false;
      EXPECT_OK(device->ops().layer_norm(args, *stream));
      EXPECT_EQ(overlaps, major == 9 && std::string(name) == "cuda/emulated") << name << " " << major;
    }
  }
}

TEST_F(FakeRuntimeTest, EventsAreOfTheDeviceThatMakesThemWhicheverTheThreadsIs) {
  FakeFaults faults;
  faults.devices = 2;
  ResetFake(faults);
  const std::unique_ptr<Device> second = *OpenDevice(kFakeRuntime, kEmulatedKernels, 1, "cuda:1");
  ASSERT_EQ(kFakeRuntime.set_device(0), cudaSuccess);
  const std::unique_ptr<Event> event = *second->NewEvent();
  ASSERT_EQ(kFakeRuntime.set_device(0), cudaSuccess);
  const std::unique_ptr<Stream> stream = *second->NewStream();
  EXPECT_OK(stream->Record(*event));
  EXPECT_OK(event->WaitOnHost());
  EXPECT_OK(stream->Synchronize());
  EXPECT_EQ(kFakeRuntime.set_device(0), cudaSuccess);
  EXPECT_THAT(ViolationsOfFake(), IsEmpty());
}

TEST_F(FakeRuntimeTest, HeadsThatNoKernelHoldsAreUnimplementedInWords) {
  EXPECT_EQ(device_->ops().max_head_size, 128);
  Wkv6Args wkv6;
  Wkv7Args wkv7;
  wkv6.head_size = wkv7.head_size = 129;
  EXPECT_THAT(device_->ops().wkv6(wkv6, *stream_),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("wkv6: head_size 129 is more than 128")));
  EXPECT_THAT(device_->ops().wkv7(wkv7, *stream_),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("wkv7: head_size 129 is more than 128")));
  wkv6.head_size = wkv7.head_size = 128;  // What is wrong now is all else.
  EXPECT_THAT(device_->ops().wkv6(wkv6, *stream_), StatusIs(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(device_->ops().wkv7(wkv7, *stream_), StatusIs(absl::StatusCode::kInvalidArgument));
}

TEST_F(FakeRuntimeTest, HostThatTouchesDeviceMemoryDies) {
  SetOutOfReach(true);
  ASSERT_OK(Enqueue());
  ASSERT_OK(stream_->Synchronize());
  EXPECT_EQ(out_.data()[1], 2.0f);
  EXPECT_DEATH(x_.data()[0] = 1.0f, "");
}

TEST_F(FakeRuntimeTest, KernelThatReachesBeyondItsMemoryDies) {
  LayerNormArgs args;
  args.rows = 1;
  args.width = 4096;  // As no buffer here.
  args.x = args.weight = args.bias = x_.data();
  args.y = y_.data();
  ASSERT_OK(device_->ops().layer_norm(args, *stream_));
  EXPECT_DEATH(stream_->Synchronize().IgnoreError(), "");
  ResetFake();
}

}  // namespace
}  // namespace rwkv::kernels::cuda
