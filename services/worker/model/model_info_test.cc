#include "services/worker/model/model_info.h"

#include <map>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/dtype.h"
#include "rwkv/v1/common.pb.h"
#include "services/checkpoint/checkpoint.h"
#include "services/checkpoint/fingerprint.h"
#include "services/checkpoint/model_config.h"
#include "tests/testing/checkpoint_writer.h"
#include "tests/testing/equals_proto.h"
#include "tests/testing/random_model.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

using testing::EqualsProto;
using testing::RandomModelOptions;

v1::ModelInfo InfoOf(const RandomModelOptions& options, const std::string& file) {
  const std::string path = absl::StrCat(::testing::TempDir(), "/", file);
  EXPECT_OK(testing::WriteRandomModel(options, path));
  const auto checkpoint = checkpoint::Checkpoint::Open(path).value();
  v1::ModelInfo info = MakeModelInfo(*checkpoint, checkpoint::ModelConfig::FromCheckpoint(*checkpoint).value()).value();
  EXPECT_EQ(info.fingerprint(), checkpoint::Fingerprint(*checkpoint).value());
  info.clear_fingerprint();
  return info;
}

TEST(ModelInfoTest, TellsEverythingAboutTheModel) {
  RandomModelOptions options;
  options.layers = 1;
  options.width = 16;
  options.head_size = 8;
  options.ffn_width = 24;
  options.vocab_size = 101;
  options.decay_rank = options.iclr_rank = options.gate_rank = 2;
  options.dtype = kernels::DType::kFloat16;
  EXPECT_THAT(InfoOf(options, "RWKV-x070-0.1B.final.safetensors"), EqualsProto(R"pb(
                name: "RWKV-x070-0.1B.final"
                version: "7"
                layer_count: 1
                width: 16
                head_count: 2
                head_size: 8
                ffn_width: 24
                vocab_size: 101
                dtype: "fp16"
                tokenizer: ""
                parameters: 5568
              )pb"));
}

TEST(ModelInfoTest, TheVocabularysSizeTellsTheTokenizer) {
  RandomModelOptions options;
  options.layers = 1;
  options.width = 8;
  options.head_size = 8;
  options.vocab_size = 65536;
  EXPECT_EQ(InfoOf(options, "model").tokenizer(), "world");
  for (int vocab_size : {50277, 50304}) {
    options.vocab_size = vocab_size;
    EXPECT_EQ(InfoOf(options, "model").tokenizer(), "neox");
  }
  options.vocab_size = 65535;
  EXPECT_EQ(InfoOf(options, "model").tokenizer(), "");
}

TEST(ModelInfoTest, AFileNameThatIsNoTextIsEscaped) { EXPECT_EQ(InfoOf({}, "m\xff.pth").name(), "m\\xff"); }

TEST(ModelInfoTest, AModelIsCalledAsItsFileOrFolder) {
  EXPECT_EQ(InfoOf({}, "RWKV-\xe4\xb8\x96\xe7\x95\x8c.pth").name(), "RWKV-\xe4\xb8\x96\xe7\x95\x8c");
  EXPECT_EQ(InfoOf({}, "rwkv7-0.1B").name(), "rwkv7-0.1B");
  EXPECT_EQ(InfoOf({}, "-00001-of-00002.st").name(), "-00001-of-00002");
  EXPECT_EQ(InfoOf({}, ".hidden").name(), ".hidden");
}

TEST(ModelInfoTest, TheFileSaysItsChatTemplate) {
  ASSERT_OK_AND_ASSIGN(const std::vector<testing::RawTensor> tensors, testing::MakeRandomModel({}));
  const std::string path = absl::StrCat(::testing::TempDir(), "/templates.safetensors");
  const auto said = [&](const std::map<std::string, std::string>& metadata) {
    EXPECT_OK(testing::WriteFileAtomically(path, testing::SafetensorsBytes(tensors, metadata)));
    const auto checkpoint = checkpoint::Checkpoint::Open(path).value();
    const auto config = checkpoint::ModelConfig::FromCheckpoint(*checkpoint).value();
    return MakeModelInfo(*checkpoint, config).value().chat_template();
  };
  EXPECT_EQ(said({}), "");
  EXPECT_EQ(said({{"template", "raven"}, {"vocabulary", "x"}}), "raven");
  EXPECT_EQ(said({{"tokenizer.chat_template", "rwkv-world"}}), "rwkv-world");
  EXPECT_EQ(said({{"template", "\u4E16"}}), "");
  EXPECT_EQ(said({{"template", std::string((16 << 10) + 1, 'x')}}), "");
}

}  // namespace
}  // namespace rwkv::worker
