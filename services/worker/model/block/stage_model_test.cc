// Whole layers of every version on every device; the numbers themselves are the golden tests' (services/worker/engine).
#include "services/worker/model/block/stage_model.h"

#include <cctype>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/api/sequence_span.h"
#include "kernels/conformance/protected_device.h"
#include "kernels/dispatch/open_device.h"
#include "services/checkpoint/model_tensors.h"
#include "services/worker/model/block/test_stage.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

using checkpoint::ModelVersion;
using kernels::kPaddingSlot;
using ::rwkv::testing::StatusIs;
using ::testing::HasSubstr;

class StageModelTest : public ::testing::TestWithParam<ModelVersion> {
 protected:
  static std::unique_ptr<TestStage> Stage(std::unique_ptr<kernels::Device> device) {
    return *TestStage::Create(std::move(device), GetParam());
  }
  static std::unique_ptr<TestStage> Stage(const std::string& device) { return Stage(*kernels::OpenDevice(device)); }

  // Three steps: chunks of two prompts, then decodes beside a third sequence. The logits of all.
  static std::vector<float> Run(TestStage& stage) {
    std::vector<float> logits;
    for (const std::vector<int64_t>& lengths : {std::vector<int64_t>{9, 3}, {1, 1, 12}, {1, 1, 1}}) {
      EXPECT_OK(stage.Step(TestStage::Spans(lengths)));
      const std::vector<float> of_step = stage.logits();
      logits.insert(logits.end(), of_step.begin(), of_step.end());
    }
    return logits;
  }

  static bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
  }
};

TEST_P(StageModelTest, TheHostTouchesNoDeviceMemory) {
  const std::unique_ptr<TestStage> plain = Stage("auto");
  const std::unique_ptr<TestStage> guarded = Stage(kernels::conformance::ProtectDevice(*kernels::OpenDevice("cpu")));
  EXPECT_TRUE(SameBits(Run(*plain), Run(*guarded)));
  EXPECT_TRUE(SameBits(plain->states(), guarded->states()));
}

TEST_P(StageModelTest, PaddingChangesNothing) {
  std::vector<std::string> devices = kernels::AvailableDevices();
  devices.push_back("protected");
  for (const std::string& device : devices) {
    const auto open = [&] {
      return device == "protected" ? Stage(kernels::conformance::ProtectDevice(*kernels::OpenDevice("cpu")))
                                   : Stage(device);
    };
    const std::unique_ptr<TestStage> plain = open();
    const std::unique_ptr<TestStage> padded = open();
    for (int round = 0; round < 2; ++round) {  // The second has something in the states.
      ASSERT_OK(plain->Step({{2, 0, 5}, {0, 5, 1}}));
      ASSERT_OK(padded->Step({{kPaddingSlot, 0, 2}, {2, 2, 5}, {kPaddingSlot, 7, 1}, {0, 8, 1}, {kPaddingSlot, 9, 3}}));
      EXPECT_TRUE(SameBits(plain->logits(), padded->logits())) << device;
      EXPECT_TRUE(SameBits(plain->states(), padded->states())) << device;
    }
    // Padding where a sequence was.
    ASSERT_OK(plain->Step({{2, 0, 1}}));
    ASSERT_OK(padded->Step({{2, 0, 1}, {kPaddingSlot, 1, 1}, {kPaddingSlot, 2, 1}, {kPaddingSlot, 3, 2}}));
    EXPECT_TRUE(SameBits(plain->logits(), padded->logits())) << device;
  }
}

TEST_P(StageModelTest, DevicesOfOneFamilyGiveTheSameBits) {
  const std::vector<float> best = Run(*Stage("auto"));
  const std::string family((*kernels::OpenDevice("auto"))->numeric_family());
  for (const std::string& device : kernels::AvailableDevices()) {
    if ((*kernels::OpenDevice(device))->numeric_family() != family) continue;
    EXPECT_TRUE(SameBits(best, Run(*Stage(device)))) << device;
  }
}

TEST_P(StageModelTest, ThreadsChangeNoBit) {
  const std::vector<float> alone = Run(*Stage(*kernels::OpenDevice("cpu", 1)));
  for (const int threads : {2, 3, 7}) {
    EXPECT_TRUE(SameBits(alone, Run(*Stage(*kernels::OpenDevice("cpu", threads))))) << threads << " threads";
  }
}

TEST_P(StageModelTest, BadStepsAreRefusedAndChangeNothing) {
  const std::unique_ptr<TestStage> stage = Stage("auto");
  ASSERT_OK(stage->Step({{2, 0, 5}, {0, 5, 1}}));
  const std::vector<float> before = stage->states();
  EXPECT_THAT(stage->Step({{1, 0, 2}, {1, 2, 1}}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("slot 1 is given twice")));
  EXPECT_THAT(stage->Step({{4, 0, 2}}), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("slot 4")));
  EXPECT_THAT(stage->Step({{1, 0, 25}}), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("25 rows")));
  EXPECT_TRUE(SameBits(before, stage->states()));
}

INSTANTIATE_TEST_SUITE_P(Versions, StageModelTest, ::testing::ValuesIn(checkpoint::kModelVersions),
                         [](const auto& info) {
                           std::string name = absl::StrCat("rwkv", checkpoint::Name(info.param));
                           for (char& c : name) c = std::isalnum(static_cast<unsigned char>(c)) != 0 ? c : '_';
                           return name;
                         });

}  // namespace
}  // namespace rwkv::worker
