// Steps that come again, as graphs on the fake runtime: the same as launches, and what the fake sees of what must not
// be.
#include <cmath>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/api/op_table.h"
#include "kernels/base/device.h"
#include "kernels/base/repeating_stream.h"
#include "kernels/base/status_macros.h"
#include "kernels/cuda/cuda_stream.h"
#include "kernels/cuda/testing/emulated_cuda.h"
#include "kernels/cuda/testing/fake_runtime.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::kernels::cuda {
namespace {

using ::rwkv::testing::StatusIs;
using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr int64_t kWidth = 64;
constexpr int64_t kBytes = kWidth * static_cast<int64_t>(sizeof(float));
constexpr int64_t kKey[] = {1};

class FakeGraphsTest : public ::testing::Test {
 protected:
  FakeGraphsTest() {
    ResetFake();
    Open("cuda/emulated");
  }
  ~FakeGraphsTest() override {
    SetEager(false);
    ResetFake();
  }

  void Open(const std::string& name) {
    stream_.reset();
    for (DeviceArray<float>* array : {&pinned_, &out_, &x_, &y_}) *array = {};
    device_ = *OpenEmulatedDevice(name);
    stream_ = *device_->NewStream();
    repeating_ = dynamic_cast<RepeatingStream*>(stream_.get());
    pinned_ = *DeviceArray<float>::Create(*device_, kWidth, MemoryKind::kPinned);
    out_ = *DeviceArray<float>::Create(*device_, kWidth, MemoryKind::kPinned);
    x_ = *DeviceArray<float>::Create(*device_, kWidth);
    y_ = *DeviceArray<float>::Create(*device_, kWidth);
  }

  absl::Status Normalize(float* y) {
    LayerNormArgs args;
    args.rows = 1;
    args.width = kWidth;
    args.x = args.weight = args.bias = x_.data();
    args.epsilon = 0.0f;
    args.y = y;
    return device_->ops().layer_norm(args, *stream_);
  }

  // The step: in by a copy, what repeats, out by a copy.
  absl::Status Step(float value, const std::function<absl::Status()>& what) {
    for (int64_t i = 0; i < kWidth; ++i) pinned_.data()[i] = value * static_cast<float>(i % 2);
    RWKV_RETURN_IF_ERROR(stream_->Copy(x_.data(), pinned_.data(), kBytes));
    RWKV_RETURN_IF_ERROR(stream_->Repeat(kKey, what));
    RWKV_RETURN_IF_ERROR(stream_->Copy(out_.data(), y_.data(), kBytes));
    EXPECT_TRUE(eager_ || std::isnan(out_.data()[0])) << "it has run before somebody waits";
    return stream_->Synchronize();
  }
  absl::Status Step(float value) {
    return Step(value, [this] { return Normalize(y_.data()); });
  }

  bool eager_ = false;
  std::unique_ptr<Device> device_;
  std::unique_ptr<Stream> stream_;
  RepeatingStream* repeating_ = nullptr;  // The same.
  DeviceArray<float> pinned_, out_, x_, y_;
};

TEST_F(FakeGraphsTest, StreamsAndGraphsAreGivenBack) {
  const int64_t before = CountsOfFake().handles;
  ASSERT_OK(Step(1.0f));
  ASSERT_OK(Step(3.0f));
  EXPECT_EQ(CountsOfFake().handles, before + 1) << "the graph that is launched, and not what it was made of";
  ASSERT_OK(stream_->Scratch(int64_t{1} << 20));
  EXPECT_EQ(CountsOfFake().handles, before) << "graphs may point to scratch memory that is gone";
  ASSERT_OK(Step(5.0f));
  EXPECT_EQ(out_.data()[1], 10.0f);
  FakeFaults faults;
  faults.fail_graph = 0;
  ResetFake(faults);
  ASSERT_OK(Step(7.0f));
  EXPECT_EQ(CountsOfFake().handles, before) << "nothing is left of one that could not be made";
  ASSERT_OK(stream_->Scratch(int64_t{1} << 21));
  ASSERT_OK(Step(9.0f));
  ASSERT_OK(Step(11.0f));
  EXPECT_EQ(CountsOfFake().handles, before + 1);
  stream_.reset();
  EXPECT_EQ(CountsOfFake().handles, before - 1) << "neither stream nor graph is left";
}

TEST_F(FakeGraphsTest, WhatRepeatsInsideAnotherIsPartOfIt) {
  constexpr int64_t kInner[] = {2};
  for (const float value : {1.0f, 3.0f, 5.0f, 7.0f}) {
    ASSERT_OK(Step(value, [&] { return stream_->Repeat(kInner, [this] { return Normalize(y_.data()); }); }));
    EXPECT_EQ(out_.data()[1], 2 * value);
  }
  EXPECT_EQ(repeating_->repeated().ready, 1);
  EXPECT_EQ(repeating_->repeated().failures, 0);
  EXPECT_THAT(ViolationsOfFake(), IsEmpty());
}

TEST_F(FakeGraphsTest, StepsThatComeAgainAreGraphsAndGiveTheSame) {
  std::vector<std::vector<float>> results;
  for (const bool eager : {false, true}) {
    for (const char* device : {"cuda/emulated", "cuda/emulated/launches"}) {
      Open(device);
      ResetFake();
      eager_ = eager;
      SetEager(eager);
      std::vector<float>& result = results.emplace_back();
      for (const float value : {1.0f, 3.0f, 5.0f, 7.0f}) {
        ASSERT_OK(Step(value));
        result.insert(result.end(), out_.data(), out_.data() + kWidth);
      }
      const bool graphs = std::string(device) == "cuda/emulated";
      EXPECT_EQ(stream_->Repeats(), graphs);
      EXPECT_EQ(CountsOfFake().graphs, graphs ? 1 : 0);
      EXPECT_EQ(CountsOfFake().graph_launches, graphs ? 3 : 0);
      EXPECT_EQ(CountsOfFake().graph_copies, 0);
      EXPECT_EQ(CountsOfFake().launches, 4);
      EXPECT_THAT(ViolationsOfFake(), IsEmpty());
    }
  }
  for (const std::vector<float>& result : results) EXPECT_EQ(result, results[0]);
  EXPECT_NE(results[0][1], results[0][kWidth + 1]) << "every step gives the same";
}

TEST_F(FakeGraphsTest, GraphHasTheArgumentsOfItsCapture) {
  ASSERT_OK_AND_ASSIGN(const auto other, DeviceArray<float>::Create(*device_, kWidth));
  ASSERT_OK(Step(1.0f));
  ASSERT_OK(Step(1.0f));
  // Under the same key: it goes to y as before, and nothing to where it should.
  ASSERT_OK(Step(3.0f, [&] { return Normalize(other.data()); }));
  EXPECT_EQ(out_.data()[1], 6.0f);
  ASSERT_OK(stream_->Copy(out_.data(), other.data(), kBytes));
  ASSERT_OK(stream_->Synchronize());
  EXPECT_TRUE(std::isnan(out_.data()[1]));
}

TEST_F(FakeGraphsTest, WhatACaptureDoesNotSurviveIsSeen) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Event> event, device_->NewEvent());
  const struct {
    const char* words;
    std::function<absl::Status()> what;
  } cases[] = {
      {"memory is allocated", [&] { return device_->Allocate(64, MemoryKind::kDevice).status(); }},
      {"memory is allocated", [&] { return device_->Allocate(64, MemoryKind::kPinned).status(); }},
      {"an event is recorded", [&] { return stream_->Record(*event); }},
      {"an event is recorded", [&] { return stream_->Synchronize(); }},
      {"another library works",
       [&] {
         const int error = EnqueueOnFake(stream_->handle(), [] { return true; });
         return error == 0 ? absl::OkStatus() : absl::InternalError("refused");
       }},
  };
  int64_t key = 10;
  for (const auto& test : cases) {
    SCOPED_TRACE(test.words);
    ResetFake();
    ++key;
    EXPECT_OK(stream_->Repeat({key}, test.what));  // Called.
    EXPECT_THAT(ViolationsOfFake(), IsEmpty());
    EXPECT_OK(stream_->Repeat({key}, test.what));  // No graph: called.
    EXPECT_THAT(repeating_->repeated().last_failure, StatusIs(absl::StatusCode::kInternal));
    EXPECT_EQ(repeating_->repeated().failures, key - 10);
    EXPECT_THAT(ViolationsOfFake(), Contains(HasSubstr(test.words)));
    EXPECT_THAT(ViolationsOfFake(), Contains(HasSubstr("while a stream is captured")));
    ASSERT_OK(Step(3.0f)) << "the stream is not usable any more";
  }
}

TEST_F(FakeGraphsTest, GraphWithMemoryThatIsGoneIsAFault) {
  ASSERT_OK_AND_ASSIGN(auto gone, DeviceArray<float>::Create(*device_, kWidth));
  const auto step = [&] { return Normalize(gone.data()); };
  ASSERT_OK(Step(1.0f, step));
  ASSERT_OK(Step(1.0f, step));
  gone = {};
  EXPECT_THAT(Step(1.0f, step), StatusIs(absl::StatusCode::kInternal, HasSubstr("cudaErrorIllegalAddress")));
  EXPECT_THAT(ViolationsOfFake(), Contains(HasSubstr("layer_norm has a pointer to memory that was freed")));
}

TEST_F(FakeGraphsTest, ScratchThatGrowsEndsTheGraphsThatPointToIt) {
  const auto step = [&]() -> absl::Status {
    RWKV_ASSIGN_OR_RETURN(void* const scratch, stream_->Scratch(kBytes));
    RWKV_RETURN_IF_ERROR(Normalize(static_cast<float*>(scratch)));
    return stream_->Copy(y_.data(), scratch, kBytes);
  };
  for (int i = 0; i < 3; ++i) ASSERT_OK(Step(3.0f, step));
  EXPECT_EQ(CountsOfFake().graphs, 1);
  ASSERT_OK(stream_->Scratch(1 << 20));
  for (int i = 0; i < 3; ++i) ASSERT_OK(Step(3.0f, step));
  EXPECT_EQ(CountsOfFake().graphs, 2);
  EXPECT_EQ(out_.data()[1], 6.0f);
  EXPECT_THAT(ViolationsOfFake(), IsEmpty());
  // It must have grown before a capture.
  const auto grows = [&] { return stream_->Scratch(CountsOfFake().graphs == 2 ? 2 << 20 : 0).status(); };
  ASSERT_OK(stream_->Repeat({7}, [] { return absl::OkStatus(); }));
  EXPECT_OK(stream_->Repeat({7}, grows));
  EXPECT_THAT(repeating_->repeated().last_failure,
              StatusIs(absl::StatusCode::kInternal, HasSubstr("scratch memory grows")));
}

TEST_F(FakeGraphsTest, GraphsAreBounded) {
  for (int round = 0; round < 3; ++round) {
    for (int64_t key = 0; key < 80; ++key) {
      ASSERT_OK(stream_->Repeat({key}, [this] { return Normalize(y_.data()); }));
    }
  }
  ASSERT_OK(stream_->Synchronize());
  EXPECT_EQ(CountsOfFake().graphs, static_cast<int64_t>(CudaStream::kMostGraphs));
  EXPECT_EQ(CountsOfFake().launches, 3 * 80);
  EXPECT_THAT(ViolationsOfFake(), IsEmpty());
}

TEST_F(FakeGraphsTest, PreparedStepIsAGraphFromTheFirstTimeAndHasNotRun) {
  const auto normalize = [this] { return Normalize(y_.data()); };
  repeating_->Prepare(kKey, normalize);
  repeating_->Prepare(kKey, normalize);
  ASSERT_OK(stream_->Synchronize());
  EXPECT_EQ(CountsOfFake().graphs, 1);
  EXPECT_EQ(CountsOfFake().launches, 0);
  EXPECT_EQ(repeating_->repeated().ready, 1);
  EXPECT_EQ(repeating_->repeated().device_bytes, kGraphBytesOfFake);
  EXPECT_EQ(repeating_->repeated().failures, 0);
  ASSERT_OK(Step(3.0f));
  EXPECT_EQ(CountsOfFake().graph_launches, 1);
  EXPECT_EQ(out_.data()[1], 6.0f);
  EXPECT_THAT(ViolationsOfFake(), IsEmpty());
  Open("cuda/emulated/launches");
  repeating_->Prepare(kKey, normalize);
  EXPECT_EQ(CountsOfFake().graphs, 1);
}

TEST_F(FakeGraphsTest, StepThatNoGraphCanBeMadeOfIsLaunchedAndTold) {
  for (const bool prepared : {true, false}) {
    Open("cuda/emulated");
    FakeFaults faults;
    faults.fail_graph = 0;
    ResetFake(faults);
    if (prepared) repeating_->Prepare(kKey, [this] { return Normalize(y_.data()); });
    for (const float value : {1.0f, 3.0f, 5.0f}) {
      ASSERT_OK(Step(value));
      EXPECT_EQ(out_.data()[1], 2.0f * value);
    }
    EXPECT_EQ(CountsOfFake().graphs, 0);
    EXPECT_EQ(CountsOfFake().launches, 3);
    EXPECT_EQ(repeating_->repeated().failures, 1) << "tried again";
    EXPECT_THAT(repeating_->repeated().last_failure,
                StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("make a graph")));
    EXPECT_THAT(ViolationsOfFake(), IsEmpty());
  }
}

TEST_F(FakeGraphsTest, FaultsAreCountedInGraphsToo) {
  ASSERT_OK(Step(1.0f));
  ASSERT_OK(Step(1.0f));
  FakeFaults faults;
  faults.fail_launch = 0;
  ResetFake(faults);
  EXPECT_THAT(Step(1.0f), StatusIs(absl::StatusCode::kInternal, HasSubstr("cudaErrorIllegalAddress")));
}

}  // namespace
}  // namespace rwkv::kernels::cuda
