#include "services/worker/model/weights.h"

#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>
#include <memory>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/types/span.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/device.h"
#include "kernels/base/dtype.h"
#include "kernels/base/host_device.h"
#include "kernels/base/matrix.h"
#include "kernels/base/stream.h"
#include "kernels/base/weight.h"
#include "kernels/dispatch/open_device.h"
#include "services/checkpoint/checkpoint.h"
#include "services/checkpoint/fingerprint.h"
#include "services/checkpoint/formats/element_type.h"
#include "services/checkpoint/model_config.h"
#include "services/checkpoint/model_tensors.h"
#include "services/worker/model/layer_range.h"
#include "tests/testing/checkpoint_writer.h"
#include "tests/testing/random_model.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

using checkpoint::ModelVersion;
using kernels::DType;
using testing::HasSubstr;
using testing::RandomModelOptions;
using testing::RawTensor;
using testing::StatusIs;

RandomModelOptions Options(DType dtype) {
  RandomModelOptions options;
  options.layers = 3;
  options.width = 48;
  options.attention_width = 32;
  options.head_size = 16;
  options.vocab_size = 11;
  options.decay_rank = 5;
  options.time_state = true;
  options.dtype = dtype;
  return options;
}

struct Model {
  std::vector<RawTensor> tensors;
  std::shared_ptr<const checkpoint::Checkpoint> checkpoint;
  checkpoint::ModelConfig config;

  // The tensor's elements as floats, in the file's order.
  std::vector<float> Expected(const std::string& name) const {
    for (const RawTensor& tensor : tensors) {
      if (tensor.spec.name != name) continue;
      std::vector<float> values(testing::ElementsOf(tensor.spec));
      kernels::WidenToFloat(*checkpoint::WeightDType(tensor.spec.type), tensor.data.data(),
                            static_cast<int64_t>(values.size()), values.data());
      return values;
    }
    ADD_FAILURE() << "no tensor " << name;
    return {};
  }
};

Model Open(std::vector<RawTensor> tensors, bool as_pth = false) {
  Model model;
  model.tensors = std::move(tensors);
  const std::string path = absl::StrCat(::testing::TempDir(), "/model");
  EXPECT_OK(testing::WriteFileAtomically(
      path, as_pth ? testing::TorchZipBytes(model.tensors) : testing::SafetensorsBytes(model.tensors)));
  model.checkpoint = *checkpoint::Checkpoint::Open(path);
  model.config = *checkpoint::ModelConfig::FromCheckpoint(*model.checkpoint);
  return model;
}

kernels::Device& TestDevice() {
  static kernels::Device* const device = kernels::OpenDevice("reference")->release();
  return *device;
}

std::vector<float> Floats(const kernels::MatrixView& matrix) {
  std::vector<float> values(matrix.rows * matrix.cols);
  kernels::WidenToFloat(matrix.dtype, matrix.data, static_cast<int64_t>(values.size()), values.data());
  return values;
}

std::vector<float> Floats(const kernels::Weight& weight) { return Floats(weight.matrix); }

std::vector<float> Floats(const DeviceFloats& values) {
  std::vector<float> out(values.size());
  const std::unique_ptr<kernels::Stream> stream = *TestDevice().NewStream();
  EXPECT_OK(stream->Copy(out.data(), values.data(), values.size_in_bytes()));
  EXPECT_OK(stream->Synchronize());
  return out;
}

std::vector<float> Transposed(const std::vector<float>& values, int64_t rows, int64_t cols) {
  std::vector<float> out(values.size());
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) out[c * rows + r] = values[r * cols + c];
  }
  return out;
}

// What a loaded vector holds of the file's elements.
float Transformed(checkpoint::Transform transform, float value) {
  switch (transform) {
    case checkpoint::Transform::kNone:
      return value;
    case checkpoint::Transform::kOneMinus:
      return 1 - value;
    case checkpoint::Transform::kExp:
      return std::exp(value);
    case checkpoint::Transform::kMinusExp:
      return -std::exp(value);
    case checkpoint::Transform::kExpMinusExp:
      return std::exp(-std::exp(value));
  }
  return value;
}

class EveryVersionAndTypeTest : public ::testing::TestWithParam<std::tuple<ModelVersion, DType>> {};

INSTANTIATE_TEST_SUITE_P(All, EveryVersionAndTypeTest,
                         ::testing::Combine(::testing::ValuesIn(checkpoint::kModelVersions),
                                            ::testing::Values(DType::kFloat32, DType::kBFloat16, DType::kFloat16)),
                         [](const auto& info) {
                           return absl::StrCat("Rwkv", absl::StrReplaceAll(Name(std::get<0>(info.param)), {{".", "_"}}),
                                               "_", kernels::Name(std::get<1>(info.param)));
                         });

TEST_P(EveryVersionAndTypeTest, EveryTensorArrivesAtItsPlace) {
  const ModelVersion version = std::get<0>(GetParam());
  const DType dtype = std::get<1>(GetParam());
  RandomModelOptions options = Options(dtype);
  options.version = version;
  const Model model = Open(*testing::MakeRandomModel(options));
  ASSERT_OK_AND_ASSIGN(const auto weights, StageWeights::Load(model.checkpoint, model.config, {0, 3}, TestDevice()));
  EXPECT_TRUE(weights->is_first());
  EXPECT_TRUE(weights->is_last());

  const auto expect_matrix = [&](const kernels::Weight& weight, const std::string& name) {
    const kernels::MatrixView& matrix = weight.matrix;
    const std::vector<int64_t>& shape = model.checkpoint->Find(name)->shape;
    EXPECT_EQ(matrix.dtype, dtype);
    EXPECT_EQ(matrix.rows, shape[0]);
    EXPECT_EQ(matrix.cols, shape[1]);
    EXPECT_EQ(Floats(matrix), model.Expected(name));
    EXPECT_EQ(matrix.data, model.checkpoint->Read(name)->data) << "a view of the file, not a copy";
  };
  const auto expect_norm = [&](const NormWeights& norm, const std::string& name) {
    EXPECT_EQ(Floats(norm.weight), model.Expected(absl::StrCat(name, ".weight"))) << name;
    EXPECT_EQ(Floats(norm.bias), model.Expected(absl::StrCat(name, ".bias"))) << name;
  };
  expect_matrix(weights->embedding(), "emb.weight");
  expect_matrix(weights->head(), "head.weight");
  expect_norm(weights->ln0(), "blocks.0.ln0");
  expect_norm(weights->ln_out(), "ln_out");

  const absl::Span<const checkpoint::ModelTensor> specs = checkpoint::LayerTensors(version);
  size_t seen = 2 + 2 + 2;  // Tensors of the model's own.
  for (int i = 0; i < 3; ++i) {
    const WeightSet& layer = weights->layer(i);
    for (const checkpoint::ModelTensor& spec : specs) {
      const std::string name = absl::StrCat("blocks.", i, ".", spec.name);
      SCOPED_TRACE(name);
      if (spec.kind == checkpoint::Kind::kNorm) {
        expect_norm(layer.norm(spec.role), name);
        seen += 2;
        continue;
      }
      const checkpoint::TensorInfo* info = model.checkpoint->Find(name);
      if (info == nullptr) {
        const bool is_alternative = spec.role == Role::kBonus;
        EXPECT_TRUE(is_alternative || (i == 0 && spec.presence == checkpoint::Presence::kNotInLayer0));
        if (!is_alternative) {
          EXPECT_TRUE(layer.vector(spec.role).empty());
          EXPECT_EQ(layer.matrix(spec.role).matrix.data, nullptr);
        }
        continue;
      }
      ++seen;
      std::vector<float> expected = model.Expected(name);
      if (spec.kind == checkpoint::Kind::kMatrix) {
        expect_matrix(layer.matrix(spec.role), name);
      } else if (spec.role == Role::kShiftDown) {
        std::vector<float> parts;
        for (const kernels::Weight& part : layer.stack(spec.role)) {
          EXPECT_EQ(part.matrix.rows, info->shape[1] / 5);
          const std::vector<float> floats = Floats(part);
          parts.insert(parts.end(), floats.begin(), floats.end());
        }
        EXPECT_EQ(parts, Transposed(expected, info->shape[0], info->shape[1]));
      } else if (spec.kind == checkpoint::Kind::kLowRank) {
        EXPECT_EQ(layer.matrix(spec.role).matrix.rows, info->shape[1]);
        EXPECT_EQ(layer.matrix(spec.role).matrix.cols, info->shape[0]);
        EXPECT_EQ(Floats(layer.matrix(spec.role)), Transposed(expected, info->shape[0], info->shape[1]));
      } else if (spec.kind == checkpoint::Kind::kLowRankStack) {
        const absl::Span<const kernels::Weight> stack = layer.stack(spec.role);
        ASSERT_EQ(static_cast<int64_t>(stack.size()), info->shape[0]);
        const int64_t each = info->shape[1] * info->shape[2];
        for (int64_t f = 0; f < info->shape[0]; ++f) {
          EXPECT_EQ(stack[f].matrix.rows, info->shape[2]);
          EXPECT_EQ(stack[f].matrix.cols, info->shape[1]);
          const std::vector<float> part(expected.begin() + f * each, expected.begin() + (f + 1) * each);
          EXPECT_EQ(Floats(stack[f]), Transposed(part, info->shape[1], info->shape[2]));
        }
      } else {
        const size_t copies = spec.kind == checkpoint::Kind::kHeadVector ? 16 : 1;  // N
        const std::vector<float> got =
            spec.role == Role::kInitialState ? layer.initial_state() : Floats(layer.vector(spec.role));
        ASSERT_EQ(got.size(), expected.size() * copies);
        for (size_t n = 0; n < got.size(); ++n) {
          EXPECT_FLOAT_EQ(got[n], Transformed(spec.transform, expected[n / copies]));
        }
      }
    }
  }
  EXPECT_EQ(seen, model.tensors.size());
}

// Remembers what it was told to load for rows.
class RecordingDevice final : public kernels::HostDevice {
 public:
  absl::string_view name() const override { return "recording"; }
  absl::string_view numeric_family() const override { return "recording"; }
  const kernels::OpTable& ops() const override { return TestDevice().ops(); }
  absl::StatusOr<kernels::Weight> Load(const kernels::MatrixView& matrix, kernels::WeightUse use) override {
    (use == kernels::WeightUse::kRows ? rows : products).insert(matrix.data);
    return kernels::HostDevice::Load(matrix, use);
  }
  std::set<const void*> rows;
  std::set<const void*> products;
};

// A device lays out what is multiplied with in its own way; what is looked up must stay rows.
TEST(StageWeightsTest, DeviceIsToldWhatAMatrixIsFor) {
  RandomModelOptions options = Options(DType::kBFloat16);
  options.version = ModelVersion::k7b;
  const Model model = Open(*testing::MakeRandomModel(options));
  RecordingDevice device;
  ASSERT_OK_AND_ASSIGN(const auto weights, StageWeights::Load(model.checkpoint, model.config, {0, 3}, device));
  std::set<const void*> expected = {weights->embedding().matrix.data};
  for (int i = 0; i < 3; ++i) {
    for (Role role : {Role::kDeepEmbedTable, Role::kKeyTable, Role::kValueTable}) {
      expected.insert(weights->layer(i).matrix(role).matrix.data);
    }
  }
  EXPECT_EQ(device.rows, expected);
  EXPECT_EQ(device.products.count(weights->head().matrix.data), 1u);
  EXPECT_EQ(device.products.count(weights->layer(0).matrix(Role::kDeepEmbedMap).matrix.data), 1u);
}

TEST(StageWeightsTest, AStageHoldsItsLayersOnly) {
  const Model model = Open(*testing::MakeRandomModel(Options(DType::kBFloat16)));
  ASSERT_OK_AND_ASSIGN(const auto first, StageWeights::Load(model.checkpoint, model.config, {0, 1}, TestDevice()));
  ASSERT_OK_AND_ASSIGN(const auto middle, StageWeights::Load(model.checkpoint, model.config, {1, 2}, TestDevice()));
  ASSERT_OK_AND_ASSIGN(const auto last, StageWeights::Load(model.checkpoint, model.config, {2, 3}, TestDevice()));
  EXPECT_NE(first->embedding().matrix.data, nullptr);
  EXPECT_EQ(first->head().matrix.data, nullptr);
  EXPECT_EQ(middle->embedding().matrix.data, nullptr);
  EXPECT_EQ(middle->head().matrix.data, nullptr);
  EXPECT_TRUE(middle->ln0().weight.empty());
  EXPECT_TRUE(middle->ln_out().weight.empty());
  EXPECT_EQ(last->embedding().matrix.data, nullptr);
  EXPECT_NE(last->head().matrix.data, nullptr);
  EXPECT_EQ(Floats(last->layer(2).vector(Role::kDecay)), model.Expected("blocks.2.att.w0"));
}

TEST(StageWeightsTest, ATorchFileGivesTheSameWeights) {
  const Model safetensors = Open(*testing::MakeRandomModel(Options(DType::kFloat16)));
  ASSERT_OK_AND_ASSIGN(const auto a,
                       StageWeights::Load(safetensors.checkpoint, safetensors.config, {0, 3}, TestDevice()));
  const Model pth = Open(*testing::MakeRandomModel(Options(DType::kFloat16)), /*as_pth=*/true);
  EXPECT_EQ(pth.checkpoint->format(), "pth");
  ASSERT_OK_AND_ASSIGN(const auto b, StageWeights::Load(pth.checkpoint, pth.config, {0, 3}, TestDevice()));
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(Floats(a->layer(i).matrix(Role::kFfnKey)), Floats(b->layer(i).matrix(Role::kFfnKey)));
    EXPECT_EQ(Floats(a->layer(i).matrix(Role::kDecayUp)), Floats(b->layer(i).matrix(Role::kDecayUp)));
    EXPECT_EQ(Floats(a->layer(i).vector(Role::kBonus)), Floats(b->layer(i).vector(Role::kBonus)));
  }
}

TEST(StageWeightsTest, AnEmbeddingThatIsNormalisedHasNoLn0) {
  RandomModelOptions options = Options(DType::kBFloat16);
  options.ln0 = false;
  const Model model = Open(*testing::MakeRandomModel(options));
  ASSERT_OK_AND_ASSIGN(const auto weights, StageWeights::Load(model.checkpoint, model.config, {0, 3}, TestDevice()));
  EXPECT_TRUE(weights->ln0().weight.empty());
  EXPECT_TRUE(weights->ln0().bias.empty());
}

// Bytes of the file of this name that this process has in memory through its maps.
int64_t ResidentBytes(const std::string& name) {
  std::ifstream maps("/proc/self/smaps");
  int64_t kilobytes = 0;
  bool is_file = false;
  for (std::string line; std::getline(maps, line);) {
    if (line.find(" kB") == std::string::npos && line.find('-') != std::string::npos)
      is_file = absl::EndsWith(line, absl::StrCat("/", name));
    if (is_file && absl::StartsWith(line, "Rss:")) kilobytes += std::stol(line.substr(4));
  }
  return kilobytes * 1024;
}

class MemoryOfEveryVersionTest : public ::testing::TestWithParam<ModelVersion> {};

INSTANTIATE_TEST_SUITE_P(Versions, MemoryOfEveryVersionTest, ::testing::ValuesIn(checkpoint::kModelVersions),
                         [](const auto& info) {
                           return absl::StrCat("Rwkv", absl::StrReplaceAll(Name(info.param), {{".", "_"}}));
                         });

TEST_P(MemoryOfEveryVersionTest, AStageHasItsOwnSharePagesInMemoryOnly) {
  RandomModelOptions options;
  options.version = GetParam();
  options.layers = 8;
  options.width = 256;
  options.vocab_size = 4096;
  options.dtype = DType::kFloat32;
  const std::string path = absl::StrCat(::testing::TempDir(), "/large.safetensors");
  ASSERT_OK(testing::WriteRandomModel(options, path));
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, checkpoint::Checkpoint::Open(path));
  ASSERT_OK_AND_ASSIGN(const checkpoint::ModelConfig config, checkpoint::ModelConfig::FromCheckpoint(*checkpoint));
  ASSERT_OK(checkpoint::Fingerprint(*checkpoint));
  EXPECT_LE(ResidentBytes("large.safetensors"), 256 << 10) << "the header, and the pages the kernel maps around it";

  // Matrices stay in the file's pages; of what is copied out of the file no page stays.
  int64_t matrices = 0;
  const auto count = [&](absl::string_view prefix, const checkpoint::ModelTensor& tensor) {
    if (tensor.kind == checkpoint::Kind::kMatrix)
      matrices += checkpoint->Find(absl::StrCat(prefix, tensor.name))->bytes;
  };
  for (const checkpoint::ModelTensor& tensor : checkpoint::LayerTensors(GetParam())) {
    for (const char* block : {"blocks.2.", "blocks.3."}) count(block, tensor);
  }
  if (checkpoint::HasDeepEmbed(GetParam())) matrices += checkpoint->Find("emb.weight")->bytes;
  ASSERT_OK_AND_ASSIGN(const auto weights, StageWeights::Load(checkpoint, config, {2, 4}, TestDevice()));
  const int64_t resident = ResidentBytes("large.safetensors");
  EXPECT_GE(resident, matrices) << "the test sees the pages at all";
  EXPECT_LE(resident, matrices + matrices / 10);
}

// Keeps matrices in memory of its own.
class UploadingDevice final : public kernels::HostDevice {
 public:
  absl::string_view name() const override { return "uploading"; }
  absl::string_view numeric_family() const override { return "uploading"; }
  const kernels::OpTable& ops() const override { return TestDevice().ops(); }
  absl::StatusOr<kernels::Weight> Load(const kernels::MatrixView& matrix, kernels::WeightUse use) override {
    RWKV_ASSIGN_OR_RETURN(kernels::Weight weight, kernels::HostDevice::Load(matrix, use));
    const int64_t bytes = kernels::SizeInBytes(matrix);
    RWKV_ASSIGN_OR_RETURN(weight.packed, Allocate(bytes, kernels::MemoryKind::kDevice));
    std::memcpy(weight.packed.data(), matrix.data, static_cast<size_t>(bytes));
    weight.matrix.data = weight.packed.data();
    return weight;
  }
};

TEST(StageWeightsTest, WhatTheDeviceHasMadeAnewIsNotInMemoryTwice) {
  RandomModelOptions options;
  options.layers = 4;
  options.width = 256;
  options.dtype = DType::kFloat32;
  const std::string path = absl::StrCat(::testing::TempDir(), "/uploaded.safetensors");
  ASSERT_OK(testing::WriteRandomModel(options, path));
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, checkpoint::Checkpoint::Open(path));
  ASSERT_OK_AND_ASSIGN(const checkpoint::ModelConfig config, checkpoint::ModelConfig::FromCheckpoint(*checkpoint));
  UploadingDevice device;
  ASSERT_OK_AND_ASSIGN(const auto weights, StageWeights::Load(checkpoint, config, {0, 4}, device));
  EXPECT_LE(ResidentBytes("uploaded.safetensors"), 512 << 10);
  const checkpoint::TensorInfo* const info = checkpoint->Find("blocks.2.att.key.weight");
  EXPECT_EQ(std::memcmp(weights->layer(2).matrix(Role::kKey).matrix.data, checkpoint->Read(info->name)->data,
                        static_cast<size_t>(info->bytes)),
            0);
}

TEST(StageWeightsTest, QuantizedMatricesAreViews) {
  RecordingDevice device;  // Takes matrices as they are.
  for (bool is_int4 : {false, true}) {
    for (int64_t group : {32, 64}) {
      RandomModelOptions options = Options(DType::kBFloat16);
      options.ffn_width = 97;
      std::vector<RawTensor> tensors = *testing::MakeRandomModel(options);
      const std::string name = "blocks.1.ffn.value.weight";  // [48, 97]
      const int64_t groups = (97 + group - 1) / group;
      for (RawTensor& tensor : tensors) {
        if (tensor.spec.name != name) continue;
        tensor.spec.type = is_int4 ? checkpoint::ElementType::kUint8 : checkpoint::ElementType::kInt8;
        tensor.spec.shape = {48, is_int4 ? 49 : 97};
        tensor.data.assign(testing::ElementsOf(tensor.spec), '\x93');  // -109, or 3 and 9
      }
      const std::string halves(2 * 48 * groups, '\x38');  // 0x3838: 0.52734375
      tensors.push_back({{name + ".scale", checkpoint::ElementType::kFloat16, {48, groups}}, halves});
      if (is_int4) tensors.push_back({{name + ".min", checkpoint::ElementType::kFloat16, {48, groups}}, halves});
      const Model model = Open(tensors);
      ASSERT_OK_AND_ASSIGN(const auto weights, StageWeights::Load(model.checkpoint, model.config, {0, 3}, device));
      const kernels::MatrixView& matrix = weights->layer(1).matrix(Role::kFfnValue).matrix;
      EXPECT_EQ(matrix.data, model.checkpoint->Read(name)->data);
      EXPECT_EQ(matrix.rows, 48);
      EXPECT_EQ(matrix.cols, 97);
      EXPECT_EQ(matrix.group, group);
      EXPECT_EQ(matrix.minimums != nullptr, is_int4);
      const float half = 0.52734375f;
      EXPECT_EQ(kernels::LoadAsFloat(matrix, 47, 96), is_int4 ? 3 * half + half : -109 * half);
      if (is_int4) EXPECT_EQ(kernels::LoadAsFloat(matrix, 0, 1), 9 * half + half);

      tensors.back().data.back() = '\x7c';  // Infinity's exponent.
      const Model infinite = Open(tensors);
      EXPECT_THAT(StageWeights::Load(infinite.checkpoint, infinite.config, {0, 3}, TestDevice()),
                  StatusIs(absl::StatusCode::kDataLoss, HasSubstr(tensors.back().spec.name)));
    }
  }
}

TEST(StageWeightsTest, LayersOutsideTheModelAreRefused) {
  const Model model = Open(*testing::MakeRandomModel(Options(DType::kBFloat16)));
  for (const LayerRange& layers :
       {LayerRange{0, 0}, LayerRange{2, 1}, LayerRange{-1, 2}, LayerRange{0, 4}, LayerRange{3, 4}}) {
    EXPECT_THAT(StageWeights::Load(model.checkpoint, model.config, layers, TestDevice()),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(layers.ToString())));
  }
}

TEST(StageWeightsTest, AConfigOfAnotherModelIsRefused) {
  const Model model = Open(*testing::MakeRandomModel(Options(DType::kBFloat16)));
  checkpoint::ModelConfig config = model.config;
  for (checkpoint::Sizes& sizes : config.layer_sizes) {
    sizes = checkpoint::Sizes();
    ASSERT_TRUE(sizes.Set(checkpoint::Size::kWidth, 64));
    ASSERT_TRUE(sizes.Set(checkpoint::Size::kVocabulary, 11));
  }
  EXPECT_THAT(StageWeights::Load(model.checkpoint, config, {0, 3}, TestDevice()),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("ln_out.weight")));
}

TEST(StageWeightsTest, WeightsThatAreNotFiniteAreDataLoss) {
  const float kInfinity = std::numeric_limits<float>::infinity();
  const float kNan = std::numeric_limits<float>::quiet_NaN();
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (float bad : {kInfinity, -kInfinity, kNan}) {
      for (const char* name :
           {"emb.weight", "blocks.1.att.w0", "blocks.1.att.w1", "blocks.2.ffn.value.weight", "head.weight"}) {
        SCOPED_TRACE(absl::StrCat(kernels::Name(dtype), " ", bad, " in ", name));
        std::vector<RawTensor> tensors = *testing::MakeRandomModel(Options(dtype));
        int64_t last = 0;
        for (RawTensor& tensor : tensors) {
          if (tensor.spec.name != name) continue;
          last = testing::ElementsOf(tensor.spec) - 1;
          kernels::NarrowFromFloat(dtype, &bad, 1, &tensor.data[last * kernels::SizeOf(dtype)]);
        }
        const Model model = Open(std::move(tensors));
        EXPECT_THAT(StageWeights::Load(model.checkpoint, model.config, {0, 3}, TestDevice()),
                    StatusIs(absl::StatusCode::kDataLoss,
                             HasSubstr(absl::StrCat("element ", last, " of tensor \"", name, "\""))));
        // A stage reads, and vouches for, its own layers only.
        const bool is_mine = absl::StartsWith(name, "emb");
        EXPECT_EQ(StageWeights::Load(model.checkpoint, model.config, {0, 1}, TestDevice()).ok(), !is_mine);
      }
    }
  }
}

TEST(StageWeightsTest, TheLargestFiniteWeightIsFine) {
  std::vector<RawTensor> tensors = *testing::MakeRandomModel(Options(DType::kFloat16));
  const float largest = -65504;
  kernels::NarrowFromFloat(DType::kFloat16, &largest, 1, &tensors[0].data[0]);
  const Model model = Open(std::move(tensors));
  EXPECT_OK(StageWeights::Load(model.checkpoint, model.config, {0, 3}, TestDevice()));
}

}  // namespace
}  // namespace rwkv::worker
