// Products by cuBLASLt on the emulated device: when algorithms are chosen, what a family is called, that a step neither
// allocates nor searches, graphs, and what becomes of the library's errors.
#include "kernels/cuda/library_products.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/api/op_table.h"
#include "kernels/base/device.h"
#include "kernels/base/repeating_stream.h"
#include "kernels/base/weight.h"
#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/testing/emulated_cuda.h"
#include "kernels/cuda/testing/fake_cublaslt.h"
#include "kernels/cuda/testing/fake_runtime.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::kernels::cuda {
namespace {

using ::rwkv::testing::StatusIs;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::SizeIs;
using ::testing::StartsWith;

constexpr int64_t kInputs = 40, kOutputs = 36;
const std::string kName(kEmulatedLibraryDevice);

class LibraryProductsTest : public ::testing::Test {
 protected:
  LibraryProductsTest() {
    ResetFake();
    cublaslt::ResetFake();
    Open();
  }
  ~LibraryProductsTest() override {
    weight_ = {};
    SetEager(false);
    ResetFake();
    cublaslt::ResetFake();
  }

  void Open() {
    device_ = *OpenEmulatedDevice(kName);
    stream_ = *device_->NewStream();
    const MatrixView matrix = {DType::kBFloat16, kOutputs, kInputs, file_.data()};
    weight_ = *device_->Load(matrix, WeightUse::kProduct);
    x_ = *DeviceArray<float>::Create(*device_, kMost * kInputs);
    y_ = *DeviceArray<float>::Create(*device_, kMost * kOutputs);
    host_ = *DeviceArray<float>::Create(*device_, kMost * kOutputs, MemoryKind::kPinned);
    EXPECT_OK(stream_->Zero(x_.data(), x_.size_in_bytes()));
    EXPECT_OK(stream_->Synchronize());
  }

  absl::Status Multiply(int64_t rows, Activation activation = Activation::kSigmoid) {
    Product product;
    product.weight = &weight_;
    product.x = x_.data();
    product.activation = activation;
    product.y = y_.data();
    return device_->ops().products({rows, &product, 1}, *stream_);
  }

  static constexpr int64_t kMost = 40;
  const std::vector<uint16_t> file_ = std::vector<uint16_t>(kOutputs * kInputs, 0x3f80);
  std::unique_ptr<Device> device_;
  std::unique_ptr<Stream> stream_;
  Weight weight_;
  DeviceArray<float> x_, y_, host_;
};

TEST_F(LibraryProductsTest, BucketsGrowByHalfAndByAThird) {
  EXPECT_THAT(LibraryBuckets(128), ElementsAre(128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096));
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<LibraryProducts> products,
                       LibraryProducts::Create(cublaslt::kFakeCublasLt, "cuda:0", 128));
  for (const auto& [rows, bucket] : std::vector<std::pair<int64_t, int64_t>>{
           {1, 128}, {128, 128}, {129, 192}, {192, 192}, {193, 256}, {3073, 4096}, {4096, 4096}}) {
    EXPECT_EQ(products->BucketOf(rows), bucket) << rows;
  }
  const MatrixView bf16 = {DType::kBFloat16, 96, 64};
  EXPECT_FALSE(products->Takes(bf16, 127));
  EXPECT_TRUE(products->Takes(bf16, 128));
  EXPECT_FALSE(products->Takes({DType::kFloat32, 96, 64}, 128));
  MatrixView codes = {DType::kFloat16, 96, 64};
  codes.quantization = Quantization::kInt8;
  EXPECT_FALSE(products->Takes(codes, 128));
}

// Sums of the vocabulary for 4096 rows would be a gigabyte.
TEST_F(LibraryProductsTest, AlgorithmsAreChosenWhenAWeightIsLoadedAsManyAsSumsMayTakeMemory) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<LibraryProducts> products,
                       LibraryProducts::Create(cublaslt::kFakeCublasLt, "cuda:0", 128));
  cublaslt::ResetFake();
  const MatrixView head = {DType::kFloat16, 65536, 100};
  ASSERT_OK(products->Choose(head));
  EXPECT_EQ(cublaslt::CountsOfFake().searches, 7);
  const std::vector<std::string> choices = products->Choices(head);
  ASSERT_THAT(choices, SizeIs(7));
  EXPECT_THAT(choices[0], StartsWith("65536 outputs of 112 inputs (fp16), 128 rows: algorithm "));
  EXPECT_THAT(choices[6], HasSubstr(", 1024 rows: "));
  ASSERT_OK(products->Choose(head));
  EXPECT_EQ(cublaslt::CountsOfFake().searches, 7) << "once for a shape";
  ASSERT_OK(products->Choose({DType::kFloat32, 10, 100}));
  EXPECT_EQ(cublaslt::CountsOfFake().searches, 7);

  ASSERT_OK(products->Choose({DType::kBFloat16, 96, 64}));
  const std::vector<std::string> all = products->AllChoices();
  ASSERT_THAT(all, SizeIs(2)) << "a line a shape";
  EXPECT_THAT(all[0], StartsWith("65536 outputs of 112 inputs (fp16): 128 rows: algorithm "));
  EXPECT_THAT(all[0], AllOf(HasSubstr("; 1024 rows: algorithm "), Not(HasSubstr("; 1536 rows"))));
  EXPECT_THAT(all[1], AllOf(StartsWith("96 outputs of 64 inputs (bf16): 128 rows: "), HasSubstr("; 4096 rows: ")));
}

TEST_F(LibraryProductsTest, TheFamilyNamesTheVersionAndTheChoices) {
  const std::string family(device_->numeric_family());
  EXPECT_THAT(family, ::testing::MatchesRegex("cuda/tensor/sm_90/lt-130100-[0-9a-f]{16}"));
  const auto family_with = [&](auto change) {
    cublaslt::FakeFaults faults;
    change(faults);
    cublaslt::ResetFake(faults);
    return std::string((*OpenEmulatedDevice(kName))->numeric_family());
  };
  EXPECT_EQ(family_with([](cublaslt::FakeFaults&) {}), family);
  EXPECT_NE(family_with([](cublaslt::FakeFaults& f) { f.other_choice = 1; }), family);
  EXPECT_THAT(family_with([](cublaslt::FakeFaults& f) { f.version = 130200; }), HasSubstr("/lt-130200-"));
  EXPECT_EQ(family_with([](cublaslt::FakeFaults& f) { f.offers_splits = true; }), family)
      << "what splits sums is chosen, though the law of a bucket forbids it";
  cublaslt::ResetFake();
  // A model loaded or not.
  EXPECT_EQ((*OpenEmulatedDevice(kName))->numeric_family(), family);
  EXPECT_EQ(device_->numeric_family(), family);
  EXPECT_THAT(std::string((*OpenEmulatedDevice("cuda/emulated/half/serial/lt/launches"))->numeric_family()),
              AllOf(StartsWith(family), HasSubstr("/half_states")));
}

TEST_F(LibraryProductsTest, OnlyManyRowsAreTheLibrarysInOneCallOrSeveral) {
  ASSERT_OK(Multiply(kEmulatedLibraryRows - 1));
  EXPECT_EQ(cublaslt::CountsOfFake().matmuls, 0);
  ASSERT_OK(Multiply(kEmulatedLibraryRows));
  EXPECT_EQ(cublaslt::CountsOfFake().matmuls, 1);
  ASSERT_OK(stream_->Synchronize());
  EXPECT_THAT(ViolationsOfFake(), IsEmpty());
}

// More rows than a call has: each with an input, an output and a gate of its own.
TEST_F(LibraryProductsTest, ManyRowsAreSeveralCalls) {
  const int64_t rows = kMostLibraryRows + 1;
  x_ = *DeviceArray<float>::Create(*device_, rows * kInputs);
  y_ = *DeviceArray<float>::Create(*device_, rows * kOutputs);
  const auto gate = *DeviceArray<float>::Create(*device_, rows * kOutputs);
  const auto in = *DeviceArray<float>::Create(*device_, rows * kInputs, MemoryKind::kPinned);
  host_ = *DeviceArray<float>::Create(*device_, rows * kOutputs, MemoryKind::kPinned);
  for (int64_t i = 0; i < in.size(); ++i) in.data()[i] = static_cast<float>(i / kInputs % 3);
  for (int64_t i = 0; i < host_.size(); ++i) host_.data()[i] = static_cast<float>(i / kOutputs);
  ASSERT_OK(stream_->Copy(x_.data(), in.data(), in.size_in_bytes()));
  ASSERT_OK(stream_->Copy(gate.data(), host_.data(), host_.size_in_bytes()));
  Product product;
  product.weight = &weight_;
  product.x = x_.data();
  product.gate = gate.data();
  product.y = y_.data();
  ASSERT_OK(device_->ops().products({rows, &product, 1}, *stream_));
  EXPECT_EQ(cublaslt::CountsOfFake().matmuls, 2);
  ASSERT_OK(stream_->Synchronize());
  ASSERT_OK(stream_->Copy(host_.data(), y_.data(), host_.size_in_bytes()));
  ASSERT_OK(stream_->Synchronize());
  for (int64_t i = 0; i < host_.size(); i += kOutputs - 1) {
    const int64_t row = i / kOutputs;
    ASSERT_EQ(host_.data()[i], static_cast<float>(row % 3 * kInputs * row)) << "row " << row;
  }
  EXPECT_THAT(ViolationsOfFake(), IsEmpty());
}

TEST_F(LibraryProductsTest, SumsGoWhereTheyAreWantedIfTheyFit) {
  const auto launches = [&](int64_t rows, Activation activation) {
    TakeLaunchesOfFake();
    EXPECT_OK(Multiply(rows, activation));
    std::vector<std::string> names;
    for (const FakeLaunch& launch : TakeLaunchesOfFake()) names.push_back(launch.name);
    return names;
  };
  EXPECT_THAT(launches(6, Activation::kNone), ElementsAre("round_inputs", "cublaslt_matmul"));
  EXPECT_THAT(launches(5, Activation::kNone), ElementsAre("round_inputs", "cublaslt_matmul", "finish_product"));
  EXPECT_THAT(launches(6, Activation::kTanh), ElementsAre("round_inputs", "cublaslt_matmul", "finish_product"));
  EXPECT_THAT(launches(3, Activation::kNone), ElementsAre("rounded_products"));
  ASSERT_OK(stream_->Synchronize());
}

// The library is told that matrices are aligned to 16 bytes: who wants sums elsewhere gets them by way of scratch
// memory, and nobody gets more than he wants.
TEST_F(LibraryProductsTest, InputsAndSumsMayLieAnywhere) {
  constexpr int64_t kRows = 6, kRoom = 24;  // Floats around what is read and written.
  const int64_t in_count = kRows * kInputs, out_count = kRows * kOutputs;
  const auto in = *DeviceArray<float>::Create(*device_, in_count, MemoryKind::kPinned);
  const auto old = *DeviceArray<float>::Create(*device_, out_count + kRoom, MemoryKind::kPinned);
  const auto x = *DeviceArray<float>::Create(*device_, in_count + kRoom);
  const auto y = *DeviceArray<float>::Create(*device_, out_count + kRoom);
  for (int64_t i = 0; i < in_count; ++i) in.data()[i] = static_cast<float>(i % 7);
  for (int64_t i = 0; i < old.size(); ++i) old.data()[i] = static_cast<float>(i);
  std::vector<float> first;
  for (const bool accumulate : {false, true}) {
    for (const int64_t offset : {0, 1, 2, 3, 4, 8, 12, 20}) {
      SCOPED_TRACE(absl::StrCat(offset, accumulate ? ", added" : ""));
      Product product;
      product.weight = &weight_;
      product.x = x.data() + offset;
      product.y = y.data() + offset;
      product.accumulate = accumulate;
      ASSERT_OK(stream_->Copy(x.data() + offset, in.data(), in.size_in_bytes()));
      ASSERT_OK(stream_->Copy(y.data(), old.data(), old.size_in_bytes()));
      TakeLaunchesOfFake();
      ASSERT_OK(device_->ops().products({kRows, &product, 1}, *stream_));
      EXPECT_THAT(TakeLaunchesOfFake(), SizeIs(offset % 4 == 0 ? 2 : 3)) << "an epilogue only where it must be";
      ASSERT_OK(stream_->Copy(host_.data(), y.data(), y.size_in_bytes()));
      ASSERT_OK(stream_->Synchronize());
      std::vector<float> sums(host_.data() + offset, host_.data() + offset + out_count);
      for (int64_t i = 0; i < out_count && accumulate; ++i) sums[i] -= static_cast<float>(i + offset);
      if (first.empty()) first = sums;
      EXPECT_EQ(sums, first);  // Whole numbers: no sum rounds.
      for (int64_t i = 0; i < old.size(); ++i) {
        if (i >= offset && i < offset + out_count) continue;
        EXPECT_EQ(host_.data()[i], static_cast<float>(i)) << "beside what was asked for";
      }
      EXPECT_THAT(ViolationsOfFake(), IsEmpty());
    }
  }
  float sum = 0;
  for (int64_t k = 0; k < kInputs; ++k) sum += in.data()[k];
  EXPECT_EQ(first[0], sum);  // All weights are one.
}

TEST_F(LibraryProductsTest, AStepNeitherAllocatesNorSearchesNorWaits) {
  ASSERT_OK(Multiply(kMost));
  ASSERT_OK(stream_->Synchronize());
  const int64_t searches = cublaslt::CountsOfFake().searches;
  {
    const StepWatch watch;
    for (const int64_t rows : {1, 4, 5, 40, 17}) ASSERT_OK(Multiply(rows));
  }
  ASSERT_OK(stream_->Synchronize());
  EXPECT_EQ(cublaslt::CountsOfFake().searches, searches);
  EXPECT_THAT(ViolationsOfFake(), IsEmpty());
}

TEST_F(LibraryProductsTest, AGraphOfItHasKernelsAloneAndTheBitsOfLaunches) {
  const int64_t key[] = {7};
  for (const bool eager : {false, true}) {
    SetEager(eager);
    std::vector<std::vector<float>> results;
    for (int time = 0; time < 4; ++time) {
      ASSERT_OK(stream_->Repeat(key, [&] { return Multiply(7, Activation::kTanh); }));
      ASSERT_OK(stream_->Copy(host_.data(), y_.data(), 7 * kOutputs * 4));
      ASSERT_OK(stream_->Synchronize());
      results.emplace_back(host_.data(), host_.data() + 7 * kOutputs);
      EXPECT_EQ(results.back(), results.front());
    }
  }
  EXPECT_GE(CountsOfFake().graph_launches, 6);
  EXPECT_EQ(CountsOfFake().graph_copies, 0);
  EXPECT_THAT(ViolationsOfFake(), IsEmpty());
}

TEST_F(LibraryProductsTest, AGraphThatCannotBeMadeBreaksNothing) {
  auto* const repeating = dynamic_cast<RepeatingStream*>(stream_.get());
  ASSERT_NE(repeating, nullptr);
  const int64_t key[] = {7};
  ASSERT_OK(Multiply(7));
  ASSERT_OK(stream_->Synchronize());
  cublaslt::FakeFaults faults;
  faults.fail_at = 0;
  cublaslt::ResetFake(faults);
  repeating->Prepare(key, [&] { return Multiply(7); });
  EXPECT_EQ(repeating->repeated().failures, 1);
  cublaslt::ResetFake();
  EXPECT_OK(stream_->Synchronize());
  EXPECT_OK(stream_->Repeat(key, [&] { return Multiply(7); }));
  EXPECT_OK(stream_->Synchronize());
}

TEST_F(LibraryProductsTest, ErrorsOfTheLibraryAreToldInWords) {
  const auto with = [](auto change) {
    cublaslt::FakeFaults faults;
    change(faults);
    cublaslt::ResetFake(faults);
  };
  with([](cublaslt::FakeFaults& f) { f.no_memory_at = 0, f.fail_at = 1; });
  EXPECT_THAT(Multiply(4), StatusIs(absl::StatusCode::kResourceExhausted,
                                    HasSubstr("cublasLtMatmul of 36 outputs of 48 inputs (bf16), 4 rows: "
                                              "CUBLAS_STATUS_ALLOC_FAILED")));
  ASSERT_OK(stream_->Synchronize()) << "memory may be there the next time";
  const auto is_failure = StatusIs(absl::StatusCode::kInternal,
                                   HasSubstr("cuda/emulated/lt: cublasLtMatmul of 36 outputs of 48 inputs (bf16), 5 "
                                             "rows: CUBLAS_STATUS_EXECUTION_FAILED"));
  EXPECT_THAT(Multiply(5), is_failure);
  with([](cublaslt::FakeFaults&) {});
  EXPECT_OK(Multiply(6));
  EXPECT_THAT(stream_->Synchronize(), is_failure) << "the first failure stays";
  stream_ = *device_->NewStream();
  EXPECT_OK(stream_->Synchronize());

  const MatrixView other = {DType::kBFloat16, 8, kInputs, file_.data()};
  with([](cublaslt::FakeFaults& f) { f.no_algorithm = true; });
  EXPECT_THAT(device_->Load(other, WeightUse::kProduct).status(),
              StatusIs(absl::StatusCode::kUnimplemented,
                       HasSubstr("cublasLtMatmulAlgoGetHeuristic for 8 outputs of 48 inputs (bf16), 4 rows: "
                                 "CUBLAS_STATUS_NOT_SUPPORTED")));
  EXPECT_OK(device_->Load(other, WeightUse::kRows).status()) << "rows are looked up, not multiplied";
  EXPECT_THAT(OpenEmulatedDevice(kName).status(), StatusIs(absl::StatusCode::kUnimplemented));
  with([](cublaslt::FakeFaults& f) { f.checks_fail = true; });
  EXPECT_THAT(device_->Load(other, WeightUse::kProduct).status(),
              StatusIs(absl::StatusCode::kUnimplemented,
                       AllOf(HasSubstr("none of 4 candidates will do for 8 outputs of 48 inputs (bf16), 4 rows"),
                             HasSubstr("cublasLtMatmulAlgoCheck: CUBLAS_STATUS_NOT_SUPPORTED"))));
  with([](cublaslt::FakeFaults& f) { f.workspace_bytes = kLibraryWorkspaceBytes + 1; });
  EXPECT_THAT(device_->Load(other, WeightUse::kProduct).status(), StatusIs(absl::StatusCode::kUnimplemented));
  with([](cublaslt::FakeFaults& f) { f.no_driver = true; });
  EXPECT_THAT(OpenEmulatedDevice(kName).status(),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("cublasLtCreate: CUBLAS_STATUS_NOT_INITIALIZED")));
  const cublaslt::FakeCounts counts = cublaslt::CountsOfFake();
  EXPECT_EQ(counts.contexts, 1) << "those of devices that did not open are gone";
  EXPECT_THAT(ViolationsOfFake(), IsEmpty());
}

// Its own library is found, or the device is refused with its name: there is no way around it.
TEST_F(LibraryProductsTest, WithoutTheLibraryTheDeviceIsRefused) {
  DeviceOptions options;
  options.products_by = ProductsBy::kLibrary;
  const absl::Status status = OpenDevice(kFakeRuntime, kEmulatedKernels, 0, "cuda:0/lt", options).status();
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kUnimplemented, AllOf(HasSubstr("cuda:0/lt"), HasSubstr("cuBLASLt"))));
}

TEST_F(LibraryProductsTest, TheDevicesEndLeavesNothing) {
  stream_.reset();
  weight_ = {};
  for (DeviceArray<float>* array : {&x_, &y_, &host_}) *array = {};
  device_.reset();
  EXPECT_EQ(cublaslt::CountsOfFake().contexts, 0);
  EXPECT_EQ(cublaslt::CountsOfFake().descriptions, 0);
  EXPECT_EQ(CountsOfFake().allocated_bytes, 0);
}

}  // namespace
}  // namespace rwkv::kernels::cuda
