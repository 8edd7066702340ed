#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "services/rwkvctl/npy_writer.h"
#include "services/rwkvctl/output_file.h"
#include "services/rwkvctl/safetensors_writer.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::rwkvctl {
namespace {

using ::rwkv::testing::StatusIs;
using ::testing::HasSubstr;

class WritersTest : public ::testing::Test {
 protected:
  WritersTest()
      : folder_(std::filesystem::path(::testing::TempDir()) /
                ::testing::UnitTest::GetInstance()->current_test_info()->name()) {
    std::filesystem::remove_all(folder_);
    std::filesystem::create_directories(folder_);
  }
  ~WritersTest() override { std::filesystem::remove_all(folder_); }

  std::string Path(const std::string& name) const { return (folder_ / name).string(); }
  std::string Read(const std::string& name) const {
    std::ifstream file(Path(name), std::ios::binary);
    std::stringstream content;
    content << file.rdbuf();
    return content.str();
  }
  int Files() const {
    int count = 0;
    for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(folder_)) ++count;
    return count;
  }

  const std::filesystem::path folder_;
};

std::string Bytes(const std::vector<float>& values) {
  std::string bytes(values.size() * sizeof(float), '\0');
  std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

TEST_F(WritersTest, OutputFileAppearsOnlyWhenCommitted) {
  {
    ASSERT_OK_AND_ASSIGN(OutputFile file, OutputFile::Create(Path("f")));
    ASSERT_OK(file.Write("abc"));
    EXPECT_FALSE(std::filesystem::exists(Path("f")));
  }
  EXPECT_EQ(Files(), 0);
  ASSERT_OK_AND_ASSIGN(OutputFile file, OutputFile::Create(Path("f")));
  ASSERT_OK(file.Write("abc"));
  ASSERT_OK(file.Commit());
  EXPECT_EQ(Read("f"), "abc");
  EXPECT_EQ(Files(), 1);
}

TEST_F(WritersTest, OutputFileErrorsNameThePath) {
  EXPECT_THAT(OutputFile::Create(Path("no/such/folder/f")),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("no/such/folder/f")));
  ASSERT_OK_AND_ASSIGN(OutputFile file, OutputFile::Create(Path("folder")));
  std::filesystem::create_directory(Path("folder"));
  EXPECT_THAT(file.Commit().ToString(), HasSubstr("folder"));
}

// numpy.save(f, numpy.array([[1, 2.5], [-3, 0]], dtype=numpy.float32)), NumPy 1.24.
TEST_F(WritersTest, OutputFileReplacesNothingButFiles) {
  ASSERT_EQ(mkfifo(Path("pipe").c_str(), 0600), 0);
  std::filesystem::create_symlink("pipe", Path("link"));
  std::filesystem::create_directory(Path("folder"));
  for (const std::string& path : {Path("folder"), Path("pipe"), Path("link"), std::string("/dev/null")}) {
    EXPECT_THAT(OutputFile::Create(path), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("no regular file")));
  }
}

TEST_F(WritersTest, NpyEqualsWhatNumpyWrites) {
  ASSERT_OK_AND_ASSIGN(NpyWriter writer, NpyWriter::Create(Path("a.npy"), 2, 2));
  ASSERT_OK(writer.Append(Bytes({1, 2.5f})));
  ASSERT_OK(writer.Append(Bytes({-3, 0})));
  ASSERT_OK(writer.Finish());
  const std::string expected = std::string("\x93NUMPY\x01\x00v\x00", 10) +
                               "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2), }" + std::string(58, ' ') +
                               "\n" + Bytes({1, 2.5f, -3, 0});
  EXPECT_EQ(Read("a.npy"), expected);
}

TEST_F(WritersTest, NpyDataStartsAtAMultipleOf64) {
  for (const uint64_t rows : {uint64_t{1}, uint64_t{99999}, uint64_t{1} << 62}) {
    const std::string header = NpyHeader(rows, 65536);
    EXPECT_EQ(header.size() % 64, 0);
    EXPECT_EQ(header.back(), '\n');
    EXPECT_EQ(static_cast<unsigned char>(header[8]) + 256 * static_cast<unsigned char>(header[9]), header.size() - 10);
  }
}

TEST_F(WritersTest, NpyRefusesMissingAndExtraRows) {
  ASSERT_OK_AND_ASSIGN(NpyWriter writer, NpyWriter::Create(Path("a.npy"), 2, 2));
  EXPECT_THAT(writer.Append("abc"), StatusIs(absl::StatusCode::kDataLoss));
  ASSERT_OK(writer.Append(Bytes({1, 2})));
  EXPECT_THAT(writer.Finish(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("1 of 2")));
  EXPECT_THAT(writer.Append(Bytes({1, 2, 3, 4})), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("row 2")));
  EXPECT_FALSE(std::filesystem::exists(Path("a.npy")));
}

TEST_F(WritersTest, SafetensorsHeaderDescribesTheData) {
  const std::vector<Tensor> tensors = {{"b.x", {2}, Bytes({1, 2})}, {"a.y", {1, 3, 1}, Bytes({3, 4, 5})}};
  ASSERT_OK(WriteSafetensors(Path("s.safetensors"), tensors, {{"position", "7"}}));
  const std::string file = Read("s.safetensors");
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, file.data(), sizeof(header_bytes));
  ASSERT_LE(8 + header_bytes, file.size());
  EXPECT_EQ(header_bytes % 8, 0);
  const nlohmann::json header = nlohmann::json::parse(file.substr(8, header_bytes));
  EXPECT_EQ(header, nlohmann::json::parse(R"({
      "__metadata__": {"position": "7"},
      "b.x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
      "a.y": {"dtype": "F32", "shape": [1, 3, 1], "data_offsets": [8, 20]}})"));
  EXPECT_EQ(file.substr(8 + header_bytes), Bytes({1, 2, 3, 4, 5}));
}

TEST(TensorCollectorTest, PiecesOfTensorsMayMix) {
  TensorCollector collector;
  EXPECT_OK(collector.Add("a", {2}, 0, Bytes({1})));
  EXPECT_OK(collector.Add("b", {1, 1}, 0, Bytes({9})));
  EXPECT_OK(collector.Add("a", {2}, 4, Bytes({2})));
  EXPECT_OK(collector.Finish());
  ASSERT_EQ(collector.tensors().size(), 2);
  EXPECT_EQ(collector.tensors()[0].data, Bytes({1, 2}));
  EXPECT_EQ(collector.tensors()[1].data, Bytes({9}));
}

TEST(TensorCollectorTest, BadPiecesAreDataLossAndNameTheTensor) {
  TensorCollector collector;
  EXPECT_THAT(collector.Finish(), StatusIs(absl::StatusCode::kDataLoss));
  EXPECT_OK(collector.Add("a", {2}, 0, Bytes({1})));
  EXPECT_THAT(collector.Finish(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("a ends after 4 of 8")));
  EXPECT_THAT(collector.Add("a", {3}, 4, Bytes({2})), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("shape")));
  EXPECT_THAT(collector.Add("a", {2}, 0, Bytes({1})),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("byte 0 after 4")));
  EXPECT_THAT(collector.Add("a", {2}, 4, Bytes({1, 2})),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("its 8 bytes")));
  EXPECT_THAT(collector.Add("n", {-1}, 0, ""), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("tensor n")));
  EXPECT_THAT(collector.Add("h", {1 << 30, 1 << 30, 1 << 30}, 0, ""), StatusIs(absl::StatusCode::kDataLoss));
}

}  // namespace
}  // namespace rwkv::rwkvctl
