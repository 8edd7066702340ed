#include "services/worker/model/weights.h"

#include <fstream>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/dtype.h"
#include "kernels/base/matrix.h"
#include "services/checkpoint/checkpoint.h"
#include "services/checkpoint/fingerprint.h"
#include "services/checkpoint/formats/element_type.h"
#include "services/checkpoint/model_config.h"
#include "services/worker/model/layer_range.h"
#include "tests/testing/checkpoint_writer.h"
#include "tests/testing/random_model.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

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

std::vector<float> Floats(const kernels::MatrixView& matrix) {
  std::vector<float> values(matrix.rows * matrix.cols);
  kernels::WidenToFloat(matrix.dtype, matrix.data, static_cast<int64_t>(values.size()), values.data());
  return values;
}

std::vector<float> Transposed(const std::vector<float>& values, int64_t rows, int64_t cols) {
  std::vector<float> out(values.size());
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) out[c * rows + r] = values[r * cols + c];
  }
  return out;
}

class WeightsOfEveryTypeTest : public ::testing::TestWithParam<DType> {};

TEST_P(WeightsOfEveryTypeTest, EveryTensorArrivesAtItsPlace) {
  const Model model = Open(*testing::MakeRandomModel(Options(GetParam())));
  ASSERT_OK_AND_ASSIGN(const auto weights, StageWeights::Load(model.checkpoint, model.config, {0, 3}));
  const int64_t D = 48, A = 32, F = 192, V = 11;
  EXPECT_TRUE(weights->is_first());
  EXPECT_TRUE(weights->is_last());

  const auto expect_matrix = [&](const kernels::MatrixView& matrix, const std::string& name, int64_t rows,
                                 int64_t cols) {
    SCOPED_TRACE(name);
    EXPECT_EQ(matrix.dtype, GetParam());
    EXPECT_EQ(matrix.rows, rows);
    EXPECT_EQ(matrix.cols, cols);
    EXPECT_EQ(Floats(matrix), model.Expected(name));
    EXPECT_EQ(matrix.data, model.checkpoint->Read(name)->data) << "a view of the file, not a copy";
  };
  const auto expect_transposed = [&](const kernels::MatrixView& matrix, const std::string& name, int64_t rows,
                                     int64_t cols) {
    SCOPED_TRACE(name);
    EXPECT_EQ(matrix.dtype, GetParam());
    EXPECT_EQ(matrix.rows, rows);
    EXPECT_EQ(matrix.cols, cols);
    EXPECT_EQ(Floats(matrix), Transposed(model.Expected(name), cols, rows));
  };
  const auto expect_norm = [&](const NormWeights& norm, const std::string& name) {
    EXPECT_EQ(norm.weight, model.Expected(absl::StrCat(name, ".weight"))) << name;
    EXPECT_EQ(norm.bias, model.Expected(absl::StrCat(name, ".bias"))) << name;
  };

  expect_matrix(weights->embedding(), "emb.weight", V, D);
  expect_matrix(weights->head(), "head.weight", V, D);
  expect_norm(weights->ln0(), "blocks.0.ln0");
  expect_norm(weights->ln_out(), "ln_out");
  for (int i = 0; i < 3; ++i) {
    const LayerWeights& layer = weights->layer(i);
    const std::string block = absl::StrCat("blocks.", i, ".");
    const std::string att = block + "att.";
    const std::string ffn = block + "ffn.";
    expect_norm(layer.ln1, block + "ln1");
    expect_norm(layer.ln2, block + "ln2");
    expect_norm(layer.ln_x, att + "ln_x");
    const std::pair<const std::vector<float>*, std::string> vectors[] = {
        {&layer.x_r, "x_r"}, {&layer.x_w, "x_w"}, {&layer.x_k, "x_k"}, {&layer.x_v, "x_v"},
        {&layer.x_a, "x_a"}, {&layer.x_g, "x_g"}, {&layer.w0, "w0"},   {&layer.a0, "a0"},
        {&layer.k_k, "k_k"}, {&layer.k_a, "k_a"}, {&layer.r_k, "r_k"}, {&layer.initial_state, "time_state"}};
    for (const auto& [vector, name] : vectors) EXPECT_EQ(*vector, model.Expected(att + name)) << name;
    EXPECT_EQ(layer.initial_state.size(), A * 16);
    EXPECT_EQ(layer.ffn_x_k, model.Expected(ffn + "x_k"));
    expect_matrix(layer.receptance, att + "receptance.weight", A, D);
    expect_matrix(layer.key, att + "key.weight", A, D);
    expect_matrix(layer.value, att + "value.weight", A, D);
    expect_matrix(layer.output, att + "output.weight", D, A);
    expect_matrix(layer.ffn_key, ffn + "key.weight", F, D);
    expect_matrix(layer.ffn_value, ffn + "value.weight", D, F);
    expect_transposed(layer.w1, att + "w1", 5, D);
    expect_transposed(layer.w2, att + "w2", A, 5);
    expect_transposed(layer.a1, att + "a1", 32, D);
    expect_transposed(layer.a2, att + "a2", A, 32);
    expect_transposed(layer.g1, att + "g1", 64, D);
    expect_transposed(layer.g2, att + "g2", A, 64);
    if (i == 0) {
      EXPECT_TRUE(layer.v0.empty());
      EXPECT_EQ(layer.v1.data, nullptr);
      EXPECT_EQ(layer.v2.data, nullptr);
    } else {
      EXPECT_EQ(layer.v0, model.Expected(att + "v0"));
      expect_transposed(layer.v1, att + "v1", 32, D);
      expect_transposed(layer.v2, att + "v2", A, 32);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Types, WeightsOfEveryTypeTest,
                         ::testing::Values(DType::kFloat32, DType::kBFloat16, DType::kFloat16),
                         [](const auto& info) { return std::string(kernels::Name(info.param)); });

TEST(StageWeightsTest, AStageHoldsItsLayersOnly) {
  const Model model = Open(*testing::MakeRandomModel(Options(DType::kBFloat16)));
  ASSERT_OK_AND_ASSIGN(const auto first, StageWeights::Load(model.checkpoint, model.config, {0, 1}));
  ASSERT_OK_AND_ASSIGN(const auto middle, StageWeights::Load(model.checkpoint, model.config, {1, 2}));
  ASSERT_OK_AND_ASSIGN(const auto last, StageWeights::Load(model.checkpoint, model.config, {2, 3}));
  EXPECT_NE(first->embedding().data, nullptr);
  EXPECT_EQ(first->head().data, nullptr);
  EXPECT_EQ(middle->embedding().data, nullptr);
  EXPECT_EQ(middle->head().data, nullptr);
  EXPECT_TRUE(middle->ln0().weight.empty());
  EXPECT_TRUE(middle->ln_out().weight.empty());
  EXPECT_EQ(last->embedding().data, nullptr);
  EXPECT_NE(last->head().data, nullptr);
  EXPECT_EQ(last->layer(2).w0, model.Expected("blocks.2.att.w0"));
}

TEST(StageWeightsTest, ATorchFileGivesTheSameWeights) {
  const Model safetensors = Open(*testing::MakeRandomModel(Options(DType::kFloat16)));
  ASSERT_OK_AND_ASSIGN(const auto a, StageWeights::Load(safetensors.checkpoint, safetensors.config, {0, 3}));
  const Model pth = Open(*testing::MakeRandomModel(Options(DType::kFloat16)), /*as_pth=*/true);
  EXPECT_EQ(pth.checkpoint->format(), "pth");
  ASSERT_OK_AND_ASSIGN(const auto b, StageWeights::Load(pth.checkpoint, pth.config, {0, 3}));
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(Floats(a->layer(i).ffn_key), Floats(b->layer(i).ffn_key));
    EXPECT_EQ(Floats(a->layer(i).w2), Floats(b->layer(i).w2));
    EXPECT_EQ(a->layer(i).r_k, b->layer(i).r_k);
  }
}

TEST(StageWeightsTest, AnEmbeddingThatIsNormalisedHasNoLn0) {
  RandomModelOptions options = Options(DType::kBFloat16);
  options.ln0 = false;
  const Model model = Open(*testing::MakeRandomModel(options));
  ASSERT_OK_AND_ASSIGN(const auto weights, StageWeights::Load(model.checkpoint, model.config, {0, 3}));
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

TEST(StageWeightsTest, AStageHasItsOwnSharePagesInMemoryOnly) {
  RandomModelOptions options;
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

  const auto share = [&](const std::vector<std::string>& prefixes) {
    int64_t bytes = 0;
    for (const checkpoint::TensorInfo& info : checkpoint->tensors()) {
      for (const std::string& prefix : prefixes) bytes += absl::StartsWith(info.name, prefix) ? info.bytes : 0;
    }
    return bytes;
  };
  ASSERT_OK_AND_ASSIGN(const auto weights, StageWeights::Load(checkpoint, config, {2, 4}));
  const int64_t mine = share({"blocks.2.", "blocks.3."});
  const int64_t resident = ResidentBytes("large.safetensors");
  EXPECT_GE(resident, mine) << "the test sees the pages at all";
  EXPECT_LE(resident, mine + mine / 10);
  EXPECT_LT(resident, checkpoint->file_bytes() / 3);
}

TEST(StageWeightsTest, LayersOutsideTheModelAreRefused) {
  const Model model = Open(*testing::MakeRandomModel(Options(DType::kBFloat16)));
  for (const LayerRange& layers :
       {LayerRange{0, 0}, LayerRange{2, 1}, LayerRange{-1, 2}, LayerRange{0, 4}, LayerRange{3, 4}}) {
    EXPECT_THAT(StageWeights::Load(model.checkpoint, model.config, layers),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(layers.ToString())));
  }
}

TEST(StageWeightsTest, AConfigOfAnotherModelIsRefused) {
  const Model model = Open(*testing::MakeRandomModel(Options(DType::kBFloat16)));
  checkpoint::ModelConfig config = model.config;
  config.width = 64;
  EXPECT_THAT(StageWeights::Load(model.checkpoint, config, {0, 3}),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("emb.weight")));
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
        EXPECT_THAT(StageWeights::Load(model.checkpoint, model.config, {0, 3}),
                    StatusIs(absl::StatusCode::kDataLoss,
                             HasSubstr(absl::StrCat("element ", last, " of tensor \"", name, "\""))));
        // A stage reads, and vouches for, its own layers only.
        const bool is_mine = absl::StartsWith(name, "emb");
        EXPECT_EQ(StageWeights::Load(model.checkpoint, model.config, {0, 1}).ok(), !is_mine);
      }
    }
  }
}

TEST(StageWeightsTest, TheLargestFiniteWeightIsFine) {
  std::vector<RawTensor> tensors = *testing::MakeRandomModel(Options(DType::kFloat16));
  const float largest = -65504;
  kernels::NarrowFromFloat(DType::kFloat16, &largest, 1, &tensors[0].data[0]);
  const Model model = Open(std::move(tensors));
  EXPECT_OK(StageWeights::Load(model.checkpoint, model.config, {0, 3}));
}

}  // namespace
}  // namespace rwkv::worker
