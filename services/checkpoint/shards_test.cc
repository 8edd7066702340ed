// Models in several files: every way to name them, and what must not pass for one.
#include "services/checkpoint/shards.h"

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/checkpoint/checkpoint.h"
#include "services/checkpoint/formats/element_type.h"
#include "tests/testing/checkpoint_writer.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::checkpoint {
namespace {

using ::rwkv::testing::RawTensor;
using ::rwkv::testing::StatusIs;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

class ShardsTest : public ::testing::Test {
 protected:
  ShardsTest() {
    std::string name = ::testing::TempDir() + "/shardsXXXXXX";
    folder_ = mkdtemp(name.data());
  }
  ~ShardsTest() override { std::filesystem::remove_all(folder_); }

  std::string Path(const std::string& name) const { return folder_ + "/" + name; }
  void Write(const std::string& name, const std::string& bytes) {
    ASSERT_OK(testing::WriteFileAtomically(Path(name), bytes));
  }
  static RawTensor Byte(const std::string& name, char value) {
    return {{name, ElementType::kUint8, {1}}, std::string(1, value)};
  }
  void WriteShards() {
    Write("model-00001-of-00002.safetensors", testing::SafetensorsBytes({{Byte("emb.weight", 1), Byte("b", 2)}}));
    Write("model-00002-of-00002.safetensors", testing::SafetensorsBytes({{Byte("a", 3)}}));
    WriteIndex(R"("emb.weight":"model-00001-of-00002.safetensors","b":"model-00001-of-00002.safetensors",)"
               R"("a":"model-00002-of-00002.safetensors")");
  }
  void WriteIndex(const std::string& map, const std::string& name = "model.safetensors.index.json") {
    Write(name, absl::StrCat(R"({"metadata":{"total_size":3},"weight_map":{)", map, "}}"));
  }
  static int ValueOf(const Checkpoint& checkpoint, const std::string& name) {
    const absl::StatusOr<Tensor> tensor = checkpoint.Read(name);
    return tensor.ok() ? *static_cast<const uint8_t*>(tensor->data) : -1;
  }
  // The value of each tensor, or the error.
  absl::StatusOr<std::vector<std::string>> Contents(const std::string& path) {
    auto opened = Checkpoint::Open(path);
    if (!opened.ok()) return opened.status();
    std::vector<std::string> contents;
    for (const TensorInfo& info : (*opened)->tensors()) {
      contents.push_back(absl::StrCat(info.name, "=", ValueOf(**opened, info.name)));
    }
    return contents;
  }

  std::string folder_;
};

TEST_F(ShardsTest, AFolderAndItsIndexAreTheModel) {
  WriteShards();
  const auto expected = ElementsAre("a=3", "b=2", "emb.weight=1");
  for (const std::string& path : {folder_, folder_ + "/", Path("model.safetensors.index.json")}) {
    SCOPED_TRACE(path);
    const auto contents = Contents(path);
    ASSERT_OK(contents);
    EXPECT_THAT(*contents, expected);
  }
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(folder_));
  EXPECT_EQ(checkpoint->file_bytes(),
            static_cast<int64_t>(std::filesystem::file_size(Path("model-00001-of-00002.safetensors")) +
                                 std::filesystem::file_size(Path("model-00002-of-00002.safetensors"))));
}

TEST_F(ShardsTest, OfTwoIndexesTheSafetensorsOneIsTaken) {
  WriteShards();
  WriteIndex(R"("a":"pytorch_model-00001-of-00001.bin")", "pytorch_model.bin.index.json");
  EXPECT_OK(Contents(folder_));
}

TEST_F(ShardsTest, AFolderWithOneCheckpointIsThatOne) {
  Write("model.safetensors", testing::SafetensorsBytes({{Byte("a", 3)}}));
  Write("config.json", "{}");
  const auto contents = Contents(folder_);
  ASSERT_OK(contents);
  EXPECT_THAT(*contents, ElementsAre("a=3"));
}

TEST_F(ShardsTest, FoldersThatNameNoModel) {
  EXPECT_THAT(Contents(folder_), StatusIs(absl::StatusCode::kInvalidArgument,
                                          AllOf(HasSubstr(folder_), HasSubstr("folder without a checkpoint"))));
  Write("one.pth", "x");
  Write("two.safetensors", "x");
  EXPECT_THAT(Contents(folder_),
              StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr("one.pth"), HasSubstr("two.safetensors"))));
  EXPECT_THAT(Contents(Path("nowhere")), StatusIs(absl::StatusCode::kNotFound, HasSubstr("nowhere")));
}

TEST_F(ShardsTest, IndexesThatLie) {
  WriteShards();
  const auto refused = [&](const std::string& map, absl::StatusCode code, const std::string& message) {
    SCOPED_TRACE(map);
    WriteIndex(map);
    EXPECT_THAT(Contents(folder_), StatusIs(code, HasSubstr(message)));
  };
  const std::string first = R"("emb.weight":"model-00001-of-00002.safetensors","b":"model-00001-of-00002.safetensors")";
  refused(first + R"(,"a":"model-00003-of-00002.safetensors")", absl::StatusCode::kNotFound, "model-00003-of-00002");
  refused(first + R"(,"a":"../model-00002-of-00002.safetensors")", absl::StatusCode::kInvalidArgument, "beside it");
  refused(first + R"(,"a":"/etc/passwd")", absl::StatusCode::kInvalidArgument, "/etc/passwd");
  refused(first + R"(,"a":"..")", absl::StatusCode::kInvalidArgument, "beside it");
  refused(first + R"(,"a":7)", absl::StatusCode::kInvalidArgument, "\"a\"");
  refused("", absl::StatusCode::kInvalidArgument, "names no tensor");
  refused(first + R"(,"a":"model-00002-of-00002.safetensors","c":"model-00002-of-00002.safetensors")",
          absl::StatusCode::kInvalidArgument, "does not hold tensor \"c\"");
  refused(R"("emb.weight":"model-00001-of-00002.safetensors","a":"model-00002-of-00002.safetensors")",
          absl::StatusCode::kInvalidArgument, "holds tensor \"b\"");
  Write("model.safetensors.index.json", "[1]");
  EXPECT_THAT(Contents(folder_), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("weight_map")));
}

TEST_F(ShardsTest, ATensorInTwoFilesIsRefused) {
  Write("x.safetensors", testing::SafetensorsBytes({{Byte("module.a", 1)}}));
  Write("y.safetensors", testing::SafetensorsBytes({{Byte("a", 2)}}));
  WriteIndex(R"("module.a":"x.safetensors","a":"y.safetensors")");
  EXPECT_THAT(Contents(Path("model.safetensors.index.json")),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("two tensors are named \"a\"")));
}

TEST_F(ShardsTest, ABrokenShardIsNamed) {
  WriteShards();
  const std::string name = "model-00002-of-00002.safetensors";
  std::filesystem::resize_file(Path(name), std::filesystem::file_size(Path(name)) - 1);
  EXPECT_THAT(Contents(folder_), StatusIs(absl::StatusCode::kDataLoss, HasSubstr(name)));
}

class SplitGgufTest : public ShardsTest {
 protected:
  static std::string PartName(int part, int count) { return absl::StrCat("m-0000", part, "-of-0000", count, ".gguf"); }
  void WritePart(int part, int count, const std::string& tensor, float value, const std::string& architecture,
                 const std::string& name = "") {
    std::vector<testing::GgufKey> keys = {testing::GgufUint32("split.no", part - 1),
                                          testing::GgufUint32("split.count", count)};
    if (!architecture.empty()) keys.push_back(testing::GgufText("general.architecture", architecture));
    std::string data(4, '\0');
    std::memcpy(data.data(), &value, 4);
    Write(name.empty() ? PartName(part, count) : name, testing::GgufBytes(keys, {{{tensor, 0, {1}, data}}}));
  }
};

TEST_F(SplitGgufTest, AnyPartStandsForAll) {
  WritePart(1, 2, "output_norm.weight", 1, "rwkv7");
  WritePart(2, 2, "output_norm.bias", 2, "");
  for (const std::string& path : {Path(PartName(1, 2)), Path(PartName(2, 2)), folder_}) {
    SCOPED_TRACE(path);
    ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(path));
    EXPECT_NE(checkpoint->Find("ln_out.weight"), nullptr);
    ASSERT_OK_AND_ASSIGN(const Tensor bias, checkpoint->Read("ln_out.bias"));
    float value = 0;
    std::memcpy(&value, bias.data, 4);
    EXPECT_EQ(value, 2);
  }
}

TEST_F(SplitGgufTest, AsManyPartsAsNobodyHasAreRefused) {
  EXPECT_THAT(Contents(Path("m-00001-of-01025.gguf")),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("one of 1025 parts; at most 1024 go")));
}

TEST_F(SplitGgufTest, APartThatIsMissingOrIsAnotherIsNamed) {
  WritePart(1, 2, "output_norm.weight", 1, "rwkv7");
  EXPECT_THAT(Contents(Path(PartName(1, 2))),
              StatusIs(absl::StatusCode::kNotFound, AllOf(HasSubstr("part 1 of 2"), HasSubstr(PartName(2, 2)))));
  WritePart(1, 2, "output_norm.bias", 2, "rwkv7", PartName(2, 2));
  EXPECT_THAT(Contents(folder_), StatusIs(absl::StatusCode::kInvalidArgument,
                                          AllOf(HasSubstr(PartName(2, 2)), HasSubstr("stands for part 1 of 2"))));
  WritePart(1, 2, "output_norm.weight", 1, "rwkv7", "renamed.gguf");
  EXPECT_THAT(Contents(Path("renamed.gguf")),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("-00001-of-0000N.gguf")));
}

}  // namespace
}  // namespace rwkv::checkpoint
