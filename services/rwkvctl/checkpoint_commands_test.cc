// inspect and convert, as whole command lines.
#include <sys/resource.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/types/optional.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/dtype.h"
#include "kernels/base/matrix.h"
#include "kernels/base/quantize.h"
#include "nlohmann/json.hpp"
#include "services/checkpoint/checkpoint.h"
#include "services/checkpoint/formats/element_type.h"
#include "services/checkpoint/model_config.h"
#include "services/common/security/security.h"
#include "services/router/client/router_client.h"
#include "services/rwkvctl/command.h"
#include "services/rwkvctl/rwkvctl.h"
#include "tests/testing/checkpoint_writer.h"
#include "tests/testing/random_model.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::rwkvctl {
namespace {

using checkpoint::Checkpoint;
using checkpoint::ElementType;
using checkpoint::ModelConfig;
using checkpoint::TensorInfo;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::StartsWith;

// Ctrl-C as soon as somebody listens, or never.
class FakeInterrupts : public Interrupts {
 public:
  explicit FakeInterrupts(bool at_once) : at_once_(at_once) {}
  void SetHandler(std::function<void()> handler) override {
    if (at_once_ && handler) handler();
  }

 private:
  const bool at_once_;
};

class CheckpointCommandsTest : public ::testing::Test {
 protected:
  CheckpointCommandsTest()
      : folder_(std::filesystem::path(::testing::TempDir()) /
                ::testing::UnitTest::GetInstance()->current_test_info()->name()) {
    std::filesystem::remove_all(folder_);
    std::filesystem::create_directories(folder_);
  }
  ~CheckpointCommandsTest() override { std::filesystem::remove_all(folder_); }

  std::string Path(const std::string& name) const { return (folder_ / name).string(); }

  std::string WriteModel(kernels::DType dtype) const {
    testing::RandomModelOptions options;
    options.width = 72;
    options.head_size = 24;
    options.ffn_width = 100;
    options.decay_rank = 5;
    options.gate_rank = 7;
    options.dtype = dtype;
    options.time_state = true;
    EXPECT_OK(testing::WriteRandomModel(options, Path("model.safetensors")));
    return Path("model.safetensors");
  }

  // The exit status; there is neither a router nor a file that names one.
  int Call(const std::vector<std::string>& arguments) {
    std::istringstream in;
    std::ostringstream out, err;
    FakeInterrupts interrupts(interrupt_);
    const Environment environment{
        in,
        out,
        err,
        interrupts,
        false,
        false,
        false,
        Path("none"),
        [](const std::string&, const common::ClientSecurityOptions&) -> std::unique_ptr<router::RouterClient> {
          ADD_FAILURE() << "asked for a router";
          return nullptr;
        }};
    const int status = rwkvctl::Run(arguments, environment);
    out_ = out.str();
    err_ = err.str();
    return status;
  }

  // One line on standard error that says so.
  void ExpectFailure(const std::vector<std::string>& arguments, int status, const std::string& message) {
    EXPECT_EQ(Call(arguments), status) << out_ << err_;
    EXPECT_THAT(err_, AllOf(StartsWith("rwkvctl: "), HasSubstr(message)));
    EXPECT_EQ(std::count(err_.begin(), err_.end(), '\n'), 1) << err_;
    EXPECT_EQ(out_, "");
  }

  std::vector<std::string> Files() const {
    std::vector<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(folder_)) names.push_back(entry.path().filename());
    std::sort(names.begin(), names.end());
    return names;
  }

  const std::filesystem::path folder_;
  bool interrupt_ = false;
  std::string out_, err_;
};

std::vector<float> Floats(const Checkpoint& checkpoint, const std::string& name) {
  const auto tensor = checkpoint.Read(name);
  EXPECT_OK(tensor.status());
  const absl::optional<kernels::DType> dtype = checkpoint::WeightDType(tensor->info->type);
  EXPECT_TRUE(dtype.has_value()) << name;
  std::vector<float> values(tensor->info->bytes / checkpoint::ElementSize(tensor->info->type));
  kernels::WidenToFloat(*dtype, tensor->data, static_cast<int64_t>(values.size()), values.data());
  return values;
}

TEST_F(CheckpointCommandsTest, InspectTellsWhatAFileIs) {
  const std::string model = WriteModel(kernels::DType::kBFloat16);
  ASSERT_EQ(Call({"inspect", model, "--json"}), 0) << err_;
  const nlohmann::json json = nlohmann::json::parse(out_);
  EXPECT_EQ(json["format"], "safetensors");
  EXPECT_EQ(json["version"], "7");
  EXPECT_EQ(json["layers"], 2);
  EXPECT_EQ(json["width"], 72);
  EXPECT_EQ(json["heads"], 3);
  EXPECT_EQ(json["head_size"], 24);
  EXPECT_EQ(json["ffn"], 100);
  EXPECT_EQ(json["vocab"], 101);
  EXPECT_EQ(json["dtype"], "bf16");
  EXPECT_EQ(json["ranks"]["decay"], 5);
  EXPECT_EQ(json["ranks"]["gate"], 7);
  EXPECT_EQ(json["tokenizer"], "unknown");
  EXPECT_EQ(json["tuned_states"], true);
  EXPECT_EQ(json["state_bytes"], 2 * (2 * 72 + 72 * 24) * 4);
  EXPECT_EQ(json["file_bytes"], std::filesystem::file_size(model));
  EXPECT_GT(json["parameters"], 2 * 101 * 72);

  ASSERT_EQ(Call({"inspect", model}), 0) << err_;
  EXPECT_THAT(out_, AllOf(HasSubstr("\nversion          7\n"), HasSubstr("\nranks            "),
                          HasSubstr("\ntemplate         -\n"), HasSubstr("\ntuned_states     yes\n")));
}

TEST_F(CheckpointCommandsTest, InspectReadsGguf) {
  ASSERT_EQ(Call({"inspect", "services/checkpoint/testdata/v7.gguf", "--json"}), 0) << err_;
  const nlohmann::json json = nlohmann::json::parse(out_);
  EXPECT_EQ(json["format"], "gguf");
  EXPECT_EQ(json["version"], "7");
  EXPECT_EQ(json["vocab"], 6);
  EXPECT_EQ(json["tokenizer"], "in the file");
  EXPECT_EQ(json["template"], "rwkv-world");
}

TEST_F(CheckpointCommandsTest, InspectNamesTheTokenizer) {
  const struct {
    int64_t vocabulary;
    const char* tokenizer;
  } kCases[] = {{65536, "world"}, {50277, "neox"}, {50304, "neox"}, {65535, "unknown"}};
  for (const auto& test : kCases) {
    testing::RandomModelOptions options;
    options.width = options.head_size = 4;
    options.vocab_size = test.vocabulary;
    ASSERT_OK(testing::WriteRandomModel(options, Path("model.safetensors")));
    ASSERT_EQ(Call({"inspect", Path("model.safetensors"), "--json"}), 0) << err_;
    EXPECT_EQ(nlohmann::json::parse(out_)["tokenizer"], test.tokenizer);
  }
}

TEST_F(CheckpointCommandsTest, BadFilesAndWrongUsageAreOneLine) {
  std::ofstream(Path("text")) << "no model\nat all";
  ExpectFailure({"inspect", Path("text")}, 1, "not a checkpoint");
  ExpectFailure({"inspect", Path("text"), "--json"}, 1, "not a checkpoint");
  ExpectFailure({"inspect", Path("missing")}, 1, "cannot open");
  ExpectFailure({"inspect", folder_.string()}, 1, "is a folder without a checkpoint");
  ExpectFailure({"inspect"}, 2, "exactly one FILE");
  ExpectFailure({"inspect", "a", "b"}, 2, "exactly one FILE");
  ExpectFailure({"convert", "a"}, 2, "IN and OUT");
  ExpectFailure({"convert", "a", "b", "--dtype", "int2"}, 2, "\"int2\" is none of");
  ExpectFailure({"convert", "a", "b", "--lora-alpha", "8"}, 2, "belong to a --lora FILE");
  ExpectFailure({"convert", "a", "b", "--pissa-init", "c"}, 2, "belong to a --lora FILE");
  ExpectFailure({"convert", Path("text"), Path("out")}, 1, "not a checkpoint");
  EXPECT_EQ(Files(), std::vector<std::string>{"text"});
}

TEST_F(CheckpointCommandsTest, ConvertRefusesToLoseAFile) {
  const std::string model = WriteModel(kernels::DType::kBFloat16);
  std::ofstream(Path("out")) << "precious";
  ExpectFailure({"convert", model, Path("out")}, 1, "--overwrite");
  ExpectFailure({"convert", model, model, "--overwrite"}, 1, "is the file to be converted");
  std::filesystem::create_symlink(model, Path("link"));
  ExpectFailure({"convert", model, Path("link"), "--overwrite"}, 1, "is the file to be converted");
  ExpectFailure({"convert", model, folder_.string(), "--overwrite"}, 1, "is a folder");
  ExpectFailure({"convert", model, Path("no/out")}, 1, "cannot create");
  ExpectFailure({"convert", model, "/dev/null", "--overwrite"}, 1, "/dev/null is no regular file");
  EXPECT_EQ(Call({"convert", model, Path("out"), "--overwrite"}), 0) << err_;
  EXPECT_OK(Checkpoint::Open(Path("out")));
  EXPECT_EQ(Files(), (std::vector<std::string>{"link", "model.safetensors", "out"}));
}

TEST_F(CheckpointCommandsTest, AFileThatDoesNotFitOnTheDiskLeavesNothing) {
  const std::string model = WriteModel(kernels::DType::kBFloat16);
  std::signal(SIGXFSZ, SIG_IGN);
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  rlimit small = before;
  small.rlim_cur = 50'000;
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  ExpectFailure({"convert", model, Path("out")}, 1, "cannot write");
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &before), 0);
  EXPECT_EQ(Files(), std::vector<std::string>{"model.safetensors"});
}

TEST_F(CheckpointCommandsTest, AnInterruptedConversionLeavesNothing) {
  const std::string model = WriteModel(kernels::DType::kBFloat16);
  interrupt_ = true;
  ExpectFailure({"convert", model, Path("out")}, 1, "CANCELLED: interrupted");
  EXPECT_EQ(Files(), std::vector<std::string>{"model.safetensors"});
}

TEST_F(CheckpointCommandsTest, ANameThatPromisesAnotherFormatIsPointedOut) {
  ASSERT_EQ(Call({"convert", WriteModel(kernels::DType::kBFloat16), Path("out.gguf")}), 0) << err_;
  EXPECT_THAT(err_, AllOf(StartsWith("note: "), HasSubstr("out.gguf is .safetensors by content")));
}

TEST_F(CheckpointCommandsTest, ConvertToFp32AndBackIsExact) {
  for (const kernels::DType dtype : {kernels::DType::kBFloat16, kernels::DType::kFloat16}) {
    const std::string model = WriteModel(dtype);
    ASSERT_EQ(Call({"convert", model, Path("wide"), "--dtype", "fp32", "--overwrite"}), 0) << err_;
    ASSERT_EQ(
        Call({"convert", Path("wide"), Path("narrow"), "--dtype", std::string(kernels::Name(dtype)), "--overwrite"}), 0)
        << err_;
    ASSERT_EQ(Call({"convert", model, Path("same"), "--overwrite"}), 0) << err_;
    ASSERT_OK_AND_ASSIGN(const auto original, Checkpoint::Open(model));
    for (const char* name : {"wide", "narrow", "same"}) {
      ASSERT_OK_AND_ASSIGN(const auto converted, Checkpoint::Open(Path(name)));
      EXPECT_OK(ModelConfig::FromCheckpoint(*converted));
      EXPECT_EQ(converted->metadata(), original->metadata());
      ASSERT_EQ(converted->tensors().size(), original->tensors().size());
      for (const TensorInfo& info : original->tensors()) {
        EXPECT_EQ(converted->Find(info.name)->shape, info.shape) << info.name;
        EXPECT_EQ(Floats(*converted, info.name), Floats(*original, info.name)) << info.name;
      }
    }
    ASSERT_OK_AND_ASSIGN(const auto narrow, Checkpoint::Open(Path("narrow")));
    EXPECT_EQ(narrow->Find("emb.weight")->type, original->Find("emb.weight")->type);
    EXPECT_EQ(narrow->Find("blocks.1.att.w1")->type, original->Find("emb.weight")->type);
    EXPECT_EQ(narrow->Find("blocks.1.att.w0")->type, ElementType::kFloat32);
    EXPECT_EQ(narrow->Find("blocks.1.att.time_state")->type, ElementType::kFloat32);
  }
}

// A quantized matrix of `checkpoint` as kernels see it.
kernels::MatrixView View(const Checkpoint& checkpoint, const std::string& name, int64_t cols) {
  const checkpoint::Tensor codes = *checkpoint.Read(name);
  const checkpoint::Tensor scales = *checkpoint.Read(absl::StrCat(name, ".scale"));
  kernels::MatrixView view;
  view.dtype = kernels::DType::kFloat16;
  view.rows = codes.info->shape[0];
  view.cols = cols;
  view.data = codes.data;
  view.quantization =
      codes.info->type == ElementType::kInt8 ? kernels::Quantization::kInt8 : kernels::Quantization::kInt4;
  view.group = 64;
  view.scales = static_cast<const uint16_t*>(scales.data);
  if (view.quantization == kernels::Quantization::kInt4) {
    view.minimums = static_cast<const uint16_t*>(checkpoint.Read(absl::StrCat(name, ".min"))->data);
  }
  return view;
}

TEST_F(CheckpointCommandsTest, Int8AndInt4AreWithinHalfAStep) {
  const std::string model = WriteModel(kernels::DType::kBFloat16);
  ASSERT_OK_AND_ASSIGN(const auto original, Checkpoint::Open(model));
  for (const char* precision : {"int8", "int4"}) {
    SCOPED_TRACE(precision);
    ASSERT_EQ(Call({"convert", model, Path(precision), "--dtype", precision}), 0) << err_;
    ASSERT_OK_AND_ASSIGN(const auto quantized, Checkpoint::Open(Path(precision)));
    EXPECT_EQ(quantized->metadata().at("quantisation.group"), "64");
    ASSERT_OK_AND_ASSIGN(const ModelConfig config, ModelConfig::FromCheckpoint(*quantized));
    EXPECT_EQ(config.width, 72);
    EXPECT_LT(quantized->file_bytes(), original->file_bytes() * (precision[3] == '8' ? 4 : 3) / 5);
    for (const TensorInfo& info : original->tensors()) {
      SCOPED_TRACE(info.name);
      const std::vector<float> expected = Floats(*original, info.name);
      if (quantized->Find(absl::StrCat(info.name, ".scale")) == nullptr) {
        EXPECT_EQ(Floats(*quantized, info.name), expected);
        continue;
      }
      const kernels::MatrixView view = View(*quantized, info.name, info.shape[1]);
      ASSERT_EQ(view.rows, info.shape[0]);
      for (int64_t row = 0; row < view.rows; ++row) {
        for (int64_t col = 0; col < view.cols; ++col) {
          const float weight = expected[row * view.cols + col];
          const uint16_t scale = view.scales[row * kernels::GroupsPerRow(view) + col / 64];
          ASSERT_TRUE(std::abs(kernels::LoadAsFloat(view, row, col) - weight) <=
                      kernels::QuantizationErrorBound(weight, scale))
              << row << ", " << col;
        }
      }
    }
    for (const char* name : {"blocks.0.att.key.weight", "blocks.1.ffn.value.weight", "head.weight"}) {
      EXPECT_NE(quantized->Find(absl::StrCat(name, ".scale")), nullptr) << name;
    }
    EXPECT_EQ(quantized->Find("emb.weight")->type, ElementType::kBFloat16);
  }
}

TEST_F(CheckpointCommandsTest, QuantizedFilesAreTakenBackExactly) {
  const std::string model = WriteModel(kernels::DType::kBFloat16);
  for (const char* precision : {"int8", "int4"}) {
    ASSERT_EQ(Call({"convert", model, Path(precision), "--dtype", precision}), 0) << err_;
    ASSERT_EQ(Call({"convert", Path(precision), Path("wide"), "--dtype", "fp32", "--overwrite"}), 0) << err_;
    ASSERT_OK_AND_ASSIGN(const auto quantized, Checkpoint::Open(Path(precision)));
    ASSERT_OK_AND_ASSIGN(const auto wide, Checkpoint::Open(Path("wide")));
    EXPECT_EQ(wide->metadata().count("quantisation.group"), 0);
    const kernels::MatrixView view = View(*quantized, "blocks.0.ffn.value.weight", 100);
    const std::vector<float> weights = Floats(*wide, "blocks.0.ffn.value.weight");
    ASSERT_EQ(static_cast<int64_t>(weights.size()), view.rows * 100);
    for (int64_t i = 0; i < view.rows * 100; ++i) {
      ASSERT_EQ(weights[i], kernels::LoadAsFloat(view, i / 100, i % 100)) << i;
    }
  }
}

TEST_F(CheckpointCommandsTest, ConvertTakesGgufBack) {
  const std::string gguf = "services/checkpoint/testdata/v7.gguf";
  ASSERT_EQ(Call({"convert", gguf, Path("wide"), "--dtype", "fp32"}), 0) << err_;
  EXPECT_THAT(err_, AllOf(HasSubstr("note: "), HasSubstr("vocabulary")));
  ASSERT_OK_AND_ASSIGN(const auto original, Checkpoint::Open("services/checkpoint/testdata/v7.safetensors"));
  ASSERT_OK_AND_ASSIGN(const auto wide, Checkpoint::Open(Path("wide")));
  ASSERT_EQ(wide->tensors().size(), original->tensors().size());
  for (const TensorInfo& info : original->tensors()) {
    EXPECT_EQ(Floats(*wide, info.name), Floats(*original, info.name)) << info.name;
  }
  EXPECT_EQ(wide->metadata().at("template"), "rwkv-world");
  EXPECT_EQ(wide->metadata().at("general.name"), "small");
  EXPECT_EQ(wide->metadata().count("rwkv7.block_count"), 0);

  ASSERT_EQ(Call({"convert", gguf, Path("same")}), 0) << err_;
  ASSERT_OK_AND_ASSIGN(const auto same, Checkpoint::Open(Path("same")));
  EXPECT_EQ(same->metadata().at("quantisation.group"), "32");
  EXPECT_EQ(same->Find("blocks.0.att.key.weight")->type, ElementType::kInt8);
  EXPECT_NE(same->Find("blocks.0.att.output.weight.min"), nullptr);
}

TEST_F(CheckpointCommandsTest, ConvertWritesTheVocabularyInWorldFormat) {
  const std::string gguf = "services/checkpoint/testdata/v7.gguf";
  ASSERT_EQ(Call({"convert", gguf, Path("out"), "--vocabulary", Path("out.vocab.txt")}), 0) << err_;
  EXPECT_EQ(err_, "");
  std::ifstream file(Path("out.vocab.txt"));
  std::stringstream text;
  text << file.rdbuf();
  EXPECT_EQ(text.str(),
            "1 b'\\x00' 1\n"
            "2 b'\\x5c' 1\n"
            "3 b'\\x69\\x74\\x27\\x73' 4\n"
            "4 b'\\x09\\x0a\\x0d\\xe4\\xbd\\xa0' 6\n");
  ExpectFailure({"convert", gguf, Path("other"), "--vocabulary", Path("out.vocab.txt")}, 1, "--overwrite");
  ExpectFailure({"convert", WriteModel(kernels::DType::kBFloat16), Path("other"), "--vocabulary", Path("vocabulary")},
                1, "brings no vocabulary");
  EXPECT_EQ(Files(), (std::vector<std::string>{"model.safetensors", "out", "out.vocab.txt"}));
}

TEST_F(CheckpointCommandsTest, ConvertMergesAnAdapter) {
  const std::string model = WriteModel(kernels::DType::kFloat32);
  const std::vector<float> a(72, 0.5f);
  const std::vector<float> b(72, 0.25f);
  const auto bytes = [](const std::vector<float>& values) {
    return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
  };
  ASSERT_OK(testing::WriteFileAtomically(
      Path("lora"), testing::SafetensorsBytes(std::vector<testing::RawTensor>{
                        {{"blocks.0.att.key.lora_A", ElementType::kFloat32, {1, 72}}, bytes(a)},
                        {{"blocks.0.att.key.lora_B", ElementType::kFloat32, {72, 1}}, bytes(b)}})));
  ASSERT_EQ(Call({"convert", model, Path("merged"), "--lora", Path("lora"), "--lora-alpha", "2"}), 0) << err_;
  ASSERT_OK_AND_ASSIGN(const auto original, Checkpoint::Open(model));
  ASSERT_OK_AND_ASSIGN(const auto merged, Checkpoint::Open(Path("merged")));
  const std::vector<float> before = Floats(*original, "blocks.0.att.key.weight");
  const std::vector<float> after = Floats(*merged, "blocks.0.att.key.weight");
  for (size_t i = 0; i < before.size(); ++i) ASSERT_EQ(after[i], before[i] + 0.25f) << i;
  EXPECT_EQ(Floats(*merged, "blocks.1.att.key.weight"), Floats(*original, "blocks.1.att.key.weight"));
  ExpectFailure({"convert", model, Path("other"), "--lora", Path("lora"), "--lora-alpha", "0"}, 1, "alpha is 0");
}

// Of a base in bf16, half of a small update would be rounded away with the sum.
TEST_F(CheckpointCommandsTest, AMergedSumIsRoundedOnceToWhatIsWritten) {
  const std::string model = WriteModel(kernels::DType::kBFloat16);
  const auto bytes = [](const std::vector<float>& values) {
    return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
  };
  constexpr float kUpdate = 0x1p-16f;
  ASSERT_OK(testing::WriteFileAtomically(
      Path("lora"),
      testing::SafetensorsBytes(std::vector<testing::RawTensor>{
          {{"blocks.0.att.key.lora_A", ElementType::kFloat32, {1, 72}}, bytes(std::vector<float>(72, kUpdate))},
          {{"blocks.0.att.key.lora_B", ElementType::kFloat32, {72, 1}}, bytes(std::vector<float>(72, 1.0f))}})));
  const auto convert = [&](const std::string& dtype) {
    EXPECT_EQ(Call({"convert", model, Path(dtype), "--dtype", dtype, "--lora", Path("lora"), "--lora-alpha", "1"}), 0)
        << err_;
    return *Checkpoint::Open(Path(dtype));
  };
  ASSERT_OK_AND_ASSIGN(const auto original, Checkpoint::Open(model));
  std::vector<float> sums = Floats(*original, "blocks.0.att.key.weight");
  for (float& sum : sums) sum += kUpdate;
  EXPECT_EQ(Floats(*convert("fp32"), "blocks.0.att.key.weight"), sums);
  const std::vector<float> halves = Floats(*convert("fp16"), "blocks.0.att.key.weight");
  for (size_t i = 0; i < sums.size(); ++i) {
    ASSERT_EQ(halves[i], kernels::HalfToFloat(kernels::FloatToHalf(sums[i]))) << i;
  }
  const auto quantized = convert("int8");
  const kernels::MatrixView view = View(*quantized, "blocks.0.att.key.weight", 72);
  std::vector<uint8_t> codes(72);
  std::vector<uint16_t> scales(2);
  ASSERT_OK(
      kernels::QuantizeRow(kernels::Quantization::kInt8, 64, sums.data(), 72, codes.data(), scales.data(), nullptr));
  EXPECT_EQ(std::memcmp(view.data, codes.data(), codes.size()), 0);
}

TEST_F(CheckpointCommandsTest, TensorsThatAreNoPartOfTheModelAreLeftOutWhenAsked) {
  const auto write = [this](const std::string& extra) {
    testing::RandomModelOptions options;
    options.width = options.head_size = 4;
    std::vector<testing::RawTensor> tensors = *testing::MakeRandomModel(options);
    tensors.push_back({{extra, ElementType::kFloat32, {1}}, "abcd"});
    EXPECT_OK(testing::WriteFileAtomically(Path("model"), testing::SafetensorsBytes(tensors)));
    return Path("model");
  };
  write("blocks.0.mystery");
  ExpectFailure({"convert", Path("model"), Path("out")}, 1, "--ignore_extra_tensors");
  ExpectFailure({"inspect", Path("model")}, 1, "\"blocks.0.mystery\"");
  ASSERT_EQ(Call({"inspect", Path("model"), "--ignore-extra-tensors"}), 0) << err_;
  EXPECT_THAT(err_, AllOf(HasSubstr("note: 1 tensors"), HasSubstr("\"blocks.0.mystery\"")));
  ASSERT_EQ(Call({"convert", Path("model"), Path("out"), "--ignore-extra-tensors"}), 0) << err_;
  ASSERT_OK_AND_ASSIGN(const auto converted, Checkpoint::Open(Path("out")));
  EXPECT_EQ(converted->Find("blocks.0.mystery"), nullptr);
  EXPECT_OK(ModelConfig::FromCheckpoint(*converted));
  write("copy_mask");  // A known trainer's.
  ASSERT_EQ(Call({"inspect", Path("model")}), 0) << err_;
  EXPECT_THAT(err_, HasSubstr("note: 1 tensors are no part of the model and are left out: \"copy_mask\""));
}

TEST_F(CheckpointCommandsTest, WeightsThatDoNotFitArePointedAt) {
  const auto model = [this](float value, int64_t element = 5) {
    testing::RandomModelOptions options;
    options.width = options.head_size = 4;
    options.dtype = kernels::DType::kFloat32;
    std::vector<testing::RawTensor> tensors = *testing::MakeRandomModel(options);
    for (testing::RawTensor& tensor : tensors) {
      if (tensor.spec.name == "blocks.1.att.key.weight") std::memcpy(&tensor.data[element * 4], &value, 4);
    }
    EXPECT_OK(testing::WriteFileAtomically(Path("model"), testing::SafetensorsBytes(tensors)));
    return Path("model");
  };
  ExpectFailure({"convert", model(1e6f), Path("out"), "--dtype", "fp16"}, 1,
                "\"blocks.1.att.key.weight\": element 5, 1e+06, is too large for fp16");
  ExpectFailure({"convert", model(NAN), Path("out"), "--dtype", "int8"}, 1,
                "\"blocks.1.att.key.weight\": element 5 is nan");
  ExpectFailure({"convert", model(-1e6f, 4), Path("out"), "--dtype", "fp16"}, 1, "element 4, -1e+06, is too large");
  EXPECT_EQ(Files(), std::vector<std::string>{"model"});
}

}  // namespace
}  // namespace rwkv::rwkvctl
