#include "services/checkpoint/initial_state.h"

#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/checkpoint/checkpoint.h"
#include "services/checkpoint/formats/element_type.h"
#include "services/checkpoint/model_config.h"
#include "tests/testing/checkpoint_writer.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::checkpoint {
namespace {

using testing::HasSubstr;
using testing::RawTensor;
using testing::StatusIs;

ModelConfig Config() {
  ModelConfig config;
  config.layer_count = 3;
  config.head_count = 2;
  config.head_size = 2;
  return config;
}

// first, first + 1, ...
RawTensor State(int layer, float first, std::vector<int64_t> shape = {2, 2, 2}) {
  RawTensor tensor{{absl::StrCat("blocks.", layer, ".att.time_state"), ElementType::kFloat32, std::move(shape)}, ""};
  for (int64_t i = 0; i < testing::ElementsOf(tensor.spec); ++i) {
    const float value = first + static_cast<float>(i);
    tensor.data.append(reinterpret_cast<const char*>(&value), sizeof(value));
  }
  return tensor;
}

std::shared_ptr<const Checkpoint> Opened(const std::vector<RawTensor>& tensors) {
  const std::string path = absl::StrCat(::testing::TempDir(), "/states.pth");
  EXPECT_OK(testing::WriteFileAtomically(path, testing::TorchZipBytes(tensors)));
  return *Checkpoint::Open(path);
}

TEST(InitialStateTest, LoadsTheLayersAskedFor) {
  const auto checkpoint = Opened({State(2, 20), State(0, 0), State(1, 10)});
  ASSERT_OK_AND_ASSIGN(const auto states, LoadInitialStates(*checkpoint, Config(), 1, 3));
  EXPECT_EQ(states,
            (std::vector<std::vector<float>>{{10, 11, 12, 13, 14, 15, 16, 17}, {20, 21, 22, 23, 24, 25, 26, 27}}));
}

TEST(InitialStateTest, WhatIsNotTheModelsStatesIsRefusedByName) {
  const float infinity = std::numeric_limits<float>::infinity();
  RawTensor integers = State(2, 0);
  integers.spec.type = ElementType::kInt32;
  ModelConfig without_states = Config();
  without_states.head_count = without_states.head_size = 0;
  const struct {
    const char* name;
    ModelConfig config;
    std::vector<RawTensor> tensors;
    absl::StatusCode code;
    const char* message;
  } kCases[] = {
      {"a layer is missing",
       Config(),
       {State(0, 0), State(2, 0)},
       absl::StatusCode::kInvalidArgument,
       "states.pth: there is no blocks.1.att.time_state"},
      {"a layer too many",
       Config(),
       {State(0, 0), State(1, 0), State(2, 0), State(3, 0)},
       absl::StatusCode::kInvalidArgument,
       "\"blocks.3.att.time_state\" is no tuned state of a model of 3 layers"},
      {"another shape",
       Config(),
       {State(0, 0), State(1, 0, {2, 4}), State(2, 0)},
       absl::StatusCode::kInvalidArgument,
       "blocks.1.att.time_state is fp32 [2, 4]; the model's states are [2, 2, 2]"},
      {"another type",
       Config(),
       {State(0, 0), State(1, 0), integers},
       absl::StatusCode::kInvalidArgument,
       "blocks.2.att.time_state is int32"},
      {"a whole model",
       Config(),
       {State(0, 0), State(1, 0), State(2, 0), {{"emb.weight", ElementType::kUint8, {1}}, "x"}},
       absl::StatusCode::kInvalidArgument,
       "\"emb.weight\" is no tuned state"},
      {"infinite",
       Config(),
       {State(0, 0), State(1, infinity), State(2, 0)},
       absl::StatusCode::kDataLoss,
       "element 0 of blocks.1.att.time_state is inf"},
      {"RWKV-4", without_states, {State(0, 0)}, absl::StatusCode::kFailedPrecondition, "no matrix states"},
  };
  for (const auto& test : kCases) {
    SCOPED_TRACE(test.name);
    EXPECT_THAT(LoadInitialStates(*Opened(test.tensors), test.config, 0, test.config.layer_count),
                StatusIs(test.code, HasSubstr(test.message)));
  }
}

}  // namespace
}  // namespace rwkv::checkpoint
