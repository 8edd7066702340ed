// What the fake cuBLASLt computes, and that it sees each thing that the library does not allow: a right call, and
// others that change one thing of it.
#include "kernels/cuda/testing/fake_cublaslt.h"

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/device.h"
#include "kernels/cuda/testing/emulated_cuda.h"
#include "kernels/cuda/testing/fake_runtime.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::kernels::cuda::cublaslt {
namespace {

using ::rwkv::testing::StatusIs;
using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

const CublasLt& lt = kFakeCublasLt;

constexpr int64_t kOutputs = 5, kRows = 6, kInputs = 16, kSumPitch = 8;
constexpr size_t kWorkspace = 1 << 20;
constexpr uint16_t kOne = 0x3f80;  // bf16

// A right call, of which a test changes what it wants.
struct Call {
  Context* context = nullptr;
  MatmulDesc* desc = nullptr;
  MatrixLayout* a_layout = nullptr;
  MatrixLayout* b_layout = nullptr;
  MatrixLayout* d_layout = nullptr;
  Preference* preference = nullptr;
  Algorithm algorithm = {};
  float alpha = 1, beta = 0;
  char* a = nullptr;
  char* b = nullptr;
  char* c = nullptr;  // Null: d.
  char* d = nullptr;
  char* workspace = nullptr;
  size_t workspace_bytes = kWorkspace;
  StreamHandle stream = nullptr;

  Result Run() const {
    return lt.matmul(context, desc, &alpha, a, a_layout, b, b_layout, &beta, c == nullptr ? d : c, d_layout, d,
                     d_layout, &algorithm, workspace, workspace_bytes, stream);
  }
};

class FakeCublasLtTest : public ::testing::Test {
 protected:
  FakeCublasLtTest() {
    cuda::ResetFake();
    ResetFake();
    device_ = *OpenEmulatedDevice();
    stream_ = *device_->NewStream();
    for (Buffer* buffer : {&a_, &b_, &d_, &workspace_}) {
      *buffer = *device_->Allocate(static_cast<int64_t>(kWorkspace) + 256, MemoryKind::kDevice);
    }
    call_.stream = static_cast<StreamHandle>(stream_->handle());
    call_.a = a_.as<char>(), call_.b = b_.as<char>(), call_.d = d_.as<char>(), call_.workspace = workspace_.as<char>();
    EXPECT_EQ(lt.create(&call_.context), kSuccess);
    EXPECT_EQ(lt.matmul_desc_create(&call_.desc, kComputeFloat32, kFloat32), kSuccess);
    EXPECT_EQ(lt.matmul_desc_set_attribute(call_.desc, kDescTransA, &kTransposed, 4), kSuccess);
    EXPECT_EQ(lt.matrix_layout_create(&call_.a_layout, kBFloat16, kInputs, kOutputs, kInputs), kSuccess);
    EXPECT_EQ(lt.matrix_layout_create(&call_.b_layout, kBFloat16, kInputs, kRows, kInputs), kSuccess);
    EXPECT_EQ(lt.matrix_layout_create(&call_.d_layout, kFloat32, kOutputs, kRows, kSumPitch), kSuccess);
    EXPECT_EQ(lt.preference_create(&call_.preference), kSuccess);
    const uint64_t bytes = kWorkspace;
    EXPECT_EQ(lt.preference_set_attribute(call_.preference, kPreferenceMaxWorkspaceBytes, &bytes, 8), kSuccess);
    EXPECT_EQ(lt.preference_set_attribute(call_.preference, kPreferenceReductionSchemes, &kNoReductionScheme, 4),
              kSuccess);
    for (int operand = 0; operand < 4; ++operand) EXPECT_EQ(Claim(operand, 16), kSuccess);
    call_.algorithm = Choose();
  }
  ~FakeCublasLtTest() override {
    EXPECT_OK(stream_->Synchronize());
    if (call_.preference != nullptr) lt.preference_destroy(call_.preference);
    for (MatrixLayout* layout : {call_.a_layout, call_.b_layout, call_.d_layout}) lt.matrix_layout_destroy(layout);
    lt.matmul_desc_destroy(call_.desc);
    lt.destroy(call_.context);
    EXPECT_EQ(CountsOfFake().contexts + CountsOfFake().descriptions, 0);
    ResetFake();
    cuda::ResetFake();
  }

  // Says that an operand is aligned so.
  Result Claim(int operand, uint32_t alignment) {
    return lt.preference_set_attribute(call_.preference, kPreferenceMinAlignmentABytes + operand, &alignment, 4);
  }

  std::vector<HeuristicResult> Search(int wanted = 8) {
    std::vector<HeuristicResult> results(static_cast<size_t>(wanted));
    int count = 0;
    EXPECT_EQ(lt.algo_get_heuristic(call_.context, call_.desc, call_.a_layout, call_.b_layout, call_.d_layout,
                                    call_.d_layout, call_.preference, wanted, results.data(), &count),
              kSuccess);
    results.resize(static_cast<size_t>(count));
    return results;
  }
  Result Check(const Algorithm& algorithm) {
    HeuristicResult result;
    return lt.algo_check(call_.context, call_.desc, call_.a_layout, call_.b_layout, call_.d_layout, call_.d_layout,
                         &algorithm, &result);
  }
  // The first that may be used.
  Algorithm Choose() {
    for (const HeuristicResult& result : Search()) {
      if (result.state == kSuccess && Check(result.algorithm) == kSuccess) return result.algorithm;
    }
    ADD_FAILURE() << "no algorithm";
    return {};
  }

  // A call that is wrong in one thing is refused, and told.
  void ExpectViolation(const std::string& what, const std::function<void(Call&)>& change) {
    SCOPED_TRACE(what);
    EXPECT_THAT(ViolationsOfFake(), IsEmpty());
    Call call = call_;
    change(call);
    EXPECT_NE(call.Run(), kSuccess);
    EXPECT_THAT(ViolationsOfFake(), Contains(HasSubstr(what)));
    cuda::ResetFake();
  }

  std::unique_ptr<Device> device_;
  std::unique_ptr<Stream> stream_;
  Buffer a_, b_, d_, workspace_;
  Call call_;
};

TEST_F(FakeCublasLtTest, ARightCallMultipliesWhenItsStreamRuns) {
  DeviceArray<float> host = *DeviceArray<float>::Create(*device_, kSumPitch * kRows, MemoryKind::kPinned);
  DeviceArray<uint16_t> in = *DeviceArray<uint16_t>::Create(*device_, kInputs * kRows, MemoryKind::kPinned);
  std::fill_n(in.data(), in.size(), kOne);
  in.data()[kInputs] = 0x4040;  // Row 1 begins with a three.
  ASSERT_OK(stream_->Copy(call_.b, in.data(), in.size_in_bytes()));
  ASSERT_OK(stream_->Copy(call_.a, in.data() + 2 * kInputs, kOutputs * kInputs * 2 - 2 * kInputs * 2));
  ASSERT_OK(stream_->Copy(call_.a + (kOutputs - 2) * kInputs * 2, in.data() + 2 * kInputs, 2 * kInputs * 2));
  for (const float beta : {0.0f, 1.0f}) {
    call_.beta = beta;
    ASSERT_EQ(call_.Run(), kSuccess);
  }
  ASSERT_OK(stream_->Copy(host.data(), call_.d, host.size_in_bytes()));
  EXPECT_NE(host.data()[0], 32.0f) << "it has run before anybody waited";
  ASSERT_OK(stream_->Synchronize());
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t output = 0; output < kOutputs; ++output) {
      EXPECT_EQ(host.data()[row * kSumPitch + output], row == 1 ? 36.0f : 32.0f) << row << ", " << output;
    }
  }
  EXPECT_EQ(CountsOfFake().matmuls, 2);
  EXPECT_THAT(ViolationsOfFake(), IsEmpty());
}

TEST_F(FakeCublasLtTest, WhatIsOfferedFirstIsOfNoUse) {
  const std::vector<HeuristicResult> results = Search();
  ASSERT_GE(results.size(), 3u);
  EXPECT_NE(results[0].state, kSuccess);
  EXPECT_EQ(results[1].state, kSuccess);
  EXPECT_EQ(Check(results[1].algorithm), kNotSupported);
  EXPECT_EQ(Search(2).size(), 2u);
  // One that splits sums, for who allows it.
  const uint32_t all = 7;
  ASSERT_EQ(lt.preference_set_attribute(call_.preference, kPreferenceReductionSchemes, &all, 4), kSuccess);
  int32_t splits = 0;
  size_t written = 0;
  EXPECT_EQ(
      lt.algo_config_get_attribute(&Search()[1].algorithm, static_cast<int>(Property::kSplits), &splits, 4, &written),
      kSuccess);
  EXPECT_EQ(splits, 4);
  EXPECT_THAT(ViolationsOfFake(), IsEmpty());
  EXPECT_NE(lt.algo_config_get_attribute(&results[0].algorithm, 0, &splits, 4, &written), kSuccess);
  EXPECT_THAT(ViolationsOfFake(), Contains(HasSubstr("a property of no algorithm")));
  EXPECT_NE(lt.algo_config_get_attribute(&call_.algorithm, 0, &splits, 2, &written), kSuccess);
  EXPECT_THAT(ViolationsOfFake(), Contains(HasSubstr("property 0 of 2 bytes")));
}

TEST_F(FakeCublasLtTest, EachThingThatIsWrongIsTold) {
  MatrixLayout* wider = nullptr;
  ASSERT_EQ(lt.matrix_layout_create(&wider, kBFloat16, kInputs, kRows + 1, kInputs), kSuccess);
  MatrixLayout* narrow = nullptr;
  ASSERT_EQ(lt.matrix_layout_create(&narrow, kFloat32, kOutputs, kRows, kOutputs), kSuccess);
  MatrixLayout* floats = nullptr;
  ASSERT_EQ(lt.matrix_layout_create(&floats, kFloat32, kInputs, kOutputs, kInputs), kSuccess);
  MatmulDesc* plain = nullptr;
  ASSERT_EQ(lt.matmul_desc_create(&plain, kComputeFloat32, kFloat32), kSuccess);
  Context* gone = nullptr;
  ASSERT_EQ(lt.create(&gone), kSuccess);
  ASSERT_EQ(lt.destroy(gone), kSuccess);
  std::vector<char> host(2 * kWorkspace);

  ExpectViolation("what is no context", [&](Call& call) { call.context = gone; });
  ExpectViolation("what is no description of a product",
                  [](Call& call) { call.desc = reinterpret_cast<MatmulDesc*>(call.a_layout); });
  ExpectViolation("what is no layout", [](Call& call) { call.b_layout = reinterpret_cast<MatrixLayout*>(call.desc); });
  ExpectViolation("shapes that do not fit", [&](Call& call) { call.b_layout = wider; });
  ExpectViolation("columns every 5 numbers", [&](Call& call) { call.d_layout = narrow; });
  ExpectViolation("types or an order that it has not", [&](Call& call) { call.a_layout = floats; });
  ExpectViolation("types or an order that it has not", [&](Call& call) { call.desc = plain; });
  ExpectViolation("of no algorithm", [](Call& call) { call.algorithm = {}; });
  ExpectViolation("an algorithm that the device does not have", [](Call& call) { call.algorithm.data[1] = 8; });
  ExpectViolation("an algorithm for another shape", [](Call& call) { call.algorithm.data[3] += 2; });
  ExpectViolation("an algorithm for another shape", [](Call& call) { call.algorithm.data[1] ^= 1; });  // Its type.
  ExpectViolation("that does not pass the check", [](Call& call) { call.algorithm.data[7] = 0; });
  ExpectViolation("weights of 160 bytes that are not the device's", [&](Call& call) { call.a = host.data(); });
  ExpectViolation("inputs of 192 bytes that are not the device's", [](Call& call) { call.b += kWorkspace + 128; });
  ExpectViolation("sums of 180 bytes that are not the device's", [](Call& call) { call.d = nullptr; });
  ExpectViolation("weights that is not aligned to 16", [](Call& call) { call.a += 8; });
  ExpectViolation("inputs that is not aligned to 16", [](Call& call) { call.b += 2; });
  ExpectViolation("sums that is not aligned to 16", [](Call& call) { call.d += 4; });
  ExpectViolation("workspace that is not aligned to 256", [](Call& call) { call.workspace += 128; });
  ExpectViolation("a workspace of 1048575 bytes", [](Call& call) { --call.workspace_bytes; });
  ExpectViolation("writes to its inputs", [](Call& call) { call.d = call.b + 16; });
  ExpectViolation("writes to its weights", [](Call& call) { call.d = call.a; });
  ExpectViolation("writes to its workspace", [](Call& call) { call.d = call.workspace + 4096; });
  ExpectViolation("addends of 180 bytes that are not the device's", [&](Call& call) { call.c = host.data(); });
  ExpectViolation("whose workspace is its addends", [](Call& call) { call.c = call.workspace; });
  ExpectViolation("whose workspace is its inputs", [](Call& call) { call.b = call.workspace + 4096; });
  ExpectViolation("default stream", [](Call& call) { call.stream = nullptr; });
  EXPECT_EQ(call_.Run(), kSuccess);
  EXPECT_THAT(ViolationsOfFake(), IsEmpty());

  EXPECT_NE(lt.matmul_desc_set_attribute(plain, kDescTransA, &kTransposed, 8), kSuccess);
  EXPECT_NE(lt.preference_set_attribute(call_.preference, kPreferenceMaxWorkspaceBytes, &kTransposed, 4), kSuccess);
  EXPECT_NE(lt.matrix_layout_destroy(reinterpret_cast<MatrixLayout*>(plain)), kSuccess);
  EXPECT_NE(lt.destroy(gone), kSuccess);
  EXPECT_THAT(ViolationsOfFake(), ::testing::ElementsAre(HasSubstr("attribute 3 of 8 bytes, not 4"),
                                                         HasSubstr("attribute 1 of 4 bytes, not 8"),
                                                         HasSubstr("what is no layout"), HasSubstr("no context")));
  for (MatrixLayout* layout : {wider, narrow, floats}) EXPECT_EQ(lt.matrix_layout_destroy(layout), kSuccess);
  EXPECT_EQ(lt.matmul_desc_destroy(plain), kSuccess);
}

// The library chooses by what it is told, and assumes 256 bytes where it is told nothing: memory must be aligned so.
TEST_F(FakeCublasLtTest, MemoryIsAlignedAsTheSearchWasTold) {
  struct Operand {
    const char* name;
    char* Call::*memory;
  };
  const Operand operands[] = {{"weights", &Call::a}, {"inputs", &Call::b}, {"addends", &Call::c}, {"sums", &Call::d}};
  call_.c = call_.d;
  for (int operand = 0; operand < 4; ++operand) {
    const Operand& of = operands[operand];
    for (const uint32_t alignment : {32u, 64u, 128u, 256u}) {
      ASSERT_EQ(Claim(operand, alignment), kSuccess);
      Call call = call_;
      call.algorithm = Choose();
      call.*of.memory += alignment;
      EXPECT_EQ(call.Run(), kSuccess) << of.name << " at " << alignment;
      ExpectViolation(absl::StrCat(of.name, " that is not aligned to ", alignment), [&](Call& wrong) {
        wrong.algorithm = call.algorithm;
        wrong.*of.memory += alignment / 2;
      });
    }
    ASSERT_EQ(Claim(operand, 16), kSuccess);
  }
  call_.c = nullptr;
  Preference* silent = nullptr;
  ASSERT_EQ(lt.preference_create(&silent), kSuccess);
  const uint64_t bytes = kWorkspace;
  ASSERT_EQ(lt.preference_set_attribute(silent, kPreferenceMaxWorkspaceBytes, &bytes, 8), kSuccess);
  std::swap(silent, call_.preference);
  const Algorithm strict = Choose();
  std::swap(silent, call_.preference);
  EXPECT_EQ(lt.preference_destroy(silent), kSuccess);
  ExpectViolation("inputs that is not aligned to 256", [&](Call& call) { call.algorithm = strict, call.b += 128; });
  for (const uint32_t none : {8u, 48u, 512u}) {
    EXPECT_EQ(Claim(0, none), kNotSupported);
    EXPECT_THAT(ViolationsOfFake(), Contains(HasSubstr(absl::StrCat("an alignment to ", none, " bytes"))));
  }
}

TEST_F(FakeCublasLtTest, ASearchInAStepIsAViolation) {
  {
    const StepWatch watch;
    EXPECT_FALSE(Search().empty());
  }
  EXPECT_THAT(ViolationsOfFake(), Contains(HasSubstr("an algorithm is looked for in a step")));
}

TEST_F(FakeCublasLtTest, AWorkspaceIsOverwritten) {
  DeviceArray<char> host = *DeviceArray<char>::Create(*device_, kWorkspace, MemoryKind::kPinned);
  ASSERT_OK(stream_->Zero(call_.workspace, kWorkspace));
  ASSERT_EQ(call_.Run(), kSuccess);
  ASSERT_OK(stream_->Copy(host.data(), call_.workspace, kWorkspace));
  ASSERT_OK(stream_->Synchronize());
  EXPECT_EQ(host.data()[0], '\xff');
  EXPECT_EQ(host.data()[kWorkspace - 1], '\xff');
}

TEST_F(FakeCublasLtTest, FaultsComeWhereTheyAreWanted) {
  FakeFaults faults;
  faults.no_memory_at = 1;
  faults.fail_at = 2;
  ResetFake(faults);
  for (const Result expected : {kSuccess, kAllocFailed, kExecutionFailed, kExecutionFailed}) {
    EXPECT_EQ(call_.Run(), expected);
  }
  ASSERT_OK_AND_ASSIGN(faults, ParseFakeFaults("fail_at=0,fail_with=15"));
  ResetFake(faults);
  EXPECT_EQ(call_.Run(), kNotSupported);
  EXPECT_THAT(ParseFakeFaults("fails_at=0").status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("fails_at=0")));
  faults = {};
  faults.slow = absl::Milliseconds(3);
  ResetFake(faults);
  const absl::Time begin = absl::Now();
  EXPECT_EQ(call_.Run(), kSuccess);
  EXPECT_OK(stream_->Synchronize());
  EXPECT_GE(absl::Now() - begin, absl::Milliseconds(3));
  faults = {};
  faults.checks_fail = true;
  ResetFake(faults);
  EXPECT_EQ(Check(call_.algorithm), kNotSupported);
  faults.no_algorithm = true;
  ResetFake(faults);
  HeuristicResult result;
  int count = 0;
  const auto search = [&] {
    return lt.algo_get_heuristic(call_.context, call_.desc, call_.a_layout, call_.b_layout, call_.d_layout,
                                 call_.d_layout, call_.preference, 1, &result, &count);
  };
  EXPECT_EQ(search(), kNotSupported);
  faults = {};
  faults.workspace_bytes = kWorkspace + 1;
  ResetFake(faults);
  EXPECT_EQ(search(), kNotSupported);
  faults.no_driver = true;
  ResetFake(faults);
  Context* context = nullptr;
  EXPECT_EQ(lt.create(&context), kNotInitialized);
  EXPECT_EQ(context, nullptr);
}

}  // namespace
}  // namespace rwkv::kernels::cuda::cublaslt
