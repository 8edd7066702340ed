#include "services/checkpoint/formats/rwkv_cpp.h"

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/ggml_blocks.h"
#include "services/checkpoint/formats/element_type.h"
#include "tests/testing/checkpoint_writer.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::checkpoint {
namespace {

using testing::GgmlTensor;
using testing::HasSubstr;
using testing::RwkvCppBytes;
using testing::StatusIs;

absl::Span<const uint8_t> AsBytes(const std::string& file) {
  return {reinterpret_cast<const uint8_t*>(file.data()), file.size()};
}

GgmlTensor Zeros(const std::string& name, uint32_t type, std::vector<int64_t> shape, size_t bytes) {
  return {name, type, std::move(shape), std::string(bytes, '\0')};
}

TEST(RwkvCppTest, ReadsHeaderAndTensors) {
  const std::string file = RwkvCppBytes({101, 256, 64, 12}, {Zeros("a", 0, {2, 3}, 24), Zeros("bc", 1, {3}, 6),
                                                             Zeros("d", 9, {2, 64}, 136), Zeros("e", 7, {32}, 22)});
  ASSERT_OK_AND_ASSIGN(const RwkvCppDirectory directory, ReadRwkvCpp(AsBytes(file)));
  EXPECT_EQ(directory.vocab_size, 256);
  EXPECT_EQ(directory.width, 64);
  EXPECT_EQ(directory.layer_count, 12);
  ASSERT_EQ(directory.tensors.size(), 4);
  EXPECT_EQ(directory.tensors[0].shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(directory.tensors[0].offset, 24 + 12 + 8 + 1);
  EXPECT_EQ(directory.tensors[1].type, ElementType::kFloat16);
  EXPECT_EQ(directory.tensors[2].blocks, BlockType::kQ8_0);
  EXPECT_EQ(directory.tensors[3].offset + 22, static_cast<int64_t>(file.size()));
}

// A cut between two tensors looks like a smaller file; the dialect finds it by the header's layers, the model's config
// by the tensors that are missing.
TEST(RwkvCppTest, EveryTruncationInsideATensorIsAnError) {
  const std::string file = RwkvCppBytes({101, 256, 64, 12}, {Zeros("a", 0, {2, 3}, 24)});
  for (size_t size = 4; size < file.size(); ++size) {
    if (size == 24) continue;  // The whole header and nothing else.
    EXPECT_THAT(ReadRwkvCpp(AsBytes(file).subspan(0, size)),
                StatusIs(absl::StatusCode::kDataLoss, HasSubstr("rwkv.cpp")))
        << size;
  }
}

TEST(RwkvCppTest, WhatContradictsItselfIsRefusedByName) {
  const auto one = [](const GgmlTensor& tensor, uint32_t version = 101) {
    return RwkvCppBytes({version, 1, 1, 1}, std::vector<GgmlTensor>{tensor});
  };
  const std::string long_name(513, 'n');
  const struct {
    const char* name;
    std::string file;
    absl::StatusCode code;
    const char* message;
  } kCases[] = {
      {"version 99", RwkvCppBytes({99, 1, 1, 1}, {}), absl::StatusCode::kUnimplemented, "version 99"},
      {"version 102", RwkvCppBytes({102, 1, 1, 1}, {}), absl::StatusCode::kUnimplemented, "version 102"},
      {"no dimensions", one(Zeros("t", 0, {}, 4)), absl::StatusCode::kInvalidArgument, "has 0 dimensions"},
      {"four dimensions", one(Zeros("t", 0, {1, 1, 1, 1}, 4)), absl::StatusCode::kInvalidArgument, "has 4 dimensions"},
      {"no name", one(Zeros("", 0, {1}, 4)), absl::StatusCode::kInvalidArgument, "a name of 0 bytes"},
      {"a long name", one(Zeros(long_name, 0, {1}, 4)), absl::StatusCode::kInvalidArgument, "a name of 513 bytes"},
      {"a dead type", one(Zeros("t", 4, {32}, 24)), absl::StatusCode::kUnimplemented, "tensor \"t\" has data type 4"},
      {"blocks in version 100", one(Zeros("t", 2, {32}, 18), 100), absl::StatusCode::kUnimplemented,
       "tensor \"t\" is Q4_0 in a file of version 100"},
      {"a negative size", one(Zeros("t", 0, {-1}, 4)), absl::StatusCode::kInvalidArgument, "shape [-1]"},
      {"a size of zero", one(Zeros("t", 0, {0}, 4)), absl::StatusCode::kInvalidArgument, "shape [0]"},
      {"absurd sizes", one(Zeros("t", 0, {0x7fffffff, 0x7fffffff, 0x7fffffff}, 4)), absl::StatusCode::kInvalidArgument,
       "shape [2147483647, 2147483647, 2147483647]"},
      {"more than the file", one(Zeros("t", 0, {0x7fffffff}, 4)), absl::StatusCode::kDataLoss,
       "takes 8589934588 bytes"},
      {"half a block", one(Zeros("t", 8, {48}, 36)), absl::StatusCode::kInvalidArgument, "rows of 48"},
  };
  for (const auto& test : kCases) {
    SCOPED_TRACE(test.name);
    EXPECT_THAT(ReadRwkvCpp(AsBytes(test.file)), StatusIs(test.code, HasSubstr(test.message)));
  }
}

TEST(RwkvCppTest, MoreTensorsThanAnyModelHasAreRefused) {
  std::string file = RwkvCppBytes({101, 1, 1, 1}, {});
  const std::string tensor = RwkvCppBytes({}, {Zeros("t", 1, {1}, 2)}).substr(24);
  for (int i = 0; i <= kMaxTensors; ++i) file += tensor;
  EXPECT_THAT(ReadRwkvCpp(AsBytes(file)), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("more than 32768")));
}

}  // namespace
}  // namespace rwkv::checkpoint
