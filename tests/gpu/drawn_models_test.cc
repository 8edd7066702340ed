// Whole models of drawn shapes on the emulated GPU: any cut into steps and stages and any company give the bits of one
// prefill, which the device "reference" confirms; and the kernels' checker finds nothing in any launch.
//
//   bazel test //tests/gpu:drawn_models_test --test_arg=--draws=500 --test_arg=--first_draw=1000 --test_timeout=3600
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <ostream>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/dtype.h"
#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/testing/checker.h"
#include "kernels/cuda/testing/emulated_cuda.h"
#include "kernels/cuda/testing/emulation.h"
#include "kernels/cuda/testing/fake_cublaslt.h"
#include "kernels/cuda/testing/fake_runtime.h"
#include "rwkv/v1/worker.pb.h"
#include "services/checkpoint/checkpoint.h"
#include "services/checkpoint/model_tensors.h"
#include "services/rwkvctl/conversion.h"
#include "services/rwkvctl/safetensors_writer.h"
#include "services/worker/testing/test_engine.h"
#include "tests/testing/checkpoint_writer.h"
#include "tests/testing/random_model.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_limit.h"

ABSL_FLAG(uint32_t, first_draw, 1, "The seed of the first draw.");
ABSL_FLAG(int, draws, 16, "How many; of a quarter as many the checker sees every access.");

namespace rwkv::worker {
namespace {

using checkpoint::ModelVersion;
using kernels::cuda::emulation::Order;
using rwkvctl::Precision;
using ::testing::IsEmpty;

constexpr int kMostRows = 72;  // of a step

// A model, sequences and how they are cut into steps: all of it by one seed.
class Draw {
 public:
  // Checked launches take some twenty times as long.
  Draw(uint32_t seed, bool small) : random_(seed) {
    static constexpr ModelVersion kVersions[] = {ModelVersion::k4,   ModelVersion::k5_0, ModelVersion::k5_1,
                                                 ModelVersion::k5_2, ModelVersion::k6,   ModelVersion::k7,
                                                 ModelVersion::k7a,  ModelVersion::k7b};
    static constexpr int kHeadSizes[] = {32, 64, 128, 20, 7};
    static constexpr kernels::DType kTypes[] = {kernels::DType::kBFloat16, kernels::DType::kFloat16,
                                                kernels::DType::kFloat32};
    model.seed = seed;
    // In turn, so that a few draws have every version and precision.
    model.version = kVersions[seed % 8];
    const uint32_t turn = (seed + seed / 8) % 4;
    precision = turn < 2 ? Precision::kAsStored : turn == 2 ? Precision::kInt8 : Precision::kInt4;
    model.dtype = kTypes[Up(seed % 3 == 0 ? 2 : 1)];
    model.layers = 1 + Up(small ? 1 : 2);
    model.head_size = kHeadSizes[Up(4)];
    const int heads = 1 + Up(model.head_size > 64 ? 1 : 3);
    model.attention_width = model.version == ModelVersion::k4 ? 4 + Up(250) : heads * model.head_size;
    model.width = Up(2) == 0 ? 8 + Up(250) : model.attention_width;
    model.ffn_width = 1 + Up(small ? 100 : 400);
    model.vocab_size = 1 + Up(Up(1) == 0 ? 8 : 300);
    for (int64_t* rank : {&model.mix_rank, &model.decay_rank, &model.iclr_rank, &model.value_residual_rank,
                          &model.gate_rank, &model.deep_embed_width, &model.query_width, &model.cache_width}) {
      *rank = 1 + Up(Up(1) == 0 ? 4 : 70);
    }
    model.deep_embed_width = 1 + model.deep_embed_width % 24;
    model.time_state = (model.version == ModelVersion::k6 || model.version == ModelVersion::k7) && Up(1) == 0;
    stages = 1 + Up(model.layers - 1);
    order = static_cast<Order>(Up(2));
    const int count = 1 + Up(small ? 2 : 5);
    for (int i = 0; i < count; ++i) {
      std::vector<uint32_t> tokens(1 + Up(small ? 3 : Up(4) == 0 ? 60 : 9));
      for (uint32_t& token : tokens) token = static_cast<uint32_t>(Up(static_cast<int>(model.vocab_size) - 1));
      sequences.push_back(tokens);
    }
  }

  // A whole number in [0, most].
  int Up(int most) { return static_cast<int>(random_() % (static_cast<uint32_t>(most) + 1)); }

  void Shuffle(std::vector<int>& values) { std::shuffle(values.begin(), values.end(), random_); }

  rwkv::testing::RandomModelOptions model;
  Precision precision = Precision::kAsStored;  // Of the large matrices; kAsStored: as the others.
  int stages = 1;
  Order order = Order::kForward;  // Of the emulation's threads and blocks.
  std::vector<std::vector<uint32_t>> sequences;

 private:
  std::mt19937 random_;
};

std::ostream& operator<<(std::ostream& out, const Draw& draw) {
  const rwkv::testing::RandomModelOptions& m = draw.model;
  out << "RWKV-" << checkpoint::Name(m.version) << ", seed " << m.seed << ", dtype " << static_cast<int>(m.dtype)
      << ", precision " << static_cast<int>(draw.precision) << ", " << m.layers << " layers, " << draw.stages
      << " stages, width " << m.width << ", attention " << m.attention_width << ", head " << m.head_size << ", ffn "
      << m.ffn_width << ", vocabulary " << m.vocab_size << ", order " << static_cast<int>(draw.order) << ", tokens";
  for (const std::vector<uint32_t>& tokens : draw.sequences) out << " " << tokens.size();
  return out;
}

// Writes the drawn model, quantized as drawn; its path.
std::string WriteModel(const Draw& draw) {
  const std::string path = absl::StrCat(::testing::TempDir(), "/drawn.safetensors");
  EXPECT_OK(rwkv::testing::WriteRandomModel(draw.model, path));
  if (draw.precision == Precision::kAsStored) return path;
  const absl::StatusOr<std::shared_ptr<const checkpoint::Checkpoint>> checkpoint = checkpoint::Checkpoint::Open(path);
  EXPECT_OK(checkpoint);
  const absl::StatusOr<rwkvctl::Conversion> conversion = rwkvctl::Conversion::Plan(*checkpoint, draw.precision);
  EXPECT_OK(conversion);
  std::string bytes = rwkvctl::SafetensorsHeader(conversion->tensors(), conversion->metadata());
  EXPECT_OK(conversion->Write([&bytes](absl::string_view part) {
    bytes.append(part.data(), part.size());
    return absl::OkStatus();
  }));
  const std::string quantized = absl::StrCat(::testing::TempDir(), "/drawn-quantized.safetensors");
  EXPECT_OK(rwkv::testing::WriteFileAtomically(quantized, bytes));
  return quantized;
}

// What became of a sequence: the logits of its tokens, and every layer's state.
struct Outcome {
  std::string logits;
  std::vector<std::string> states;
};

void Attach(EnginePipeline& pipeline, int slot) {
  const std::vector<std::string> tuned = pipeline.stage(0).tuned_state_ids();
  ASSERT_OK(pipeline.AttachFresh(slot, slot + 1, {}, tuned.empty() ? "" : tuned[0]));
}

Outcome StateAfter(EnginePipeline& pipeline, int slot, const std::vector<uint32_t>& tokens, std::string logits) {
  absl::StatusOr<std::vector<std::string>> states = pipeline.CopyState(slot, slot + 1, tokens.size());
  EXPECT_OK(states);
  return {std::move(logits), states.ok() ? *std::move(states) : std::vector<std::string>()};
}

// Each sequence alone, in chunks of so many tokens.
std::vector<Outcome> RunAlone(const Draw& draw, const std::string& path, const TestEngineOptions& options,
                              size_t chunk) {
  EnginePipeline pipeline(path, 1, options);
  std::vector<Outcome> outcomes;
  for (size_t i = 0; i < draw.sequences.size(); ++i) {
    const auto slot = static_cast<int>(i);
    const std::vector<uint32_t>& tokens = draw.sequences[i];
    Attach(pipeline, slot);
    std::string logits;
    for (size_t begin = 0; begin < tokens.size(); begin += chunk) {
      const size_t end = std::min(begin + chunk, tokens.size());
      const absl::StatusOr<StepOutput> output =
          pipeline.Feed(slot, slot + 1, begin, {tokens.begin() + begin, tokens.begin() + end});
      EXPECT_OK(output);
      if (!output.ok()) return {};
      logits += LogitsOf(*output, slot + 1);
    }
    outcomes.push_back(StateAfter(pipeline, slot, tokens, std::move(logits)));
  }
  return outcomes;
}

// All of them in company: steps of some sequences in any order, each with some of its next tokens. Of what is not asked
// for there are no logits, and zeros stand for it in `alone`.
std::vector<Outcome> RunTogether(Draw& draw, const std::string& path, const TestEngineOptions& options,
                                 std::vector<Outcome>& alone) {
  EnginePipeline pipeline(path, draw.stages, options);
  const size_t logit_bytes = static_cast<size_t>(draw.model.vocab_size) * sizeof(float);
  std::vector<int> unfinished;
  std::vector<size_t> positions(draw.sequences.size());
  std::vector<Outcome> outcomes(draw.sequences.size());
  for (size_t i = 0; i < draw.sequences.size(); ++i) {
    unfinished.push_back(static_cast<int>(i));
    outcomes[i].logits.resize(draw.sequences[i].size() * logit_bytes);
    Attach(pipeline, static_cast<int>(i));
  }
  while (!unfinished.empty()) {
    draw.Shuffle(unfinished);
    const int most = draw.Up(2) == 0 ? 1 : draw.Up(1) == 0 ? 3 : 40;  // Decodes are as frequent as chunks.
    const size_t entries = 1 + static_cast<size_t>(draw.Up(static_cast<int>(unfinished.size()) - 1));
    v1::Step step;
    size_t rows = 0;
    for (size_t e = 0; e < entries && rows < kMostRows; ++e) {
      const int slot = unfinished[e];
      const std::vector<uint32_t>& tokens = draw.sequences[slot];
      const size_t begin = positions[slot];
      const size_t count =
          std::min({1 + static_cast<size_t>(draw.Up(most - 1)), tokens.size() - begin, kMostRows - rows});
      rows += count;
      positions[slot] += count;
      *step.add_entries() =
          Entry(slot, slot + 1, begin, {tokens.begin() + begin, tokens.begin() + begin + count}, draw.Up(3) != 0);
    }
    const absl::StatusOr<StepOutput> output = pipeline.Step(step);
    EXPECT_OK(output);
    if (!output.ok()) return {};
    for (int e = 0; e < step.entries_size(); ++e) {
      const v1::StepEntry& entry = step.entries(e);
      EXPECT_EQ(output->result.entries(e).status().code(), 0) << output->result.entries(e).status().message();
      const size_t at = entry.expected_position() * logit_bytes;
      const std::string logits = LogitsOf(*output, entry.sequence());
      const size_t bytes = entry.token_ids_size() * logit_bytes;
      EXPECT_EQ(logits.size(), entry.logits() ? bytes : 0);
      if (entry.logits()) {
        outcomes[entry.slot()].logits.replace(at, bytes, logits);
      } else {
        alone[entry.slot()].logits.replace(at, bytes, bytes, '\0');
      }
    }
    unfinished.erase(std::remove_if(unfinished.begin(), unfinished.end(),
                                    [&](int slot) { return positions[slot] == draw.sequences[slot].size(); }),
                     unfinished.end());
  }
  for (size_t i = 0; i < draw.sequences.size(); ++i) {
    outcomes[i] = StateAfter(pipeline, static_cast<int>(i), draw.sequences[i], std::move(outcomes[i].logits));
  }
  return outcomes;
}

void ExpectSame(const std::vector<Outcome>& expected, const std::vector<Outcome>& actual, const char* what) {
  ASSERT_EQ(actual.size(), expected.size()) << what;
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_TRUE(actual[i].logits == expected[i].logits) << what << ": logits of sequence " << i;
    EXPECT_TRUE(actual[i].states == expected[i].states) << what << ": states of sequence " << i;
  }
}

// The largest distance, as a share of the largest expected value, or of one.
float Distance(const std::string& expected, const std::string& actual) {
  EXPECT_EQ(actual.size(), expected.size());
  float largest = 1.0f;
  float distance = 0.0f;
  for (size_t at = 0; at < std::min(expected.size(), actual.size()); at += sizeof(float)) {
    float a;
    float b;
    std::memcpy(&a, &expected[at], sizeof a);
    std::memcpy(&b, &actual[at], sizeof b);
    largest = std::max(largest, std::abs(a));
    const float difference = std::abs(a - b);
    distance = difference <= distance ? distance : difference;  // NaN stays.
    if (std::isnan(distance)) return distance;
  }
  return distance / largest;
}

void ExpectClose(const std::vector<Outcome>& expected, const std::vector<Outcome>& actual, float tolerance) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_LE(Distance(expected[i].logits, actual[i].logits), tolerance) << "logits of sequence " << i;
    ASSERT_EQ(actual[i].states.size(), expected[i].states.size());
    for (size_t layer = 0; layer < expected[i].states.size(); ++layer) {
      EXPECT_LE(Distance(expected[i].states[layer], actual[i].states[layer]), tolerance)
          << "state of sequence " << i << ", layer " << layer;
    }
  }
}

TestEngineOptions On(const std::string& device) {
  TestEngineOptions options;
  options.device = device;
  options.max_batch_tokens = kMostRows;
  return options;
}

// Sums of a few hundred terms in another order, through three layers. With weights of few bits the inputs of products
// are rounded to 16 bits, and what lies at the middle goes to either side.
float ToleranceOf(const Draw& draw) { return draw.precision == Precision::kAsStored ? 1e-4f : 1e-3f; }

// Inputs of products rounded to bf16, eight bits.
constexpr float kRoundedTolerance = 0.1f;

class DrawnModelsTest : public ::testing::Test {
 protected:
  DrawnModelsTest() { kernels::cuda::ResetFake(); }
  ~DrawnModelsTest() override { kernels::cuda::emulation::SetOrder(Order::kForward); }

  static uint32_t first() { return absl::GetFlag(FLAGS_first_draw); }
  static uint32_t end() { return first() + static_cast<uint32_t>(absl::GetFlag(FLAGS_draws)); }
};

TEST_F(DrawnModelsTest, AnyCutAndCompanyGivesTheBitsOfOnePrefill) {
  for (uint32_t seed = first(); seed < end() && !HasFailure(); ++seed) {
    Draw draw(seed, /*small=*/false);
    SCOPED_TRACE(::testing::PrintToString(draw));
    const std::string path = WriteModel(draw);
    // Without tensor cores all of its arithmetic is in the order of kernels/cuda.
    const TestEngineOptions gpu = On(draw.Up(1) == 0 ? "cuda/emulated" : "cuda/emulated/fma");
    std::vector<Outcome> prefilled = RunAlone(draw, path, gpu, kMostRows);
    kernels::cuda::emulation::SetOrder(draw.order, seed);
    ExpectSame(prefilled, RunAlone(draw, path, gpu, 1), "decodes");
    kernels::cuda::emulation::SetOrder(Order::kForward);
    ExpectClose(RunAlone(draw, path, On("reference"), kMostRows), prefilled, ToleranceOf(draw));
    const std::vector<Outcome> together = RunTogether(draw, path, gpu, prefilled);
    ExpectSame(prefilled, together, "in company");
    EXPECT_THAT(kernels::cuda::ViolationsOfFake(), IsEmpty());
  }
}

// wkv states in fp16: the same laws; what rounding costs is not the reference's.
TEST_F(DrawnModelsTest, HalfStatesHaveTheLaws) {
  for (uint32_t seed = first(); seed < first() + (end() - first()) / 4 && !HasFailure(); ++seed) {
    Draw draw(seed + 1000000, /*small=*/true);
    SCOPED_TRACE(::testing::PrintToString(draw));
    const std::string path = WriteModel(draw);
    const TestEngineOptions gpu = On("cuda/emulated/half");
    std::vector<Outcome> prefilled = RunAlone(draw, path, gpu, kMostRows);
    ExpectSame(prefilled, RunAlone(draw, path, gpu, 1), "decodes");
    ExpectClose(RunAlone(draw, path, On("reference"), kMostRows), prefilled, 0.02f);
    ExpectSame(prefilled, RunTogether(draw, path, gpu, prefilled), "in company");
    EXPECT_THAT(kernels::cuda::ViolationsOfFake(), IsEmpty());
  }
}

// Products of many rows by cuBLASLt's fake, of fewer by own kernels with rounded inputs: in any cut and company near what
// is computed exactly.
TEST_F(DrawnModelsTest, ALibrarysProductsAreNearTheReference) {
  kernels::cuda::cublaslt::ResetFake();
  for (uint32_t seed = first(); seed < first() + (end() - first()) / 2 && !HasFailure(); ++seed) {
    Draw draw(seed + 2000000, /*small=*/true);
    SCOPED_TRACE(::testing::PrintToString(draw));
    const std::string path = WriteModel(draw);
    std::vector<Outcome> expected = RunAlone(draw, path, On("reference"), kMostRows);
    const TestEngineOptions gpu = On(std::string(kernels::cuda::kEmulatedLibraryDevice));
    ExpectClose(expected, RunAlone(draw, path, gpu, kMostRows), kRoundedTolerance);
    ExpectClose(expected, RunAlone(draw, path, gpu, 1), kRoundedTolerance);
    const std::vector<Outcome> together = RunTogether(draw, path, gpu, expected);
    ExpectClose(expected, together, kRoundedTolerance);
    EXPECT_THAT(kernels::cuda::ViolationsOfFake(), IsEmpty());
  }
  EXPECT_GT(kernels::cuda::cublaslt::CountsOfFake().matmuls, 0);
}

// The runtime of devices whose kernels the checker watches: it knows the device's memory, and what of the host's pinned
// memory they write to (logits).
kernels::cuda::Checker* the_checker = nullptr;

const kernels::cuda::Runtime& CheckedRuntime() {
  static const kernels::cuda::Runtime runtime = [] {
    kernels::cuda::Runtime checked = kernels::cuda::kFakeRuntime;
    checked.malloc = [](void** memory, size_t bytes) {
      const cudaError_t error = kernels::cuda::kFakeRuntime.malloc(memory, bytes);
      if (error == cudaSuccess) the_checker->Allow(*memory, static_cast<int64_t>(bytes));
      return error;
    };
    checked.host_alloc = [](void** memory, size_t bytes, unsigned int flags) {
      const cudaError_t error = kernels::cuda::kFakeRuntime.host_alloc(memory, bytes, flags);
      if (error == cudaSuccess) the_checker->Allow(*memory, static_cast<int64_t>(bytes));
      return error;
    };
    return checked;
  }();
  return runtime;
}

TEST_F(DrawnModelsTest, TheCheckerFindsNothing) {
#if __has_feature(thread_sanitizer)
  GTEST_SKIP() << "the thread sanitizer's own library hears of the accesses here";
#endif
  for (uint32_t seed = first(); seed < first() + (end() - first()) / 4 && !HasFailure(); ++seed) {
    Draw draw(seed * 9, /*small=*/true);  // Every version and precision.
    SCOPED_TRACE(::testing::PrintToString(draw));
    const std::string path = WriteModel(draw);
    kernels::cuda::Checker checker;
    the_checker = &checker;
    TestEngineOptions options = On("cuda/emulated");
    options.wrap = [](std::unique_ptr<kernels::Device>) {
      return *kernels::cuda::OpenDevice(CheckedRuntime(), kernels::cuda::kCheckedKernels, 0, "cuda/checked");
    };
    std::vector<Outcome> prefilled = RunAlone(draw, path, options, kMostRows);
    ExpectSame(prefilled, RunTogether(draw, path, options, prefilled), "in company");
    EXPECT_THAT(checker.findings(), IsEmpty());
    EXPECT_THAT(kernels::cuda::ViolationsOfFake(), IsEmpty());
  }
}

}  // namespace
}  // namespace rwkv::worker

// Not gtest's own main: it has flags.
int main(int argc, char** argv) {
  ::testing::InitGoogleMock(&argc, argv);
  absl::ParseCommandLine(argc, argv);
  rwkv::testing::LimitTests(rwkv::testing::TestSeconds());
  return RUN_ALL_TESTS();
}
