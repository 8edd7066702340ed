#include "services/checkpoint/session_state.h"

#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/checkpoint/formats/element_type.h"
#include "services/checkpoint/formats/mapped_file.h"
#include "tests/testing/checkpoint_writer.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::checkpoint {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::RawTensor;
using testing::StatusIs;

using Metadata = std::map<std::string, std::string>;

constexpr char kFingerprint[] = "0123456789abcdef0123456789abcdef";

// Twelve layers, so that their order by name is another than by number.
constexpr int kLayers = 12;

StateModel Model() {
  StateModel model;
  model.fingerprint = kFingerprint;
  model.layer_count = kLayers;
  model.vocab_size = 10;
  model.layout = {{"att.x_prev", {2}}, {"att.state", {1, 2, 2}}, {"ffn.x_prev", {2}}};
  return model;
}

template <typename T>
std::string BytesOf(const std::vector<T>& values) {
  return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

RawTensor Floats(const std::string& name, std::vector<int64_t> shape, float first) {
  RawTensor tensor{{name, ElementType::kFloat32, std::move(shape)}, ""};
  std::vector<float> values;
  for (int64_t i = 0; i < testing::ElementsOf(tensor.spec); ++i) values.push_back(first + static_cast<float>(i));
  tensor.data = BytesOf(values);
  return tensor;
}

RawTensor Tokens(const std::vector<int32_t>& ids) {
  return {{"token_ids", ElementType::kInt32, {static_cast<int64_t>(ids.size())}}, BytesOf(ids)};
}

// Layer n's elements are 10 n, 10 n + 1, ... over all of its tensors.
std::vector<RawTensor> Exported() {
  std::vector<RawTensor> tensors;
  for (int layer = 0; layer < kLayers; ++layer) {
    const float first = 10.0f * static_cast<float>(layer);
    tensors.push_back(Floats(absl::StrCat("blocks.", layer, ".ffn.x_prev"), {2}, first + 6));
    tensors.push_back(Floats(absl::StrCat("blocks.", layer, ".att.state"), {1, 2, 2}, first + 2));
    tensors.push_back(Floats(absl::StrCat("blocks.", layer, ".att.x_prev"), {2}, first));
  }
  return tensors;
}

std::vector<RawTensor> Tuned() {
  std::vector<RawTensor> tensors;
  for (int layer = 0; layer < kLayers; ++layer) {
    tensors.push_back(Floats(absl::StrCat("blocks.", layer, ".att.time_state"), {1, 2, 2}, static_cast<float>(layer)));
  }
  return tensors;
}

Metadata ExportedMetadata() { return {{"model_fingerprint", kFingerprint}, {"position", "3"}}; }

absl::StatusOr<std::unique_ptr<const SessionState>> Open(const std::string& bytes, StateModel model = Model()) {
  const std::string path = absl::StrCat(::testing::TempDir(), "/session_state");
  EXPECT_OK(testing::WriteFileAtomically(path, bytes));
  absl::StatusOr<std::unique_ptr<MappedFile>> file = MappedFile::Open(path);
  if (!file.ok()) return file.status();
  return SessionState::Open(*std::move(file), std::move(model));
}

absl::Status OpenStatus(const std::vector<RawTensor>& tensors, const Metadata& metadata = ExportedMetadata()) {
  return Open(testing::SafetensorsBytes(tensors, metadata)).status();
}

TEST(SessionStateTest, AnExportGivesRecordsLayerByLayer) {
  ASSERT_OK_AND_ASSIGN(const auto state, Open(testing::SafetensorsBytes(Exported(), ExportedMetadata())));
  EXPECT_EQ(state->position(), 3);
  EXPECT_FALSE(state->is_tuned());
  EXPECT_EQ(state->initial_state(), "");
  EXPECT_TRUE(state->token_ids().empty());
  for (int layer = 0; layer < kLayers; ++layer) {
    std::vector<float> expected;
    for (int i = 0; i < 8; ++i) expected.push_back(static_cast<float>(10 * layer + i));
    ASSERT_OK_AND_ASSIGN(const std::string record, state->Record(layer));
    EXPECT_EQ(record, BytesOf(expected)) << layer;
  }
}

TEST(SessionStateTest, AnExportMayHaveItsLog) {
  std::vector<RawTensor> tensors = Exported();
  tensors.push_back(Tokens({7, 0, 9}));
  Metadata metadata = ExportedMetadata();
  metadata["initial_state"] = "poet@12345678";
  ASSERT_OK_AND_ASSIGN(const auto state, Open(testing::SafetensorsBytes(tensors, metadata)));
  EXPECT_THAT(state->token_ids(), ElementsAre(7, 0, 9));
  EXPECT_EQ(state->initial_state(), "poet@12345678");
}

TEST(SessionStateTest, ATunedStateOfAnyContainerIsZerosBesideItsMatrices) {
  for (const std::string& bytes :
       {testing::SafetensorsBytes(Tuned()), testing::TorchZipBytes(Tuned()), testing::TorchLegacyBytes(Tuned())}) {
    ASSERT_OK_AND_ASSIGN(const auto state, Open(bytes));
    EXPECT_TRUE(state->is_tuned());
    EXPECT_EQ(state->position(), 0);
    ASSERT_OK_AND_ASSIGN(const std::string record, state->Record(11));
    EXPECT_EQ(record, BytesOf(std::vector<float>{0, 0, 11, 12, 13, 14, 0, 0}));
  }
}

TEST(SessionStateTest, ATunedStateOfHalfPrecisionIsWidened) {
  std::vector<RawTensor> tensors = Tuned();
  tensors[0].spec.type = ElementType::kBFloat16;
  tensors[0].data = BytesOf(std::vector<uint16_t>{0x3f80, 0x4000, 0xbf80, 0});
  tensors[1].spec.type = ElementType::kFloat16;
  tensors[1].data = BytesOf(std::vector<uint16_t>{0x3c00, 0x4000, 0xbc00, 0});
  ASSERT_OK_AND_ASSIGN(const auto state, Open(testing::TorchZipBytes(tensors)));
  for (const int layer : {0, 1}) {
    ASSERT_OK_AND_ASSIGN(const std::string record, state->Record(layer));
    EXPECT_EQ(record, BytesOf(std::vector<float>{0, 0, 1, 2, -1, 0, 0, 0})) << layer;
  }
}

TEST(SessionStateTest, AnotherModelsStateIsRefusedNamingWhatDiffers) {
  Metadata metadata = ExportedMetadata();
  metadata["model_fingerprint"] = "ffff";
  EXPECT_THAT(OpenStatus(Exported(), metadata),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       HasSubstr(absl::StrCat("fingerprint \"ffff\"; the one that is served has ", kFingerprint))));
  std::vector<RawTensor> tensors = Exported();
  tensors[1] = Floats("blocks.0.att.state", {1, 4, 4}, 0);
  EXPECT_THAT(OpenStatus(tensors, metadata),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       HasSubstr("blocks.0.att.state has shape [1, 4, 4]; the model's states have [1, 2, 2]")));
  EXPECT_THAT(OpenStatus(tensors), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("has shape [1, 4, 4]")));
  tensors = Tuned();
  tensors[2] = Floats("blocks.2.att.time_state", {2, 2, 2}, 0);
  EXPECT_THAT(Open(testing::TorchZipBytes(tensors)),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("blocks.2.att.time_state has shape")));
  EXPECT_THAT(OpenStatus(Tuned(), {{"model_fingerprint", "ffff"}}), StatusIs(absl::StatusCode::kFailedPrecondition));
  StateModel rwkv4 = Model();
  rwkv4.layout = {{"att.x_prev", {2}}};
  EXPECT_THAT(Open(testing::TorchZipBytes(Tuned()), rwkv4),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("no matrix states")));
}

TEST(SessionStateTest, WhatIsMissingOrTooMuchIsNamed) {
  for (const size_t missing : {0, 1, 35}) {
    std::vector<RawTensor> tensors = Exported();
    const std::string name = tensors[missing].spec.name;
    tensors.erase(tensors.begin() + static_cast<ptrdiff_t>(missing));
    EXPECT_THAT(OpenStatus(tensors),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(absl::StrCat("there is no tensor ", name))));
  }
  for (const char* name : {"blocks.12.att.state", "emb.weight", "blocks.0.att.key.weight"}) {
    std::vector<RawTensor> tensors = Exported();
    tensors.push_back(Floats(name, {1, 2, 2}, 0));
    EXPECT_THAT(OpenStatus(tensors), StatusIs(absl::StatusCode::kInvalidArgument,
                                              HasSubstr(absl::StrCat("tensor \"", name, "\" is no part of a state"))));
    tensors = Tuned();
    tensors.push_back(Floats(name, {1, 2, 2}, 0));
    EXPECT_THAT(OpenStatus(tensors, {}), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(name)));
  }
  std::vector<RawTensor> tensors = Tuned();
  tensors.push_back(Tokens({1, 2, 3}));
  EXPECT_THAT(OpenStatus(tensors), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("token_ids")));
  tensors = Tuned();
  tensors.pop_back();
  EXPECT_THAT(Open(testing::TorchZipBytes(tensors)),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("no tensor blocks.11.att.time_state")));
}

TEST(SessionStateTest, ValuesAreFiniteAndOfTheirType) {
  for (const float bad : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    std::vector<RawTensor> tensors = Exported();
    std::memcpy(&tensors[31].data[4], &bad, sizeof(bad));  // blocks.10.att.state
    EXPECT_THAT(OpenStatus(tensors),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("element 1 of blocks.10.att.state is")));
    tensors = Tuned();
    std::memcpy(&tensors[3].data[12], &bad, sizeof(bad));
    EXPECT_THAT(Open(testing::TorchZipBytes(tensors)),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("element 3 of blocks.3.att.time_state is")));
  }
  std::vector<RawTensor> tensors = Exported();
  tensors[0].spec.type = ElementType::kFloat16;
  tensors[0].data.resize(4);
  EXPECT_THAT(OpenStatus(tensors), StatusIs(absl::StatusCode::kInvalidArgument,
                                            HasSubstr("blocks.0.ffn.x_prev is fp16; it has to be fp32")));
  tensors = Exported();
  tensors[0].spec.type = ElementType::kFloat64;
  tensors[0].data.resize(16);
  EXPECT_THAT(OpenStatus(tensors), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("is fp64")));
  tensors = Tuned();
  tensors[0].spec.type = ElementType::kInt32;
  EXPECT_THAT(OpenStatus(tensors, {}), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("is int32")));
}

TEST(SessionStateTest, WhatItSaysOfItselfIsChecked) {
  const struct {
    const char* key;
    const char* value;  // Null: not there.
    const char* message;
  } kCases[] = {
      {"model_fingerprint", nullptr, "no model_fingerprint"},
      {"position", nullptr, "no position"},
      {"position", "-1", "\"-1\""},
      {"position", "3x", "\"3x\""},
      {"position", "2147483649", "no number from 0 to 2147483648"},
      {"position", "99999999999999999999999", "no number"},
  };
  for (const auto& test : kCases) {
    Metadata metadata = ExportedMetadata();
    metadata.erase(test.key);
    if (test.value != nullptr) metadata[test.key] = test.value;
    EXPECT_THAT(OpenStatus(Exported(), metadata),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(test.message)));
  }
  Metadata metadata = ExportedMetadata();
  metadata["initial_state"] = std::string(129, 'x');
  EXPECT_THAT(OpenStatus(Exported(), metadata), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("129 bytes")));
}

TEST(SessionStateTest, TheLogIsWholeAndOfTheModelsTokens) {
  const struct {
    std::vector<int32_t> ids;
    const char* message;
  } kCases[] = {
      {{1, 2}, "2 tokens; the position is 3"},
      {{1, 2, 3, 4}, "4 tokens"},
      {{1, 10, 3}, "token 1 is 10; the model has ids below 10"},
      {{-1, 2, 3}, "token 0 is -1"},
  };
  for (const auto& test : kCases) {
    std::vector<RawTensor> tensors = Exported();
    tensors.push_back(Tokens(test.ids));
    EXPECT_THAT(OpenStatus(tensors), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(test.message)));
  }
  std::vector<RawTensor> tensors = Exported();
  tensors.push_back(Floats("token_ids", {3}, 0));
  EXPECT_THAT(OpenStatus(tensors), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("has to be int32")));
  tensors.pop_back();
  tensors.push_back({{"token_ids", ElementType::kInt32, {(1 << 19) + 1}}, std::string(((1 << 19) + 1) * 4, '\0')});
  Metadata metadata = ExportedMetadata();
  metadata["position"] = absl::StrCat((1 << 19) + 1);
  EXPECT_THAT(OpenStatus(tensors, metadata), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("at most 524288")));
}

TEST(SessionStateTest, TheChecksumIsOfAllThatIsBehindTheHeader) {
  Metadata metadata = ExportedMetadata();
  std::string payload;
  for (const RawTensor& tensor : Exported()) payload += tensor.data;
  metadata["xxh3"] = SessionStateChecksum({payload});
  EXPECT_EQ(metadata["xxh3"], SessionStateChecksum({absl::string_view(payload).substr(0, 5), payload.substr(5)}));
  std::string bytes = testing::SafetensorsBytes(Exported(), metadata);
  EXPECT_OK(Open(bytes));
  for (const size_t at : {bytes.size() - payload.size(), bytes.size() - 1}) {
    std::string other = bytes;
    other[at] = static_cast<char>(other[at] ^ 1);
    EXPECT_THAT(Open(other), StatusIs(absl::StatusCode::kDataLoss, HasSubstr(metadata["xxh3"])));
  }
}

TEST(SessionStateTest, OtherFilesAndCutOnesAreRefused) {
  const std::string bytes = testing::SafetensorsBytes(Exported(), ExportedMetadata());
  const std::string tuned = testing::TorchZipBytes(Tuned());
  for (const size_t size : {size_t{1}, size_t{7}, size_t{100}, bytes.size() - 1}) {
    EXPECT_FALSE(Open(bytes.substr(0, size)).ok()) << size;
    EXPECT_FALSE(Open(tuned.substr(0, size)).ok()) << size;
  }
  EXPECT_THAT(Open("not a state at all, but a text"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("no state file")));
  EXPECT_THAT(Open(testing::GgufBytes({testing::GgufText("general.architecture", "rwkv7")}, {})),
              StatusIs(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(Open(testing::SafetensorsBytes({})), StatusIs(absl::StatusCode::kInvalidArgument));
}

TEST(SessionStateTest, WhateverFitsIsWithinTheBoundOfAFile) {
  EXPECT_EQ(Model().RecordBytes(), 8 * 4);
  std::vector<RawTensor> tensors = Exported();
  tensors.push_back({{"token_ids", ElementType::kInt32, {1 << 19}}, std::string((1 << 19) * 4, '\0')});
  Metadata metadata = ExportedMetadata();
  metadata["position"] = absl::StrCat(1 << 19);
  metadata["initial_state"] = std::string(128, 'x');
  const std::string bytes = testing::SafetensorsBytes(tensors, metadata);
  EXPECT_OK(Open(bytes));
  EXPECT_LE(static_cast<int64_t>(bytes.size()), Model().MaxFileBytes());
  EXPECT_LE(static_cast<int64_t>(testing::TorchZipBytes(Tuned()).size()), Model().MaxFileBytes());
}

}  // namespace
}  // namespace rwkv::checkpoint
