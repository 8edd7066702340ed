#include "services/worker/model/tuned_states.h"

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/checkpoint/checkpoint.h"
#include "services/checkpoint/fingerprint.h"
#include "services/checkpoint/formats/element_type.h"
#include "services/checkpoint/model_config.h"
#include "services/worker/model/layer_range.h"
#include "tests/testing/checkpoint_writer.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

using ::rwkv::testing::IsOkAndHolds;
using ::rwkv::testing::RawTensor;
using ::rwkv::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Pair;

checkpoint::ModelConfig Config() {
  checkpoint::ModelConfig config;
  config.layer_count = 3;
  config.head_count = 1;
  config.head_size = 2;
  return config;
}

// The state of layer N is [[first + N, 0], [0, 0]]. Returns the path.
std::string WriteStates(const std::string& name, float first) {
  std::vector<RawTensor> tensors;
  for (int layer = 0; layer < 3; ++layer) {
    const float values[] = {first + static_cast<float>(layer), 0, 0, 0};
    tensors.push_back(
        {{absl::StrCat("blocks.", layer, ".att.time_state"), checkpoint::ElementType::kFloat32, {1, 2, 2}},
         std::string(reinterpret_cast<const char*>(values), sizeof(values))});
  }
  const std::string path = absl::StrCat(::testing::TempDir(), "/", name);
  EXPECT_OK(testing::WriteFileAtomically(path, testing::TorchZipBytes(tensors)));
  return path;
}

std::string IdOf(const std::string& name, const std::string& path) {
  return absl::StrCat(name, "@", checkpoint::Fingerprint(**checkpoint::Checkpoint::Open(path))->substr(0, 8));
}

TEST(TunedStatesTest, AStageKeepsItsLayersOfEveryState) {
  const std::string poet = WriteStates("poet.pth", 10), judge = WriteStates("judge.pth", 20);
  EXPECT_THAT(
      LoadTunedStates({absl::StrCat("poet=", poet), absl::StrCat("the.Judge_2-b=", judge)}, Config(), {1, 3}),
      IsOkAndHolds(ElementsAre(
          Pair(IdOf("poet", poet), ElementsAre(std::vector<float>{11, 0, 0, 0}, std::vector<float>{12, 0, 0, 0})),
          Pair(IdOf("the.Judge_2-b", judge),
               ElementsAre(std::vector<float>{21, 0, 0, 0}, std::vector<float>{22, 0, 0, 0})))));
  EXPECT_THAT(LoadTunedStates({}, Config(), {0, 3}), IsOkAndHolds(IsEmpty()));
}

TEST(TunedStatesTest, AnotherFileUnderTheSameNameIsAnotherState) {
  ASSERT_OK_AND_ASSIGN(const TunedStates before,
                       LoadTunedStates({absl::StrCat("poet=", WriteStates("a.pth", 1))}, Config(), {0, 3}));
  ASSERT_OK_AND_ASSIGN(const TunedStates copy,
                       LoadTunedStates({absl::StrCat("poet=", WriteStates("b.pth", 1))}, Config(), {0, 1}));
  ASSERT_OK_AND_ASSIGN(const TunedStates after,
                       LoadTunedStates({absl::StrCat("poet=", WriteStates("a.pth", 2))}, Config(), {0, 3}));
  EXPECT_EQ(before.begin()->first, copy.begin()->first);
  EXPECT_NE(before.begin()->first, after.begin()->first);
}

TEST(TunedStatesTest, WhatIsWrongIsNamed) {
  const std::string good = WriteStates("good.pth", 1);
  checkpoint::ModelConfig deeper = Config();
  deeper.layer_count = 4;
  checkpoint::ModelConfig version_4 = Config();
  version_4.head_count = version_4.head_size = 0;
  const std::string many = absl::StrCat(kMaxTunedStates + 1);
  const struct {
    const char* name;
    std::vector<std::string> entries;
    checkpoint::ModelConfig config;
    absl::StatusCode code;
    std::string message;
  } kCases[] = {
      {"no file", {"poet"}, Config(), absl::StatusCode::kInvalidArgument, "\"poet\": not NAME=FILE"},
      {"an empty file", {"poet="}, Config(), absl::StatusCode::kInvalidArgument, "not NAME=FILE"},
      {"no name", {"=" + good}, Config(), absl::StatusCode::kInvalidArgument, "the name is not 1 to 64"},
      {"a name with @", {"a@b=" + good}, Config(), absl::StatusCode::kInvalidArgument, "of A-Z a-z 0-9 . _ -"},
      {"a long name",
       {std::string(65, 'a') + "=" + good},
       Config(),
       absl::StatusCode::kInvalidArgument,
       "the name is not 1 to 64"},
      {"twice", {"a=" + good, "a=" + good}, Config(), absl::StatusCode::kInvalidArgument, "the name is given twice"},
      {"too many", std::vector<std::string>(65, "a=b"), Config(), absl::StatusCode::kInvalidArgument,
       many + " states; at most 64"},
      {"not there", {"a=/no/such.pth"}, Config(), absl::StatusCode::kNotFound, "\"a=/no/such.pth\": "},
      {"of another model",
       {"a=" + good},
       deeper,
       absl::StatusCode::kInvalidArgument,
       "good.pth: there is no blocks.3.att.time_state"},
      {"RWKV-4", {"a=" + good}, version_4, absl::StatusCode::kFailedPrecondition, "no matrix states"},
  };
  for (const auto& test : kCases) {
    SCOPED_TRACE(test.name);
    EXPECT_THAT(LoadTunedStates(test.entries, test.config, {0, test.config.layer_count}),
                StatusIs(test.code, HasSubstr(test.message)));
  }
}

}  // namespace
}  // namespace rwkv::worker
