// Decode steps as graphs and as launches: the same bits, whoever comes and goes; and graphs have kernels alone.
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cuda/testing/fake_cublaslt.h"
#include "kernels/cuda/testing/fake_runtime.h"
#include "rwkv/v1/worker.pb.h"
#include "services/worker/testing/test_engine.h"
#include "tests/testing/random_model.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

using ::testing::IsEmpty;

constexpr int kSlots = 5;

// Logits of every step, while sequences come and go; and one state.
std::vector<std::string> Decode(const std::string& path, int stages, const std::string& device) {
  TestEngineOptions options;
  options.device = device;
  options.slots = kSlots;
  options.max_batch_tokens = 8;
  EnginePipeline engine(path, stages, options);
  std::vector<uint64_t> positions(kSlots);
  std::vector<std::string> results;
  for (int slot = 0; slot < kSlots; ++slot) EXPECT_OK(engine.AttachFresh(slot, slot + 1));
  for (int t = 0; t < 14; ++t) {
    // Three rows, twice each way round; then other numbers of them, which share a bucket or not.
    const int first = t < 8 ? t % 2 : 0;
    const int rows = t < 8 ? 3 : 1 + t % kSlots;
    v1::Step step;
    for (int slot = first; slot < first + rows; ++slot) {
      // In some of the steps somebody's logits are not asked for.
      *step.add_entries() = Entry(slot, slot + 1, positions[slot]++, {static_cast<uint32_t>(7 * t + slot)},
                                  t != 9 || slot != 1, t % 3 == 0);
    }
    const absl::StatusOr<StepOutput> output = engine.Step(step);
    EXPECT_OK(output);
    if (!output.ok()) return {};
    for (int slot = first; slot < first + rows; ++slot) {
      EXPECT_EQ(output->result.entries(slot - first).status().code(), 0);
      results.push_back(LogitsOf(*output, slot + 1));
    }
  }
  const absl::StatusOr<std::vector<std::string>> state = engine.CopyState(1, 2, positions[1]);
  EXPECT_OK(state);
  if (state.ok()) results.insert(results.end(), state->begin(), state->end());
  return results;
}

TEST(GraphsTest, GraphsAndLaunchesGiveTheSameBits) {
  using checkpoint::ModelVersion;
  for (const ModelVersion version : {ModelVersion::k4, ModelVersion::k5_2, ModelVersion::k6, ModelVersion::k7,
                                     ModelVersion::k7a, ModelVersion::k7b}) {
    SCOPED_TRACE(checkpoint::Name(version));
    testing::RandomModelOptions model;
    model.version = version;
    const std::string path = absl::StrCat(::testing::TempDir(), "/graphs.safetensors");
    ASSERT_OK(testing::WriteRandomModel(model, path));
    for (const int stages : {1, 2}) {
      kernels::cuda::ResetFake();
      const std::vector<std::string> launches = Decode(path, stages, "cuda/emulated/launches");
      EXPECT_EQ(kernels::cuda::CountsOfFake().graphs, 0);
      const std::vector<std::string> graphs = Decode(path, stages, "cuda/emulated");
      EXPECT_TRUE(graphs == launches) << "some bit differs";
      EXPECT_GE(kernels::cuda::CountsOfFake().graph_launches, 8 * stages);
      EXPECT_EQ(kernels::cuda::CountsOfFake().graph_copies, 0) << "something in a graph is no kernel";
      EXPECT_THAT(kernels::cuda::ViolationsOfFake(), IsEmpty());
    }
  }
}

// What a worker does before it takes requests: the steps that decode need no graph made in their way.
TEST(GraphsTest, WarmUpMakesTheGraphsOfAllNumbersOfRows) {
  testing::RandomModelOptions model;
  const std::string path = absl::StrCat(::testing::TempDir(), "/warm.safetensors");
  ASSERT_OK(testing::WriteRandomModel(model, path));
  for (const int stages : {1, 2}) {
    kernels::cuda::ResetFake();
    TestEngineOptions options;
    options.device = "cuda/emulated";
    options.slots = 19;
    options.max_batch_tokens = 40;
    EnginePipeline engine(path, stages, options);
    for (int stage = 0; stage < stages; ++stage) ASSERT_OK(engine.stage(stage).WarmUp());
    // 1, 2, 4, 8, 16, 24 rows; on the last stage of each of the two steps that may be pending.
    const int64_t graphs = kernels::cuda::CountsOfFake().graphs;
    EXPECT_EQ(graphs, stages == 1 ? 12 : 18);
    EXPECT_EQ(kernels::cuda::CountsOfFake().graph_launches, 0);
    EXPECT_EQ(kernels::cuda::CountsOfFake().graph_copies, 0);
    std::vector<uint64_t> positions(options.slots);
    for (int slot = 0; slot < options.slots; ++slot) ASSERT_OK(engine.AttachFresh(slot, slot + 1));
    for (const int rows : {19, 1, 3, 8, 11, 2}) {
      v1::Step step;
      for (int slot = 0; slot < rows; ++slot) {
        *step.add_entries() = Entry(slot, slot + 1, positions[slot]++, {static_cast<uint32_t>(slot)}, false, true);
      }
      ASSERT_OK(engine.Step(step).status());
    }
    EXPECT_EQ(kernels::cuda::CountsOfFake().graphs, graphs) << "made in a step";
    EXPECT_EQ(kernels::cuda::CountsOfFake().graph_launches, 6 * stages);
    EXPECT_THAT(kernels::cuda::ViolationsOfFake(), IsEmpty());
  }
}

// Where a library computes products, its workspace and everything else of the largest step is there as well: graphs are
// made of such steps, and no step allocates.
TEST(GraphsTest, WarmUpLeavesALibrarysDeviceNothingToAllocate) {
  testing::RandomModelOptions model;
  const std::string path = absl::StrCat(::testing::TempDir(), "/library.safetensors");
  ASSERT_OK(testing::WriteRandomModel(model, path));
  kernels::cuda::ResetFake();
  TestEngineOptions options;
  options.device = "cuda/emulated/lt";
  options.slots = 19;
  options.max_batch_tokens = 40;
  EnginePipeline engine(path, 1, options);
  kernels::cuda::cublaslt::ResetFake();
  ASSERT_OK(engine.stage(0).WarmUp());
  EXPECT_EQ(kernels::cuda::CountsOfFake().graphs, 12);
  EXPECT_EQ(kernels::cuda::CountsOfFake().graph_copies, 0);
  EXPECT_GT(kernels::cuda::cublaslt::CountsOfFake().matmuls, 0);
  const int64_t allocations = kernels::cuda::CountsOfFake().allocations;
  std::vector<uint64_t> positions(options.slots);
  for (int slot = 0; slot < options.slots; ++slot) ASSERT_OK(engine.AttachFresh(slot, slot + 1));
  ASSERT_OK(engine.Feed(0, 1, 0, std::vector<uint32_t>(40, 3)));
  positions[0] = 40;
  for (const int rows : {19, 1, 3, 8, 11, 2}) {
    v1::Step step;
    for (int slot = 0; slot < rows; ++slot) {
      *step.add_entries() = Entry(slot, slot + 1, positions[slot]++, {static_cast<uint32_t>(slot)}, false, true);
    }
    ASSERT_OK(engine.Step(step).status());
  }
  EXPECT_EQ(kernels::cuda::CountsOfFake().graph_launches, 6);
  EXPECT_EQ(kernels::cuda::CountsOfFake().allocations, allocations);
  EXPECT_EQ(kernels::cuda::cublaslt::CountsOfFake().searches, 0);
  EXPECT_THAT(kernels::cuda::ViolationsOfFake(), IsEmpty());
}

// A worker whose GPU has no room for a graph serves all the same.
TEST(GraphsTest, StepsThatNoGraphCanBeMadeOfAreLaunched) {
  testing::RandomModelOptions model;
  const std::string path = absl::StrCat(::testing::TempDir(), "/without.safetensors");
  ASSERT_OK(testing::WriteRandomModel(model, path));
  std::vector<std::string> logits;
  for (const int64_t fail_graph : {-1, 0}) {
    kernels::cuda::FakeFaults faults;
    faults.fail_graph = fail_graph;  // Of one row, the first place.
    kernels::cuda::ResetFake(faults);
    TestEngineOptions options;
    options.device = "cuda/emulated";
    options.slots = 4;
    options.max_batch_tokens = 8;
    EnginePipeline engine(path, 1, options);
    ASSERT_OK(engine.stage(0).WarmUp());
    EXPECT_EQ(kernels::cuda::CountsOfFake().graphs, fail_graph == 0 ? 5 : 6);
    ASSERT_OK(engine.AttachFresh(0, 1));
    std::string of_run;
    for (uint64_t t = 0; t < 4; ++t) {
      v1::Step step;
      *step.add_entries() = Entry(0, 1, t, {static_cast<uint32_t>(t)}, true, true);
      const absl::StatusOr<StepOutput> output = engine.Step(step);
      ASSERT_OK(output);
      of_run += LogitsOf(*output, 1);
    }
    logits.push_back(of_run);
    EXPECT_EQ(kernels::cuda::CountsOfFake().graph_launches, fail_graph == 0 ? 2 : 4);
    EXPECT_THAT(kernels::cuda::ViolationsOfFake(), IsEmpty());
  }
  EXPECT_EQ(logits[0], logits[1]);
}

}  // namespace
}  // namespace rwkv::worker
