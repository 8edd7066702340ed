// nvcc's build of the kernels, run as the PTX that nvcc wrote, has the bits of the other build: each primitive of
// device.cuh, products with every kind of weights, and whole models of every version, with what is drawn of them.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/api/op_table.h"
#include "kernels/api/products.h"
#include "kernels/base/device.h"
#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/kernel_set.h"
#include "kernels/cuda/testing/emulated_cuda.h"
#include "kernels/cuda/testing/fake_cublaslt.h"
#include "kernels/cuda/testing/fake_runtime.h"
#include "kernels/cuda/testing/nvcc_kernels.h"
#include "kernels/cuda/testing/probes.h"
#include "rwkv/v1/worker.pb.h"
#include "services/checkpoint/model_tensors.h"
#include "services/worker/testing/test_engine.h"
#include "tests/testing/random_model.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

namespace cuda = ::rwkv::kernels::cuda;
using ::rwkv::checkpoint::ModelVersion;
using ::testing::IsEmpty;

// "cuda/emulated" and what follows it; by nvcc's kernels in place of the others.
std::unique_ptr<kernels::Device> OpenNvccs(absl::string_view name) {
  absl::string_view rest = name;
  cuda::DeviceOptions options = cuda::TakeOptions(rest);
  options.library = &cuda::cublaslt::kFakeCublasLt;
  options.library_rows = cuda::kEmulatedLibraryRows;
  return *cuda::OpenDevice(cuda::kFakeRuntime, cuda::kDeviceKernels, 0, name, options);
}

class PtxTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    std::vector<std::string> paths;
    for (const auto& file : std::filesystem::recursive_directory_iterator(
             absl::StrCat(std::getenv("TEST_SRCDIR"), "/", std::getenv("TEST_WORKSPACE"), "/kernels/cuda"))) {
      if (file.path().extension() == ".ptx") paths.push_back(file.path());
    }
    ASSERT_OK(cuda::LoadPtx(paths));
  }
  PtxTest() { cuda::ResetFake(); }
  ~PtxTest() override { EXPECT_THAT(cuda::ViolationsOfFake(), IsEmpty()); }
};

bool Same(float a, float b) { return std::memcmp(&a, &b, sizeof(a)) == 0 || (std::isnan(a) && std::isnan(b)); }

TEST_F(PtxTest, EveryPrimitiveIsTheEmulations) {
  constexpr int kBlocks = 3;
  const std::unique_ptr<kernels::Device> device = OpenNvccs("cuda/emulated");
  const std::unique_ptr<kernels::Stream> stream = *device->NewStream();
  constexpr int64_t kCount = int64_t{kBlocks} * cuda::kProbeThreads;
  using Floats = kernels::DeviceArray<float>;
  const Floats host = *Floats::Create(*device, kCount, kernels::MemoryKind::kPinned);
  const Floats in = *Floats::Create(*device, kCount);
  const Floats out = *Floats::Create(*device, kCount * cuda::kProbeOutputs);
  const Floats results = *Floats::Create(*device, 2 * out.size(), kernels::MemoryKind::kPinned);
  std::mt19937 random(7);
  for (int p = 0; p < cuda::kProbes; ++p) {
    for (int64_t i = 0; i < kCount; ++i) {
      const auto bits = static_cast<uint32_t>(random());
      host.data()[i] = static_cast<float>(bits >> 8) * 0x1p-20f - 8.0f;
      if (p < 3 && i % 2 == 1) std::memcpy(&host.data()[i], &bits, sizeof(bits));  // Any float.
      if (p < 3 && i % 8 == 1) host.data()[i] = std::copysign(i % 16 == 1 ? NAN : INFINITY, i % 32 < 16 ? 1.0f : -1.0f);
    }
    ASSERT_OK(stream->Copy(in.data(), host.data(), in.size_in_bytes()));
    const cuda::ProbeSet* const sets[] = {&cuda::kDeviceProbes, &cuda::kEmulatedProbes};
    for (int s = 0; s < 2; ++s) {
      ASSERT_EQ(sets[s]->probe(static_cast<cuda::Probe>(p), in.data(), out.data(), kBlocks,
                               static_cast<cuda::StreamHandle>(stream->handle())),
                0);
      ASSERT_OK(stream->Copy(results.data() + s * out.size(), out.data(), out.size_in_bytes()));
    }
    ASSERT_OK(stream->Synchronize());
    for (int64_t i = 0; i < out.size(); ++i) {
      ASSERT_TRUE(Same(results.data()[i], results.data()[i + out.size()]))
          << "probe " << p << ", thread " << i / cuda::kProbeOutputs << ", output " << i % cuda::kProbeOutputs << ": "
          << results.data()[i] << ", " << results.data()[i + out.size()];
    }
  }
}

struct Storage {
  std::string name;
  kernels::DType dtype;
  kernels::Quantization quantization = kernels::Quantization::kNone;
  int64_t group = 0;
  bool has_minimums = false;
};

// y of a product on a device.
std::vector<float> Multiply(kernels::Device& device, const kernels::MatrixView& matrix, int64_t rows, int64_t offset,
                            uint32_t seed) {
  const std::unique_ptr<kernels::Stream> stream = *device.NewStream();
  const kernels::Weight weight = *device.Load(matrix, kernels::WeightUse::kProduct);
  using Floats = kernels::DeviceArray<float>;
  const Floats host = *Floats::Create(device, rows * std::max(matrix.rows, matrix.cols), kernels::MemoryKind::kPinned);
  const Floats x = *Floats::Create(device, rows * matrix.cols + offset);
  const Floats y = *Floats::Create(device, rows * matrix.rows);
  const Floats bias = *Floats::Create(device, matrix.rows);
  std::mt19937 random(seed);
  for (int64_t i = 0; i < host.size(); ++i) host.data()[i] = static_cast<float>(random() >> 8) * 0x1p-22f - 2.0f;
  EXPECT_OK(stream->Copy(x.data() + offset, host.data(), rows * matrix.cols * 4));
  EXPECT_OK(stream->Copy(y.data(), host.data(), y.size_in_bytes()));
  EXPECT_OK(stream->Copy(bias.data(), host.data(), bias.size_in_bytes()));
  EXPECT_OK(stream->Synchronize());  // The host's memory is used again.
  kernels::Product product;
  product.weight = &weight;
  product.x = x.data() + offset;
  product.y = y.data();
  product.bias = bias.data();
  product.activation = kernels::Activation::kSilu;
  product.accumulate = true;
  EXPECT_OK(device.ops().products({rows, &product, 1}, *stream));
  EXPECT_OK(stream->Copy(host.data(), y.data(), y.size_in_bytes()));
  EXPECT_OK(stream->Synchronize());
  return {host.data(), host.data() + y.size()};
}

TEST_F(PtxTest, ProductsWithEveryKindOfWeights) {
  using kernels::DType;
  using kernels::Quantization;
  const Storage storages[] = {{"fp32", DType::kFloat32},
                              {"bf16", DType::kBFloat16},
                              {"fp16", DType::kFloat16},
                              {"int8", DType::kFloat16, Quantization::kInt8, 64},
                              {"int8_32", DType::kFloat16, Quantization::kInt8, 32, true},
                              {"int4", DType::kFloat16, Quantization::kInt4, 64, true},
                              {"int4_32", DType::kFloat16, Quantization::kInt4, 32, true}};
  std::mt19937 random(3);
  for (const char* by : {"", "/fma", "/rounded", "/lt"}) {
    const std::string name = absl::StrCat("cuda/emulated", by);
    const std::unique_ptr<kernels::Device> nvccs = OpenNvccs(name);
    const std::unique_ptr<kernels::Device> emulated = *cuda::OpenEmulatedDevice(name);
    for (const Storage& storage : storages) {
      for (const int64_t rows : {1, 3, 7, 13, 19}) {
        for (const int64_t inputs : {100, 203}) {
          SCOPED_TRACE(absl::StrCat(name, ", ", storage.name, ", ", rows, " rows, ", inputs, " inputs"));
          constexpr int64_t kOutputs = 37;
          std::vector<uint32_t> memory(static_cast<size_t>(kOutputs * (inputs + 1)));
          for (uint32_t& word : memory) word = static_cast<uint32_t>(random()) & 0x3fff3fffu;  // Floats below 2.
          std::vector<uint16_t> scales(static_cast<size_t>(kOutputs * inputs));
          for (uint16_t& scale : scales) scale = static_cast<uint16_t>(0x2000 + random() % 0x800);
          kernels::MatrixView matrix = {storage.dtype, kOutputs, inputs, memory.data()};
          matrix.quantization = storage.quantization;
          matrix.group = storage.group;
          if (storage.group != 0) matrix.scales = scales.data();
          if (storage.has_minimums) matrix.minimums = scales.data() + 1;
          const int64_t offset = rows == 7 ? 1 : 0;  // Once it is aligned to nothing.
          EXPECT_EQ(Multiply(*nvccs, matrix, rows, offset, 5), Multiply(*emulated, matrix, rows, offset, 5));
        }
      }
    }
  }
}

struct Model {
  std::string name;
  std::string device;
  testing::RandomModelOptions options;
};

std::vector<Model> Models() {
  std::vector<Model> models;
  const auto add = [&](const char* name, const char* device,
                       const std::function<void(testing::RandomModelOptions&)>& change) {
    Model model = {name, absl::StrCat("cuda/emulated", device), {}};
    model.options.width = 32;
    model.options.head_size = 16;
    model.options.decay_rank = model.options.iclr_rank = model.options.value_residual_rank = 8;
    model.options.gate_rank = 16;
    change(model.options);
    models.push_back(model);
  };
  using M = testing::RandomModelOptions;
  add("v4", "", [](M& m) { m.version = ModelVersion::k4; });
  add("v5_2", "/half", [](M& m) { m.version = ModelVersion::k5_2; });
  add("v6", "", [](M& m) { m.version = ModelVersion::k6; });
  add("v6_half_wide", "/half", [](M& m) { m.version = ModelVersion::k6, m.width = 128, m.head_size = 64; });
  add("v7", "", [](M&) {});
  add("v7_half", "/half", [](M& m) { m.width = 64, m.head_size = 64; });
  add("v7_wide", "/rounded", [](M& m) { m.width = 128, m.head_size = 64; });
  add("v7_odd", "/fma", [](M& m) { m.width = 51, m.head_size = 17; });
  add("v7_fp32", "/launches", [](M& m) { m.dtype = kernels::DType::kFloat32, m.head_size = 32; });
  add("v7_fp16", "/lt", [](M& m) { m.dtype = kernels::DType::kFloat16; });
  add("v7_heads_of_128", "/serial", [](M& m) { m.width = 128, m.head_size = 128; });
  add("v6_heads_of_128", "", [](M& m) { m.version = ModelVersion::k6, m.width = 128, m.head_size = 128; });
  // Heads that fill no whole kernel, and RWKV-7b's attention in each of its sizes.
  add("v6_heads_of_20", "", [](M& m) { m.version = ModelVersion::k6, m.width = 40, m.head_size = 20; });
  add("v6_heads_of_48", "", [](M& m) { m.version = ModelVersion::k6, m.width = 48, m.head_size = 48; });
  add("v7_heads_of_48", "", [](M& m) { m.width = 48, m.head_size = 48; });
  for (const int64_t query_width : {500, 1100, 2100}) {
    add("v7b_wide_queries", "",
        [=](M& m) { m.version = ModelVersion::k7b, m.query_width = query_width, m.layers = 1; });
  }
  add("v7a", "", [](M& m) { m.version = ModelVersion::k7a; });
  add("v7b", "", [](M& m) { m.version = ModelVersion::k7b; });
  return models;
}

// Everything that comes out of prompts and of steps behind them.
std::vector<std::string> Outcomes(const std::string& path, const TestEngineOptions& options) {
  EnginePipeline engine(path, 1, options);
  std::vector<std::string> outcomes;
  const auto keep = [&](const absl::StatusOr<StepOutput>& output) {
    ASSERT_OK(output.status());
    for (uint64_t sequence = 1; sequence <= 3; ++sequence) outcomes.push_back(LogitsOf(*output, sequence));
    outcomes.push_back(output->result.SerializeAsString());
  };
  v1::Sampling samplings[3];
  samplings[1].set_temperature(0.8f), samplings[1].set_top_k(9), samplings[1].set_top_p(0.9f);
  samplings[1].set_seed(5), samplings[1].set_top_logprobs(3);
  samplings[2].set_temperature(1.3f), samplings[2].set_typical_p(0.7f), samplings[2].set_min_p(0.01f);
  samplings[2].set_repetition_penalty(1.2f), samplings[2].set_presence_penalty(0.4f), samplings[2].set_seed(6);
  samplings[2].set_order(v1::SAMPLING_ORDER_RWKV_PIP);
  (*samplings[2].mutable_logit_bias())[7] = 2.5f;
  std::vector<uint64_t> positions(3);
  for (int slot = 0; slot < 3; ++slot) {
    EXPECT_OK(engine.AttachFresh(slot, slot + 1, samplings[slot]));
    std::vector<uint32_t> prompt;
    for (int t = 0; t < 4 + 7 * slot; ++t) prompt.push_back(static_cast<uint32_t>(t * t + 11 * slot + 3) % 101);
    keep(engine.Feed(slot, slot + 1, 0, prompt));
    positions[slot] = prompt.size();
  }
  for (int t = 0; t < 4; ++t) {
    v1::Step step;
    for (int slot = 0; slot < 3; ++slot) {
      *step.add_entries() =
          Entry(slot, slot + 1, positions[slot]++, {static_cast<uint32_t>(7 * t + slot)}, t == 0, true);
    }
    keep(engine.Step(std::move(step)));
  }
  for (int slot = 0; slot < 3; ++slot) {
    const absl::StatusOr<std::vector<std::string>> records = engine.CopyState(slot, slot + 1, positions[slot]);
    EXPECT_OK(records.status());
    if (records.ok()) outcomes.insert(outcomes.end(), records->begin(), records->end());
  }
  return outcomes;
}

TEST_F(PtxTest, WholeModelsHaveTheSameBits) {
  for (const Model& model : Models()) {
    SCOPED_TRACE(absl::StrCat(model.name, " on ", model.device));
    const std::string path = absl::StrCat(::testing::TempDir(), "/", model.name, ".safetensors");
    ASSERT_OK(testing::WriteRandomModel(model.options, path));
    TestEngineOptions options;
    options.device = model.device;
    options.slots = 3;
    options.max_batch_tokens = 18;
    const std::vector<std::string> expected = Outcomes(path, options);
    options.wrap = [&](std::unique_ptr<kernels::Device>) { return OpenNvccs(model.device); };
    EXPECT_TRUE(Outcomes(path, options) == expected);
  }
}

TEST_F(PtxTest, TheRateOfMatricesIsOfRightSums) {
  const std::unique_ptr<kernels::Device> device = OpenNvccs("cuda/emulated");
  const std::unique_ptr<kernels::Stream> stream = *device->NewStream();
  const auto out = *kernels::DeviceArray<float>::Create(*device, 2);
  const auto host = *kernels::DeviceArray<float>::Create(*device, 2, kernels::MemoryKind::kPinned);
  ASSERT_EQ(cuda::kDeviceProbes.matrix_rate(out.data(), 2, 3, static_cast<cuda::StreamHandle>(stream->handle())), 0);
  ASSERT_OK(stream->Copy(host.data(), out.data(), out.size_in_bytes()));
  ASSERT_OK(stream->Synchronize());
  EXPECT_EQ(host.data()[0], 128.0f * 3);
  EXPECT_EQ(host.data()[1], 128.0f * 3);
}

// Of all kernels that nvcc has written none was left out. Behind all other tests.
TEST_F(PtxTest, ThatWasEveryKernel) {
  const ::testing::UnitTest& tests = *::testing::UnitTest::GetInstance();
  if (tests.test_to_run_count() < tests.total_test_count()) GTEST_SKIP() << "not all tests run";
  std::vector<std::string> left = cuda::KernelsOfPtx();
  for (const std::string& name : cuda::KernelsLaunchedAsPtx()) {
    left.erase(std::remove(left.begin(), left.end(), name), left.end());
  }
  EXPECT_THAT(left, IsEmpty()) << absl::StrJoin(left, "\n");
}

}  // namespace
}  // namespace rwkv::worker
