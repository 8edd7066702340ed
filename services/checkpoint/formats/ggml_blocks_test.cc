#include "kernels/base/ggml_blocks.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/dtype.h"
#include "services/checkpoint/formats/element_type.h"
#include "services/checkpoint/formats/mapped_file.h"
#include "services/checkpoint/formats/safetensors.h"
#include "services/checkpoint/formats/tensor_reader.h"
#include "services/checkpoint/formats/tensor_record.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::checkpoint {
namespace {

constexpr char kFile[] = "services/checkpoint/testdata/ggml_blocks.safetensors";

constexpr BlockType kTypes[] = {BlockType::kQ4_0, BlockType::kQ4_1, BlockType::kQ5_0, BlockType::kQ5_1,
                                BlockType::kQ8_0, BlockType::kQ4_K, BlockType::kQ5_K, BlockType::kQ6_K};

// Three random blocks of each type, and their weights according to gguf-py.
class GgmlBlocksTest : public ::testing::TestWithParam<BlockType> {
 protected:
  void SetUp() override {
    ASSERT_OK_AND_ASSIGN(file_, MappedFile::Open(kFile));
    ASSERT_OK_AND_ASSIGN(SafetensorsDirectory directory, ReadSafetensors(file_->bytes()));
    const std::string name(BlockTypeName(GetParam()));
    for (const TensorRecord& record : directory.tensors) {
      if (record.name == name) blocks_ = record;
      if (record.name == absl::StrCat(name, ".weights")) weights_ = record;
    }
    ASSERT_EQ(blocks_.shape, (std::vector<int64_t>{3, BlockBytes(GetParam())}));
    ASSERT_EQ(weights_.shape, (std::vector<int64_t>{3, BlockWeights(GetParam())}));
  }

  std::vector<float> Expected() const {
    std::vector<float> out(*ElementCount(weights_.shape));
    std::memcpy(out.data(), file_->bytes().data() + weights_.offset, out.size() * sizeof(float));
    return out;
  }

  // A record over the blocks, as GGUF's reader makes it.
  TensorRecord Record() const {
    TensorRecord record;
    record.name = "x";
    record.shape = weights_.shape;
    record.offset = blocks_.offset;
    record.blocks = GetParam();
    return record;
  }

  std::vector<uint8_t> Read(const TensorRecord& record) const {
    std::vector<uint8_t> bytes(*ByteCount(record.shape, record.type));
    EXPECT_OK(ReadTensor(*file_, record, 0, absl::MakeSpan(bytes)));
    return bytes;
  }

  std::unique_ptr<MappedFile> file_;
  TensorRecord blocks_;
  TensorRecord weights_;
};

std::vector<float> AsFloats(const std::vector<uint8_t>& bytes) {
  std::vector<float> out(bytes.size() / sizeof(float));
  std::memcpy(out.data(), bytes.data(), bytes.size());
  return out;
}

TEST_P(GgmlBlocksTest, WeightsAreThoseOfGgmlToTheBit) { EXPECT_EQ(AsFloats(Read(Record())), Expected()); }

TEST_P(GgmlBlocksTest, AnyDivisionReadsTheSame) {
  const std::vector<uint8_t> whole = Read(Record());
  for (int64_t piece : {4, 12, 100, 132}) {
    std::vector<uint8_t> pieces(whole.size());
    for (int64_t at = 0; at < static_cast<int64_t>(whole.size()); at += piece) {
      const int64_t size = std::min<int64_t>(piece, static_cast<int64_t>(whole.size()) - at);
      ASSERT_OK(ReadTensor(*file_, Record(), at, absl::MakeSpan(pieces).subspan(at, size)));
    }
    EXPECT_EQ(pieces, whole) << "in pieces of " << piece;
  }
}

TEST_P(GgmlBlocksTest, ATransposedViewReadsTheTransposedWeights) {
  TensorRecord record = Record();
  const int64_t columns = record.shape[1];
  record.shape = {columns, 3};
  record.strides = {1, columns};
  const std::vector<float> read = AsFloats(Read(record));
  const std::vector<float> expected = Expected();
  for (int64_t row = 0; row < 3; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      ASSERT_EQ(read[column * 3 + row], expected[row * columns + column]) << row << ", " << column;
    }
  }
}

TEST_P(GgmlBlocksTest, APairMakesTheSameWeights) {
  const BlockType type = GetParam();
  if (!HasQuants(type)) return;
  std::vector<uint8_t> quants(3 * PartBytes(type, BlockPart::kQuants));
  std::vector<uint8_t> scales(3 * 2);
  std::vector<uint8_t> minimums(3 * 2);
  const uint8_t* blocks = file_->bytes().data() + blocks_.offset;
  DecodeBlocks(type, BlockPart::kQuants, blocks, 3, quants.data());
  DecodeBlocks(type, BlockPart::kScales, blocks, 3, scales.data());
  if (HasMinimums(type)) DecodeBlocks(type, BlockPart::kMinimums, blocks, 3, minimums.data());
  const std::vector<float> expected = Expected();
  for (int64_t i = 0; i < 96; ++i) {
    const int q =
        HasMinimums(type) ? (i % 2 == 0 ? quants[i / 2] & 15 : quants[i / 2] >> 4) : static_cast<int8_t>(quants[i]);
    const float scale = kernels::LoadAsFloat(kernels::DType::kFloat16, scales.data(), i / 32);
    const float minimum = kernels::LoadAsFloat(kernels::DType::kFloat16, minimums.data(), i / 32);
    const float product = static_cast<float>(q) * scale;
    ASSERT_EQ(product + minimum, expected[i]) << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Types, GgmlBlocksTest, ::testing::ValuesIn(kTypes),
                         [](const auto& info) { return std::string(BlockTypeName(info.param)); });

}  // namespace
}  // namespace rwkv::checkpoint
