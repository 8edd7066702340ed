// The whole forward pass against the specification's oracle, through 1, 2 and 3 stages where the model has the layers.
#include "services/worker/testing/golden.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/emulated_amx.h"
#include "kernels/cuda/testing/emulated_cuda.h"
#include "kernels/dispatch/open_device.h"
#include "services/checkpoint/checkpoint.h"
#include "services/worker/testing/test_engine.h"
#include "tests/testing/checkpoint_writer.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

using ::rwkv::testing::IsOk;

// The golden sets were computed in float64; a float32 run of these models deviates by at most 2e-5 on logits up to 12
// and 1.4e-4 on those of reverse-v7, which reach 35 (README of the data).
constexpr float kTolerance = 2e-4f;

// With weights of few bits the inputs of products are rounded to 16 bits, which the oracle does not do: 5e-4 on logits.
constexpr float kFixedPointTolerance = 1e-3f;

// States of these models reach 25, where a step of fp16 is 0.016: measured, 0.003 on logits and 0.026 on states.
constexpr float kHalfStatesTolerance = 0.04f;

// Inputs of products rounded to bf16 have 8 bits, to fp16 11: measured, 0.030 and 0.0025 on logits, 0.030 and 0.0020 on
// states.
constexpr float kRoundedTolerance = 0.05f;
constexpr float kRoundedHalfTolerance = 0.004f;

struct Case {
  std::string model;
  std::string golden;
  int layers = 0;
  float group_norm_epsilon = 64e-5f;
  std::string initial_state = "";  // "NAME=FILE" of a tuned state to begin with; empty: the model's own.
  float tolerance = kTolerance;
};

// What a run computed: the logits of all tokens, and the state of every layer.
struct Run {
  std::string logits;
  std::vector<std::string> records;
};

void ExpectClose(const float* got, const float* expected, size_t count, float tolerance, const std::string& what) {
  float worst = 0;
  size_t at = 0, bad = 0;
  for (size_t i = 0; i < count; ++i) {
    const float difference = std::fabs(got[i] - expected[i]);
    if (difference <= tolerance) continue;  // NaN falls through.
    ++bad;
    if (!(difference <= worst)) {
      worst = difference;
      at = i;
    }
  }
  EXPECT_EQ(bad, 0u) << what << ": " << bad << " of " << count << " differ, worst at " << at << ": " << got[at]
                     << " expected " << expected[at];
}

void RunCase(const Case& test, int stages, const std::string& device, size_t chunk, Run* run) {
  SCOPED_TRACE(absl::StrCat(test.model, ", ", stages, " stages, chunks of ", chunk, ", ", device));
  const absl::StatusOr<Golden> golden = ReadGolden(test.golden);
  ASSERT_THAT(golden, IsOk());
  TestEngineOptions options;
  options.device = device;
  options.group_norm_epsilon = test.group_norm_epsilon;
  if (!test.initial_state.empty()) options.initial_states = {test.initial_state};
  EnginePipeline pipeline(test.model, stages, options);
  const std::vector<std::string> tuned = pipeline.stage(0).tuned_state_ids();
  ASSERT_THAT(pipeline.AttachFresh(3, 1, {}, tuned.empty() ? "" : tuned[0]), IsOk());
  const size_t vocab = pipeline.vocab_size();
  ASSERT_EQ(golden->logits.size(), golden->tokens.size() * vocab);
  std::string logits;
  for (size_t begin = 0; begin < golden->tokens.size(); begin += chunk) {
    const size_t end = std::min(begin + chunk, golden->tokens.size());
    const absl::StatusOr<StepOutput> output =
        pipeline.Feed(3, 1, begin, {golden->tokens.begin() + begin, golden->tokens.begin() + end});
    ASSERT_THAT(output, IsOk());
    logits += LogitsOf(*output, 1);
  }
  ASSERT_EQ(logits.size(), golden->logits.size() * sizeof(float));
  std::vector<float> values(golden->logits.size());
  std::memcpy(values.data(), logits.data(), logits.size());
  ExpectClose(values.data(), golden->logits.data(), values.size(), test.tolerance, "logits");

  const absl::StatusOr<std::vector<std::string>> records = pipeline.CopyState(3, 1, golden->tokens.size());
  ASSERT_THAT(records, IsOk());
  size_t tensors = 0;
  for (size_t layer = 0; layer < records->size(); ++layer) {
    std::vector<float> state((*records)[layer].size() / sizeof(float));
    std::memcpy(state.data(), (*records)[layer].data(), (*records)[layer].size());
    size_t offset = 0;
    for (const StateTensorSpec& spec : pipeline.stage(0).model().state_layout().tensors()) {
      const std::string name = absl::StrCat("blocks.", layer, ".", spec.name);
      if (absl::StartsWith(spec.name, "qkv.")) {  // The oracle writes no caches of RWKV-7b.
        offset += spec.size();
        continue;
      }
      const auto it = golden->state.find(name);
      ASSERT_NE(it, golden->state.end()) << name;
      ASSERT_EQ(static_cast<int64_t>(it->second.size()), spec.size()) << name;
      ExpectClose(state.data() + offset, it->second.data(), it->second.size(), test.tolerance, name);
      offset += it->second.size();
      ++tensors;
    }
  }
  EXPECT_EQ(tensors, golden->state.size());
  run->logits = std::move(logits);
  run->records = *records;
}

std::vector<std::string> DevicesOf(bool gpus) {
  std::vector<std::string> devices;
  for (const std::string& device : kernels::AvailableDevices()) {
    if (absl::StartsWith(device, "cuda:") == gpus) devices.push_back(device);
  }
  if (!gpus && kernels::cpu::HasEmulatedAmx()) devices.emplace_back(kernels::cpu::kEmulatedAmxDevice);
  if (gpus && kernels::cuda::HasEmulatedDevice()) devices.emplace_back(kernels::cuda::kEmulatedDevice);
  return devices;
}

void RunAll(const std::vector<Case>& cases, const std::vector<std::string>& devices = DevicesOf(/*gpus=*/false)) {
  for (const Case& test : cases) {
    for (const std::string& device : devices) {
      Run first;
      RunCase(test, 1, device, 16, &first);
      if (device == "reference") continue;  // Slow, and the same calls in the same order.
      // The same bits from any number of stages and any chunks; prefill crosses steps.
      for (int stages = 1; stages <= std::min(3, test.layers); ++stages) {
        Run other;
        RunCase(test, stages, device, stages == 1 ? 1 : 16 - stages, &other);
        EXPECT_EQ(other.logits, first.logits) << test.model << ", " << stages << " stages, " << device;
        EXPECT_EQ(other.records, first.records) << test.model << ", " << stages << " stages, " << device;
      }
    }
  }
}

std::string GoldenFolder() {
  return absl::StrCat(std::getenv("TEST_SRCDIR"), "/", std::getenv("TEST_WORKSPACE"), "/tests/golden/");
}

TEST(GoldenTest, OwnModelsMatchTheOracle) {
  const std::string root = GoldenFolder();
  RunAll({{root + "rwkv4-fp16.pth", root + "rwkv4-fp16", 3},
          {root + "rwkv5.0-bf16.safetensors", root + "rwkv5.0-bf16", 2},
          {root + "rwkv5.1-fp16.safetensors", root + "rwkv5.1-fp16", 2},
          {root + "rwkv5.2-bf16.pth", root + "rwkv5.2-bf16", 3},
          {root + "rwkv5.2-bf16.pth", root + "rwkv5.2-eps", 3, 1e-5f},
          {root + "rwkv5.2-time-state.safetensors", root + "rwkv5.2-time-state", 2},
          {root + "rwkv6-bf16.safetensors", root + "rwkv6-bf16", 3},
          {root + "rwkv6-time-state.safetensors", root + "rwkv6-time-state", 2},
          {root + "rwkv7-bf16.safetensors", root + "rwkv7-bf16", 3},
          {root + "rwkv7-fp16.pth", root + "rwkv7-fp16", 2},
          {root + "rwkv7-time-state.safetensors", root + "rwkv7-time-state", 2},
          {root + "rwkv7a-bf16.safetensors", root + "rwkv7a-bf16", 2},
          {root + "rwkv7b-bf16.safetensors", root + "rwkv7b-bf16", 3}});
}

// Emulated, and every GPU of this machine. The emulated one shows that the engine orders its copies and waits as CUDA
// wants it, too: it does nothing before somebody waits for it.
class GoldenGpuTest : public ::testing::TestWithParam<std::string> {};
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(GoldenGpuTest);

TEST_P(GoldenGpuTest, MatchesTheOracle) {
  const std::string root = GoldenFolder();
  RunAll({{root + "rwkv4-fp16.pth", root + "rwkv4-fp16", 3},
          {root + "rwkv5.2-bf16.pth", root + "rwkv5.2-bf16", 3},
          {root + "rwkv6-bf16.safetensors", root + "rwkv6-bf16", 3},
          {root + "rwkv7-bf16.safetensors", root + "rwkv7-bf16", 3},
          {root + "rwkv7-fp16.pth", root + "rwkv7-fp16", 2},
          {root + "rwkv7a-bf16.safetensors", root + "rwkv7a-bf16", 2},
          {root + "rwkv7b-bf16.safetensors", root + "rwkv7b-bf16", 3},
          {root + "rwkv7-quantized.gguf", root + "rwkv7-quantized", 3, 64e-5f, "", kFixedPointTolerance},
          {root + "rwkv7-int4.safetensors", root + "rwkv7-int4", 2, 64e-5f, "", kFixedPointTolerance}},
         {GetParam()});
  EXPECT_THAT(kernels::cuda::ViolationsOfEmulatedDevice(), ::testing::IsEmpty());
}

INSTANTIATE_TEST_SUITE_P(Devices, GoldenGpuTest, ::testing::ValuesIn(DevicesOf(/*gpus=*/true)),
                         [](const ::testing::TestParamInfo<std::string>& info) {
                           return absl::StrReplaceAll(info.param, {{"/", "_"}, {":", "_"}});
                         });

// What rounding wkv states to fp16 after every token costs: the numbers of kernels/cuda/README.md.
TEST(GoldenTest, HalfStatesAreNearTheOracle) {
  if (!kernels::cuda::HasEmulatedDevice()) GTEST_SKIP() << "this build has no CUDA headers: nvcc was not found";
  const std::string root = GoldenFolder();
  RunAll({{root + "rwkv5.2-bf16.pth", root + "rwkv5.2-bf16", 3, 64e-5f, "", kHalfStatesTolerance},
          {root + "rwkv6-bf16.safetensors", root + "rwkv6-bf16", 3, 64e-5f, "", kHalfStatesTolerance},
          {root + "rwkv7-bf16.safetensors", root + "rwkv7-bf16", 3, 64e-5f, "", kHalfStatesTolerance}},
         {absl::StrCat(kernels::cuda::kEmulatedDevice, "/half")});
  EXPECT_THAT(kernels::cuda::ViolationsOfEmulatedDevice(), ::testing::IsEmpty());
}

// What rounding the inputs of products to the weights' type costs: the numbers of kernels/cuda/README.md.
TEST(GoldenTest, RoundedProductsAreNearTheOracle) {
  if (!kernels::cuda::HasEmulatedDevice()) GTEST_SKIP() << "this build has no CUDA headers: nvcc was not found";
  const std::string root = GoldenFolder();
  const auto of = [&](const std::string& file, const std::string& golden, int layers, float tolerance) {
    return Case{root + file, root + golden, layers, 64e-5f, "", tolerance};
  };
  RunAll({of("rwkv4-fp16.pth", "rwkv4-fp16", 3, kRoundedHalfTolerance),
          of("rwkv5.2-bf16.pth", "rwkv5.2-bf16", 3, kRoundedTolerance),
          of("rwkv6-bf16.safetensors", "rwkv6-bf16", 3, kRoundedTolerance),
          of("rwkv7-bf16.safetensors", "rwkv7-bf16", 3, kRoundedTolerance),
          of("rwkv7-fp16.pth", "rwkv7-fp16", 2, kRoundedHalfTolerance)},
         {std::string(kernels::cuda::kEmulatedRoundedDevice)});
  EXPECT_THAT(kernels::cuda::ViolationsOfEmulatedDevice(), ::testing::IsEmpty());
}

// Bits depend on how many rows a step has, not on the stages.
void RunOfAnyStages(const Case& test, const std::string& device) {
  for (const size_t chunk : {16, 5, 1}) {
    Run first;
    RunCase(test, 1, device, chunk, &first);
    for (int stages = 2; stages <= test.layers; ++stages) {
      Run other;
      RunCase(test, stages, device, chunk, &other);
      EXPECT_EQ(other.logits, first.logits) << test.model << ", " << stages << " stages, chunks of " << chunk;
      EXPECT_EQ(other.records, first.records) << test.model << ", " << stages << " stages, chunks of " << chunk;
    }
  }
}

// With many rows by cuBLASLt's fake.
TEST(GoldenTest, LibraryProductsAreNearTheOracle) {
  if (!kernels::cuda::HasEmulatedDevice()) GTEST_SKIP() << "this build has no CUDA headers: nvcc was not found";
  const std::string root = GoldenFolder();
  const std::string device(kernels::cuda::kEmulatedLibraryDevice);
  for (const auto& [file, golden, layers, tolerance] : std::vector<std::tuple<std::string, std::string, int, float>>{
           {"rwkv4-fp16.pth", "rwkv4-fp16", 3, kRoundedHalfTolerance},
           {"rwkv5.2-bf16.pth", "rwkv5.2-bf16", 3, kRoundedTolerance},
           {"rwkv6-bf16.safetensors", "rwkv6-bf16", 3, kRoundedTolerance},
           {"rwkv7-bf16.safetensors", "rwkv7-bf16", 3, kRoundedTolerance},
           {"rwkv7-fp16.pth", "rwkv7-fp16", 2, kRoundedHalfTolerance},
           {"rwkv7b-bf16.safetensors", "rwkv7b-bf16", 3, kRoundedTolerance},
           {"rwkv7-int4.safetensors", "rwkv7-int4", 2, kRoundedTolerance}}) {
    RunOfAnyStages({root + file, root + golden, layers, 64e-5f, "", tolerance}, device);
  }
  EXPECT_THAT(kernels::cuda::ViolationsOfEmulatedDevice(), ::testing::IsEmpty());
}

// The same models in other people's formats and with other people's names.
TEST(GoldenTest, EveryDialectMatchesTheOracle) {
  const std::string root = GoldenFolder();
  const auto of = [&](const std::string& file, const std::string& golden, int layers, float epsilon = 64e-5f) {
    return Case{root + file, root + golden, layers, epsilon};
  };
  RunAll({of("rwkv4-port.safetensors", "rwkv4-fp16", 3), of("rwkv5.2-port.bin", "rwkv5.2-bf16", 3),
          of("rwkv6-port.safetensors", "rwkv6-bf16", 3), of("rwkv6-fla.safetensors", "rwkv6-bf16", 3),
          of("rwkv7-fla.safetensors", "rwkv7-bf16", 3), of("rwkv7-fla-stacked.bin", "rwkv7-bf16", 3),
          of("rwkv5.1.st", "rwkv5.1-fp16", 2), of("rwkv5.2.st", "rwkv5.2-bf16", 3), of("rwkv6.st", "rwkv6-bf16", 3),
          of("rwkv7.st", "rwkv7-bf16", 3), of("rwkv4-cpp.bin", "rwkv4-fp16", 3),
          of("rwkv5.0-cpp.bin", "rwkv5.0-bf16", 2), of("rwkv5.1-cpp.bin", "rwkv5.1-fp16", 2),
          of("rwkv5.2-cpp.bin", "rwkv5.2-eps", 3, 1e-5f), of("rwkv6-cpp.bin", "rwkv6-bf16", 3),
          of("rwkv7-cpp.bin", "rwkv7-bf16", 3), of("rwkv6.gguf", "rwkv6-bf16", 3), of("rwkv7.gguf", "rwkv7-bf16", 3)});
}

// The oracle computes with the weights that the blocks and groups stand for.
TEST(GoldenTest, QuantizedFilesMatchTheOracle) {
  const std::string root = GoldenFolder();
  const auto of = [&](const std::string& name, const std::string& extension, int layers) {
    return Case{absl::StrCat(root, name, extension), root + name, layers, 64e-5f, "", kFixedPointTolerance};
  };
  RunAll({of("rwkv7-quantized", ".gguf", 3), of("rwkv4-quantized", ".bin", 2), of("rwkv7-int8", ".safetensors", 2),
          of("rwkv7-int4", ".safetensors", 2)});
}

TEST(GoldenTest, SharedModelsMatchTheOracle) {
  const char* const shared = std::getenv("RWKV_SHARED");
  if (shared == nullptr) GTEST_SKIP() << "RWKV_SHARED is not set";
  const std::string data = absl::StrCat(shared, "/data/");
  const auto of = [&](const std::string& name, const std::string& file, int layers, float epsilon = 64e-5f) {
    return Case{absl::StrCat(data, "models/", file), absl::StrCat(data, "golden/", name), layers, epsilon};
  };
  RunAll({of("tiny-4v0", "tiny-4v0.safetensors", 4),
          of("tiny-5v2", "tiny-5v2.safetensors", 12),
          of("tiny-5v2-gneps1e-5", "tiny-5v2.safetensors", 12, 1e-5f),
          of("tiny-6v0-f16", "tiny-6v0-f16.safetensors", 12),
          of("tiny-7v0", "tiny-7v0.safetensors", 12),
          of("rand-4", "rand-4.safetensors", 2),
          of("rand-4-torch-legacy", "rand-4-torch-legacy.pth", 2),
          of("rand-5.0", "rand-5.0.safetensors", 2),
          of("rand-5.1", "rand-5.1.safetensors", 2),
          of("rand-5.2", "rand-5.2.safetensors", 2),
          of("rand-6", "rand-6.safetensors", 2),
          of("rand-6-time_state", "rand-6-time_state.safetensors", 2),
          of("rand-6-torch-zip", "rand-6-torch-zip.pth", 2),
          of("rand-7", "rand-7.safetensors", 2),
          of("rand-7-pth", "rand-7-pth.pth", 2),
          of("rand-7-time_state", "rand-7-time_state.safetensors", 2),
          of("rand-7a", "rand-7a.safetensors", 2),
          of("rand-7b", "rand-7b.safetensors", 2),
          of("reverse-v7", "reverse-v7.safetensors", 2),
          {data + "rwkvcpp/tiny-rwkv-6v0-3m-Q5_0.bin", GoldenFolder() + "tiny-6v0-q5_0", 12}});
}

// Writes the tensors of `file` whose names end in "time_state" to `states`, the others to `model`.
void Split(const std::string& file, const std::string& model, const std::string& states) {
  ASSERT_OK_AND_ASSIGN(const std::shared_ptr<const checkpoint::Checkpoint> whole, checkpoint::Checkpoint::Open(file));
  std::vector<rwkv::testing::RawTensor> parts[2];
  for (const checkpoint::TensorInfo& info : whole->tensors()) {
    ASSERT_OK_AND_ASSIGN(const checkpoint::Tensor tensor, whole->Read(info.name));
    parts[absl::EndsWith(info.name, "time_state")].push_back(
        {{info.name, info.type, info.shape}, std::string(static_cast<const char*>(tensor.data), info.bytes)});
  }
  ASSERT_FALSE(parts[1].empty());
  ASSERT_OK(rwkv::testing::WriteFileAtomically(model, rwkv::testing::SafetensorsBytes(parts[0])));
  ASSERT_OK(rwkv::testing::WriteFileAtomically(states, rwkv::testing::TorchZipBytes(parts[1])));
}

// A model with its states inside, taken apart: with the state file it gives the oracle's logits and the whole model's
// bits, without it others.
void RunSplit(const std::string& file, const std::string& golden) {
  const std::string model = absl::StrCat(::testing::TempDir(), "/base.safetensors");
  const std::string states = absl::StrCat(::testing::TempDir(), "/states.pth");
  Split(file, model, states);
  if (::testing::Test::HasFatalFailure()) return;
  RunAll({Case{model, golden, 2, 64e-5f, absl::StrCat("tuned=", states)}});

  TestEngineOptions options;
  options.initial_states = {absl::StrCat("tuned=", states)};
  EnginePipeline base(model, 1, options);
  EnginePipeline whole(file, 1, options);
  const std::string id = base.stage(0).tuned_state_ids().front();
  ASSERT_OK(base.AttachFresh(0, 1));
  ASSERT_OK(base.AttachFresh(1, 2, {}, id));
  ASSERT_OK(whole.AttachFresh(0, 1));
  ASSERT_OK_AND_ASSIGN(const StepOutput plain, base.Feed(0, 1, 0, {1, 2, 3}));
  ASSERT_OK_AND_ASSIGN(const StepOutput tuned, base.Feed(1, 2, 0, {1, 2, 3}));
  ASSERT_OK_AND_ASSIGN(const StepOutput inside, whole.Feed(0, 1, 0, {1, 2, 3}));
  EXPECT_EQ(LogitsOf(tuned, 2), LogitsOf(inside, 1));
  EXPECT_NE(LogitsOf(plain, 1), LogitsOf(inside, 1));
}

TEST(GoldenTest, TunedStatesInAFileOfTheirOwnMatchTheOracle) {
  const std::string root =
      absl::StrCat(std::getenv("TEST_SRCDIR"), "/", std::getenv("TEST_WORKSPACE"), "/tests/golden/");
  for (const char* name : {"rwkv5.2-time-state", "rwkv6-time-state", "rwkv7-time-state"}) {
    RunSplit(absl::StrCat(root, name, ".safetensors"), absl::StrCat(root, name));
  }
  const char* const shared = std::getenv("RWKV_SHARED");
  if (shared == nullptr) return;
  for (const char* name : {"rand-6-time_state", "rand-7-time_state"}) {
    RunSplit(absl::StrCat(shared, "/data/models/", name, ".safetensors"), absl::StrCat(shared, "/data/golden/", name));
  }
}

// rwkv.cpp's own files and the logits that its test-suite expects after the bytes of "in (with the quote).
TEST(GoldenTest, FilesOfRwkvCppGiveItsLogits) {
  const char* const shared = std::getenv("RWKV_SHARED");
  if (shared == nullptr) GTEST_SKIP() << "RWKV_SHARED is not set";
  for (const auto& [version, epsilon] :
       std::vector<std::pair<std::string, float>>{{"4v0-660K", 64e-5f}, {"5v2-730K", 1e-5f}, {"7v0-834K", 64e-5f}}) {
    SCOPED_TRACE(version);
    const std::string folder = absl::StrCat(shared, "/data/rwkvcpp/");
    std::ifstream file(absl::StrCat(folder, "expected-logits-", version, ".bin"), std::ios::binary);
    std::vector<float> expected(256);
    ASSERT_TRUE(file.read(reinterpret_cast<char*>(expected.data()), 256 * sizeof(float)));
    TestEngineOptions options;
    options.group_norm_epsilon = epsilon;
    EnginePipeline pipeline(absl::StrCat(folder, "tiny-rwkv-", version, "-FP32.bin"), 3, options);
    ASSERT_THAT(pipeline.AttachFresh(0, 1), IsOk());
    const absl::StatusOr<StepOutput> output = pipeline.Feed(0, 1, 0, {34, 105, 110});
    ASSERT_THAT(output, IsOk());
    const std::string logits = LogitsOf(*output, 1);
    ASSERT_EQ(logits.size(), 3 * 256 * sizeof(float));
    std::vector<float> last(256);
    std::memcpy(last.data(), logits.data() + 2 * 256 * sizeof(float), 256 * sizeof(float));
    ExpectClose(last.data(), expected.data(), last.size(), kTolerance, "logits");
  }
}

// The one test whose outcome depends on a long, exact recurrent memory: the published digit-reversal model.
TEST(GoldenTest, TheReversalModelReversesDigits) {
  const char* const shared = std::getenv("RWKV_SHARED");
  if (shared == nullptr) GTEST_SKIP() << "RWKV_SHARED is not set";
  EnginePipeline pipeline(absl::StrCat(shared, "/data/models/reverse-v7.safetensors"), 2);
  const std::string digits = "80351792640173596284017352968410";
  std::vector<uint32_t> prompt;
  for (char digit : digits) prompt.push_back(digit - '0');
  prompt.push_back(10);  // ","
  ASSERT_THAT(pipeline.AttachFresh(0, 1), IsOk());
  absl::StatusOr<StepOutput> output = pipeline.Feed(0, 1, 0, prompt, false, true);
  std::string answer;
  for (uint64_t position = prompt.size();; ++position) {
    ASSERT_THAT(output, IsOk());
    const uint32_t token = output->result.entries(0).token_id();
    if (token == 11) break;  // "#"
    ASSERT_LT(answer.size(), digits.size()) << answer;
    answer.push_back(static_cast<char>('0' + token));
    output = pipeline.Feed(0, 1, position, {token}, false, true);
  }
  EXPECT_EQ(answer, std::string(digits.rbegin(), digits.rend()));
}

}  // namespace
}  // namespace rwkv::worker
