#include "services/checkpoint/checkpoint.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <iostream>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/dtype.h"
#include "services/checkpoint/formats/element_type.h"
#include "tests/testing/checkpoint_writer.h"
#include "tests/testing/files.h"
#include "tests/testing/other_user.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::checkpoint {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::RawTensor;
using testing::StatusIs;

constexpr char kTestdata[] = "services/checkpoint/testdata/";

std::string WriteTemporary(const std::string& name, const std::string& bytes) {
  const std::string path = absl::StrCat(::testing::TempDir(), "/", name);
  EXPECT_OK(testing::WriteFileAtomically(path, bytes));
  return path;
}

std::vector<float> Floats(const Tensor& tensor) {
  const absl::optional<kernels::DType> dtype = WeightDType(tensor.info->type);
  EXPECT_TRUE(dtype.has_value());
  std::vector<float> values(tensor.info->bytes / ElementSize(tensor.info->type));
  kernels::WidenToFloat(*dtype, tensor.data, static_cast<int64_t>(values.size()), values.data());
  return values;
}

// What make_testdata.py puts into tensor number t.
std::vector<float> Numbers(int t, int count) {
  std::vector<float> values;
  for (int n = 0; n < count; ++n) values.push_back(static_cast<float>(t) + static_cast<float>(n) / 8);
  return values;
}

class RealWritersTest : public ::testing::TestWithParam<const char*> {};

TEST_P(RealWritersTest, EveryKindOfTensorReadsRight) {
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(absl::StrCat(kTestdata, GetParam())));
  std::vector<std::string> names;
  for (const TensorInfo& info : checkpoint->tensors()) names.push_back(info.name);
  EXPECT_THAT(names, ElementsAre("bf16", "column_1", "empty", "fp16", "int64", "rows_0_to_4", "scalar", "transposed",
                                 "unit_strides"));
  const struct {
    const char* name;
    ElementType type;
    std::vector<int64_t> shape;
    std::vector<float> values;
  } kCases[] = {
      {"bf16", ElementType::kBFloat16, {1, 1, 5}, Numbers(1, 5)},
      {"fp16", ElementType::kFloat16, {3, 2}, Numbers(2, 6)},
      {"transposed", ElementType::kFloat32, {4, 3}, Numbers(3, 12)},
      {"rows_0_to_4", ElementType::kFloat32, {4, 2}, Numbers(4, 8)},
      {"column_1", ElementType::kFloat32, {6}, {4.125, 4.375, 4.625, 4.875, 5.125, 5.375}},
      {"scalar", ElementType::kFloat32, {}, {5}},
      {"empty", ElementType::kFloat32, {0, 3}, {}},
      {"unit_strides", ElementType::kFloat32, {1, 7, 1}, Numbers(6, 7)},
  };
  for (const auto& test : kCases) {
    SCOPED_TRACE(test.name);
    ASSERT_OK_AND_ASSIGN(const Tensor tensor, checkpoint->Read(test.name));
    EXPECT_EQ(tensor.info->type, test.type);
    EXPECT_EQ(tensor.info->shape, test.shape);
    EXPECT_EQ(Floats(tensor), test.values);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(tensor.data) % ElementSize(test.type), 0);
    ASSERT_OK_AND_ASSIGN(const Tensor again, checkpoint->Read(test.name));
    EXPECT_EQ(again.data, tensor.data);

    std::vector<uint8_t> bytes(tensor.info->bytes);
    ASSERT_OK(checkpoint->ReadBytes(*tensor.info, 0, absl::MakeSpan(bytes)));
    EXPECT_TRUE(bytes.empty() || std::memcmp(bytes.data(), tensor.data, bytes.size()) == 0);
    if (bytes.size() < 16) continue;
    std::vector<uint8_t> part(8);
    ASSERT_OK(checkpoint->ReadBytes(*tensor.info, 8, absl::MakeSpan(part)));
    EXPECT_EQ(std::memcmp(part.data(), bytes.data() + 8, 8), 0);
  }
  const TensorInfo* integers = checkpoint->Find("int64");
  ASSERT_NE(integers, nullptr);
  EXPECT_EQ(integers->type, ElementType::kInt64);
}

INSTANTIATE_TEST_SUITE_P(Containers, RealWritersTest,
                         ::testing::Values("torch_zip.pth", "torch_legacy.pth", "torch_nested.pth",
                                           "safetensors.safetensors"),
                         [](const auto& info) {
                           std::string name = info.param;
                           return name.substr(0, name.find('.'));
                         });

TEST(CheckpointTest, NamesItsFormat) {
  const struct {
    const char* file;
    const char* format;
  } kCases[] = {
      {"torch_zip.pth", "pth"}, {"torch_legacy.pth", "pth-legacy"}, {"safetensors.safetensors", "safetensors"}};
  for (const auto& test : kCases) {
    ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(absl::StrCat(kTestdata, test.file)));
    EXPECT_EQ(checkpoint->format(), test.format);
  }
}

TEST(CheckpointTest, ReadsATorchParameter) {
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(absl::StrCat(kTestdata, "torch_parameter.pth")));
  ASSERT_OK_AND_ASSIGN(const Tensor tensor, checkpoint->Read("parameter"));
  EXPECT_EQ(Floats(tensor), Numbers(1, 4));
}

TEST(CheckpointTest, APickledModuleIsSkippedAndNamed) {
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(absl::StrCat(kTestdata, "torch_code.pth")));
  EXPECT_TRUE(checkpoint->tensors().empty());
  EXPECT_THAT(checkpoint->notes(), ElementsAre(HasSubstr("torch.nn.modules.linear Linear")));
}

// torch_zip.pth, packed again by Python's zipfile with ZIP_DEFLATED.
TEST(CheckpointTest, DeflatedMembersHoldTheSameTensors) {
  ASSERT_OK_AND_ASSIGN(const auto stored, Checkpoint::Open(absl::StrCat(kTestdata, "torch_zip.pth")));
  ASSERT_OK_AND_ASSIGN(const auto deflated, Checkpoint::Open(absl::StrCat(kTestdata, "torch_deflated.pth")));
  ASSERT_EQ(deflated->tensors().size(), stored->tensors().size());
  for (const TensorInfo& info : stored->tensors()) {
    ASSERT_OK_AND_ASSIGN(const Tensor tensor, deflated->Read(info.name));
    ASSERT_EQ(tensor.bytes, info.bytes) << info.name;
    EXPECT_EQ(std::memcmp(tensor.data, stored->Read(info.name)->data, info.bytes), 0) << info.name;
  }
}

TEST(CheckpointTest, DeflatedMembersThatLieAreRefused) {
  const std::string good = testing::ReadFile(absl::StrCat(kTestdata, "torch_deflated.pth"));
  const size_t central = good.find("PK\x01\x02");
  ASSERT_NE(central, std::string::npos);
  const auto open = [](const std::string& bytes) { return Checkpoint::Open(WriteTemporary("deflated.pth", bytes)); };
  std::string larger = good;  // Of the first member, data.pkl.
  larger[central + 24]++;
  EXPECT_THAT(open(larger), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("does not inflate to")));
  std::string huge = good;
  huge[central + 27] = 0x7f;
  EXPECT_THAT(open(huge), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("bytes when unpacked")));
  for (size_t at = 50; at < central; at += 3) {  // Whatever is broken is refused or harmless.
    std::string broken = good;
    broken[at] = static_cast<char>(broken[at] ^ 0x55);
    open(broken).status().IgnoreError();
  }
}

TEST(CheckpointTest, DoublesAreReadAsFloats) {
  const std::vector<double> values = {1.0, -0.1, 1e300, 3.0};
  RawTensor tensor{{"a", ElementType::kFloat64, {2, 2}}, std::string(32, '\0')};
  std::memcpy(tensor.data.data(), values.data(), 32);
  for (const std::string& bytes : {testing::SafetensorsBytes({tensor}), testing::TorchZipBytes({tensor})}) {
    ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(WriteTemporary("doubles", bytes)));
    ASSERT_OK_AND_ASSIGN(const Tensor plain, checkpoint->Read("a"));
    EXPECT_EQ(Floats(plain), (std::vector<float>{1.0f, -0.1f, INFINITY, 3.0f}));
    ASSERT_OK_AND_ASSIGN(const Tensor transposed, checkpoint->Read("a", Form::kTransposed));
    EXPECT_EQ(Floats(transposed), (std::vector<float>{1.0f, INFINITY, -0.1f, 3.0f}));
    float last = 0;
    ASSERT_OK(checkpoint->ReadBytes(*plain.info, 12, absl::MakeSpan(reinterpret_cast<uint8_t*>(&last), 4)));
    EXPECT_EQ(last, 3.0f);
    EXPECT_THAT(checkpoint->notes(), ElementsAre(HasSubstr("1 tensors of fp64")));
  }
}

TEST(CheckpointTest, AHeadThatIsNotThereIsTheEmbedding) {
  const RawTensor embedding{{"emb.weight", ElementType::kUint8, {2, 2}}, "abcd"};
  const RawTensor layer{{"blocks.0.ln1.weight", ElementType::kUint8, {1}}, "e"};
  ASSERT_OK_AND_ASSIGN(const auto model,
                       Checkpoint::Open(WriteTemporary("tied", testing::SafetensorsBytes({embedding, layer}))));
  ASSERT_OK_AND_ASSIGN(const Tensor head, model->Read("head.weight"));
  EXPECT_EQ(std::memcmp(head.data, "abcd", 4), 0);
  EXPECT_THAT(model->notes(), ElementsAre(HasSubstr("tied to the embedding")));
  ASSERT_OK_AND_ASSIGN(const auto no_model,
                       Checkpoint::Open(WriteTemporary("alone", testing::SafetensorsBytes({embedding}))));
  EXPECT_EQ(no_model->Find("head.weight"), nullptr);
}

TEST(CheckpointTest, OpenNamesTheFileInEveryError) {
  const std::string directory = ::testing::TempDir();
  const std::string fifo = absl::StrCat(directory, "/fifo");
  ASSERT_EQ(mkfifo(fifo.c_str(), 0600), 0);
  const struct {
    const char* name;
    std::string path;
    absl::StatusCode code;
    const char* message;
  } kCases[] = {
      {"missing", absl::StrCat(directory, "/missing.pth"), absl::StatusCode::kNotFound, "missing.pth"},
      {"in no folder", absl::StrCat(directory, "/no/such.pth"), absl::StatusCode::kNotFound, "no/such.pth"},
      {"no name", "", absl::StatusCode::kNotFound, "cannot open"},
      {"a device", "/dev/zero", absl::StatusCode::kInvalidArgument, "/dev/zero is not a regular file"},
      {"a pipe", fifo, absl::StatusCode::kInvalidArgument, "fifo is not a regular file"},
      {"empty", WriteTemporary("empty.safetensors", ""), absl::StatusCode::kInvalidArgument,
       "empty.safetensors is empty"},
      {"one byte", WriteTemporary("one", "P"), absl::StatusCode::kDataLoss, "one: "},
      {"only the zip's magic", WriteTemporary("pk.pth", "PK\x03\x04"), absl::StatusCode::kDataLoss, "pk.pth: "},
      {"only the legacy magic", WriteTemporary("legacy.pth", "\x80\x02\x8a\x0a"), absl::StatusCode::kInvalidArgument,
       "legacy.pth: "},
      {"text", WriteTemporary("text.pth", "Not a model, but a page of text."), absl::StatusCode::kInvalidArgument,
       "text.pth: not a checkpoint"},
      {"only GGUF's magic", WriteTemporary("x.gguf", "GGUF\3"), absl::StatusCode::kDataLoss, "x.gguf: GGUF: the file"},
      {"only rwkv.cpp's magic", WriteTemporary("x.bin", "fmgg"), absl::StatusCode::kDataLoss, "x.bin: rwkv.cpp: the"},
  };
  for (const auto& test : kCases) {
    SCOPED_TRACE(test.name);
    EXPECT_THAT(Checkpoint::Open(test.path), StatusIs(test.code, HasSubstr(test.message)));
  }
  unlink(fifo.c_str());
}

TEST(CheckpointTest, AnUnreadableFileIsPermissionDenied) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const std::string folder = testing::MakeOpenFolder();
  const std::string path = folder + "/unreadable";
  ASSERT_OK(testing::WriteFileAtomically(path, "x"));
  const auto open = [&path] {
    testing::BecomeNobody();
    std::cerr << Checkpoint::Open(path).status();
    std::exit(0);
  };
  ASSERT_EQ(chmod(path.c_str(), 0644), 0);
  EXPECT_EXIT(open(), ::testing::ExitedWithCode(0), "DATA_LOSS") << "it is the file's mode that counts below";
  ASSERT_EQ(chmod(path.c_str(), 0), 0);
  EXPECT_EXIT(open(), ::testing::ExitedWithCode(0), "PERMISSION_DENIED.*unreadable");
  std::filesystem::remove_all(folder);
}

// "Compare all four bytes": this header is 19280 bytes long, which begins with "PK".
TEST(CheckpointTest, ASafetensorsFileMayBeginLikeAZip) {
  std::string file(8, '\0');
  file[0] = 'P';
  file[1] = 'K';
  std::string json = R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})";
  json.append(('K' * 256 + 'P') - json.size(), ' ');
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(WriteTemporary("pk.safetensors", file + json + "x")));
  EXPECT_EQ(checkpoint->format(), "safetensors");
}

TEST(CheckpointTest, StripsTrainersPrefixes) {
  const std::vector<RawTensor> tensors = {
      {{"model.a", ElementType::kUint8, {1}}, "a"},
      {{"_forward_module.b", ElementType::kUint8, {1}}, "b"},
      {{"_forward_module.model.c", ElementType::kUint8, {1}}, "c"},
      {{"remodel.d", ElementType::kUint8, {1}}, "d"},
  };
  ASSERT_OK_AND_ASSIGN(const auto checkpoint,
                       Checkpoint::Open(WriteTemporary("prefixes", testing::SafetensorsBytes(tensors))));
  std::vector<std::string> names;
  for (const TensorInfo& info : checkpoint->tensors()) names.push_back(info.name);
  EXPECT_THAT(names, ElementsAre("a", "b", "c", "remodel.d"));
}

TEST(CheckpointTest, TwoTensorsOfOneNameAreRefused) {
  const std::vector<RawTensor> by_prefix = {{{"model.a", ElementType::kUint8, {1}}, "a"},
                                            {{"a", ElementType::kUint8, {1}}, "b"}};
  EXPECT_THAT(Checkpoint::Open(WriteTemporary("twins.st", testing::SafetensorsBytes(by_prefix))),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("two tensors are named \"a\"")));
  const std::vector<RawTensor> in_pickle = {{{"a", ElementType::kUint8, {1}}, "a"},
                                            {{"a", ElementType::kUint8, {1}}, "b"}};
  EXPECT_THAT(Checkpoint::Open(WriteTemporary("twins.pth", testing::TorchZipBytes(in_pickle))),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("two tensors are named \"a\"")));
}

TEST(CheckpointTest, OddOffsetsAreCopiedToAlignedMemory) {
  const std::vector<RawTensor> tensors = {
      {{"a_byte", ElementType::kUint8, {1}}, "x"},
      {{"floats", ElementType::kFloat32, {2}}, std::string("\0\0\x80\x3f\0\0\0\x40", 8)}};
  ASSERT_OK_AND_ASSIGN(const auto checkpoint,
                       Checkpoint::Open(WriteTemporary("odd", testing::SafetensorsBytes(tensors))));
  ASSERT_OK_AND_ASSIGN(const Tensor tensor, checkpoint->Read("floats"));
  EXPECT_EQ(reinterpret_cast<uintptr_t>(tensor.data) % 4, 0);
  EXPECT_THAT(Floats(tensor), ElementsAre(1, 2));
}

TEST(CheckpointTest, ThreadsThatReadOneTensorShareItsCopy) {
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(absl::StrCat(kTestdata, "torch_zip.pth")));
  std::vector<const void*> seen(8);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < seen.size(); ++i) {
    threads.emplace_back([&, i] { seen[i] = checkpoint->Read("transposed")->data; });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_THAT(seen, testing::Each(seen[0]));
}

TEST(CheckpointTest, ReadOfAnUnknownTensorIsNotFound) {
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(absl::StrCat(kTestdata, "torch_zip.pth")));
  EXPECT_EQ(checkpoint->Find("nope"), nullptr);
  EXPECT_EQ(checkpoint->Find(""), nullptr);
  EXPECT_THAT(checkpoint->Read("nope"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("torch_zip.pth has no tensor \"nope\"")));
}

// One storage behind many tensors would make a small file claim any amount of memory.
TEST(CheckpointTest, TensorsThatShareOneStorageTooOftenAreRefused) {
  const auto shared = [](int times) {
    std::vector<testing::TensorSpec> specs;
    for (int i = 0; i < times; ++i) specs.push_back({absl::StrCat("t", i), ElementType::kUint8, {100'000}});
    std::string pickle = testing::StateDictPickle(specs);
    // All of them take storage "0": the key is the string before the device's.
    for (size_t at = 0; (at = pickle.find("ByteStorage\nX\1", at + 1)) != std::string::npos;) pickle[at + 17] = '0';
    return testing::ZipBytes(
        std::vector<testing::ZipEntry>{{"x/data.pkl", pickle}, {"x/data/0", std::string(100'000, 'x')}});
  };
  EXPECT_OK(Checkpoint::Open(WriteTemporary("tied.pth", shared(2))));
  EXPECT_THAT(Checkpoint::Open(WriteTemporary("bomb.pth", shared(9))),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("more than twice the file's")));
}

TEST(CheckpointTest, AFileCutWhileOpenIsDataLoss) {
  const std::vector<RawTensor> tensors = {{{"a", ElementType::kUint8, {10'000}}, std::string(10'000, 'x')}};
  const std::string path = WriteTemporary("cut", testing::SafetensorsBytes(tensors));
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(path));
  ASSERT_EQ(truncate(path.c_str(), 5000), 0);
  std::vector<uint8_t> bytes(10'000);
  EXPECT_THAT(checkpoint->ReadBytes(checkpoint->tensors()[0], 0, absl::MakeSpan(bytes)),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("ends at byte 5000")));
}

}  // namespace
}  // namespace rwkv::checkpoint
