// The whole forward pass against the specification's oracle, through 1, 2 and 3 stages where the model has the layers.
#include "services/worker/testing/golden.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/dispatch/op_table.h"
#include "services/worker/testing/test_engine.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

using ::rwkv::testing::IsOk;

// The golden sets were computed in float64; a float32 run of these models deviates by at most 2e-5 on logits up to 12
// and 1.4e-4 on those of reverse-v7, which reach 35 (README of the data).
constexpr float kTolerance = 2e-4f;

struct Case {
  std::string model;
  std::string golden;
  int layers = 0;
};

void ExpectClose(const float* got, const float* expected, size_t count, const std::string& what) {
  float worst = 0;
  size_t at = 0, bad = 0;
  for (size_t i = 0; i < count; ++i) {
    const float difference = std::fabs(got[i] - expected[i]);
    if (difference <= kTolerance) continue;  // NaN falls through.
    ++bad;
    if (!(difference <= worst)) {
      worst = difference;
      at = i;
    }
  }
  EXPECT_EQ(bad, 0u) << what << ": " << bad << " of " << count << " differ, worst at " << at << ": " << got[at]
                     << " expected " << expected[at];
}

void RunCase(const Case& test, int stages, const std::string& kernels) {
  SCOPED_TRACE(absl::StrCat(test.model, ", ", stages, " stages, ", kernels));
  const absl::StatusOr<Golden> golden = ReadGolden(test.golden);
  ASSERT_THAT(golden, IsOk());
  TestEngineOptions options;
  options.kernels = kernels;
  EnginePipeline pipeline(test.model, stages, options);
  ASSERT_THAT(pipeline.AttachFresh(3, 1), IsOk());
  const size_t vocab = pipeline.vocab_size();
  ASSERT_EQ(golden->logits.size(), golden->tokens.size() * vocab);
  std::string logits;
  const size_t chunk = 16;  // Prefill crosses steps.
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
  ExpectClose(values.data(), golden->logits.data(), values.size(), "logits");

  const absl::StatusOr<std::vector<std::string>> records = pipeline.CopyState(3, 1, golden->tokens.size());
  ASSERT_THAT(records, IsOk());
  size_t tensors = 0;
  for (size_t layer = 0; layer < records->size(); ++layer) {
    std::vector<float> state((*records)[layer].size() / sizeof(float));
    std::memcpy(state.data(), (*records)[layer].data(), (*records)[layer].size());
    size_t offset = 0;
    for (const StateTensorSpec& spec : pipeline.stage(0).model().state_layout().tensors()) {
      const std::string name = absl::StrCat("blocks.", layer, ".", spec.name);
      const auto it = golden->state.find(name);
      ASSERT_NE(it, golden->state.end()) << name;
      ASSERT_EQ(static_cast<int64_t>(it->second.size()), spec.size()) << name;
      ExpectClose(state.data() + offset, it->second.data(), it->second.size(), name);
      offset += it->second.size();
      ++tensors;
    }
  }
  EXPECT_EQ(tensors, golden->state.size());
}

void RunAll(const std::vector<Case>& cases) {
  for (const Case& test : cases) {
    for (const kernels::OpTable* ops : kernels::AvailableOpTables()) {
      for (int stages = 1; stages <= std::min(3, test.layers); ++stages) RunCase(test, stages, std::string(ops->name));
    }
  }
}

TEST(GoldenTest, OwnModelsMatchTheOracle) {
  const std::string root =
      absl::StrCat(std::getenv("TEST_SRCDIR"), "/", std::getenv("TEST_WORKSPACE"), "/tests/golden/");
  RunAll({{root + "rwkv7-bf16.safetensors", root + "rwkv7-bf16", 3},
          {root + "rwkv7-fp16.pth", root + "rwkv7-fp16", 2},
          {root + "rwkv7-time-state.safetensors", root + "rwkv7-time-state", 2}});
}

TEST(GoldenTest, SharedModelsMatchTheOracle) {
  const char* const shared = std::getenv("RWKV_SHARED");
  if (shared == nullptr) GTEST_SKIP() << "RWKV_SHARED is not set";
  const std::string data = absl::StrCat(shared, "/data/");
  std::vector<Case> cases;
  for (const auto& [name, file, layers] :
       std::vector<std::tuple<std::string, std::string, int>>{{"tiny-7v0", "tiny-7v0.safetensors", 12},
                                                              {"rand-7", "rand-7.safetensors", 2},
                                                              {"rand-7-pth", "rand-7-pth.pth", 2},
                                                              {"rand-7-time_state", "rand-7-time_state.safetensors", 2},
                                                              {"reverse-v7", "reverse-v7.safetensors", 2}}) {
    cases.push_back({data + "models/" + file, data + "golden/" + name, layers});
  }
  RunAll(cases);
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
