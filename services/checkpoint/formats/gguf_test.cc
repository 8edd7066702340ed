#include "services/checkpoint/formats/gguf.h"

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

using testing::ElementsAre;
using testing::GgmlTensor;
using testing::GgufBytes;
using testing::GgufKey;
using testing::GgufOptions;
using testing::GgufText;
using testing::GgufTexts;
using testing::GgufUint32;
using testing::HasSubstr;
using testing::StatusIs;

absl::Span<const uint8_t> AsBytes(const std::string& file) {
  return {reinterpret_cast<const uint8_t*>(file.data()), file.size()};
}

// `bytes` zeros.
GgmlTensor Zeros(const std::string& name, uint32_t type, std::vector<int64_t> shape, size_t bytes) {
  return {name, type, std::move(shape), std::string(bytes, '\0')};
}

std::string Number(uint64_t value, int bytes) {
  std::string out;
  for (int i = 0; i < bytes; ++i) out.push_back(static_cast<char>(value >> (8 * i)));
  return out;
}

TEST(GgufTest, ReadsTensorsKeysAndTokens) {
  const std::vector<GgufKey> keys = {
      GgufText("general.architecture", "rwkv7"),
      GgufUint32("rwkv7.block_count", 12),
      {"small", absl::StrCat(Number(1, 4), "\xff")},
      {"real", absl::StrCat(Number(6, 4), std::string("\0\0\xc0\x3f", 4))},
      {"flag", absl::StrCat(Number(7, 4), "\1")},
      {"numbers", absl::StrCat(Number(9, 4), Number(4, 4), Number(2, 8), Number(0, 8))},
      GgufTexts("tokenizer.ggml.tokens", {"<s>", "a", "\\n"}),
      {"tokenizer.ggml.token_type",
       absl::StrCat(Number(9, 4), Number(5, 4), Number(3, 8), Number(3, 4), Number(1, 4), Number(1, 4))},
  };
  const std::string file = GgufBytes(keys, {Zeros("a", 0, {2, 3}, 24), Zeros("b", 8, {2, 64}, 136),
                                            Zeros("c", 30, {5, 1, 4}, 40), Zeros("d", 0, {0}, 0)});
  ASSERT_OK_AND_ASSIGN(const GgufDirectory directory, ReadGguf(AsBytes(file)));
  EXPECT_EQ(directory.metadata.at("general.architecture"), "rwkv7");
  EXPECT_EQ(directory.metadata.at("rwkv7.block_count"), "12");
  EXPECT_EQ(directory.metadata.at("small"), "-1");
  EXPECT_EQ(directory.metadata.at("real"), "1.5");
  EXPECT_EQ(directory.metadata.at("flag"), "true");
  EXPECT_EQ(directory.metadata.count("numbers"), 0);
  EXPECT_THAT(directory.tokens, ElementsAre("<s>", "a", "\\n"));
  EXPECT_THAT(directory.token_types, ElementsAre(3, 1, 1));
  ASSERT_EQ(directory.tensors.size(), 4);
  EXPECT_EQ(directory.tensors[0].shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(directory.tensors[0].offset % 32, 0);
  EXPECT_EQ(directory.tensors[1].blocks, BlockType::kQ8_0);
  EXPECT_EQ(directory.tensors[1].offset, directory.tensors[0].offset + 32);
  EXPECT_EQ(directory.tensors[2].type, ElementType::kBFloat16);
  EXPECT_EQ(directory.tensors[2].offset + 64, static_cast<int64_t>(file.size()));  // 40 bytes, padded.
}

TEST(GgufTest, ReadsVersionTwoAndOtherAlignments) {
  GgufOptions options;
  options.version = 2;
  options.alignment = 64;
  const std::string file = GgufBytes(std::vector<GgufKey>{GgufUint32("general.alignment", 64)},
                                     {Zeros("a", 1, {3}, 6), Zeros("b", 1, {3}, 6)}, options);
  ASSERT_OK_AND_ASSIGN(const GgufDirectory directory, ReadGguf(AsBytes(file)));
  EXPECT_EQ(directory.tensors[1].offset - directory.tensors[0].offset, 64);
}

TEST(GgufTest, EveryTruncationIsAnError) {
  const std::string file = GgufBytes(
      std::vector<GgufKey>{GgufText("general.architecture", "rwkv7"), GgufTexts("tokenizer.ggml.tokens", {"a", "b"})},
      {Zeros("a", 0, {2, 3}, 24), Zeros("b", 8, {32}, 34)});
  for (size_t size = 4; size < file.size(); ++size) {
    EXPECT_THAT(ReadGguf(AsBytes(file).subspan(0, size)), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("GGUF")))
        << size;
  }
}

TEST(GgufTest, WhatContradictsItselfIsRefusedByName) {
  const std::string many = absl::StrCat("GGUF", Number(3, 4), Number(uint64_t{1} << 60, 8), Number(0, 8));
  const std::string keys = absl::StrCat("GGUF", Number(3, 4), Number(0, 8), Number(uint64_t{1} << 60, 8));
  const std::string text = absl::StrCat("GGUF", Number(3, 4), Number(0, 8), Number(1, 8), Number(~uint64_t{0}, 8));
  const std::string array = absl::StrCat("GGUF", Number(3, 4), Number(0, 8), Number(1, 8), Number(1, 8), "k",
                                         Number(9, 4), Number(12, 4), Number(uint64_t{1} << 61, 8), Number(0, 8));
  const auto one_key = [](const GgufKey& key) { return GgufBytes(std::vector<GgufKey>{key}, {}); };
  const auto one_tensor = [](const GgmlTensor& tensor) { return GgufBytes({}, std::vector<GgmlTensor>{tensor}); };
  std::string overlap = GgufBytes({}, {Zeros("first", 0, {16}, 64), Zeros("second", 0, {16}, 64)});
  // The second tensor's offset, 64, becomes 32.
  overlap[overlap.rfind('\x40', overlap.size() - 129)] = 32;
  const struct {
    const char* name;
    std::string file;
    absl::StatusCode code;
    const char* message;
  } kCases[] = {
      {"version 1", GgufBytes({}, {}, {1, 32}), absl::StatusCode::kUnimplemented, "GGUF version 1"},
      {"version 4", GgufBytes({}, {}, {4, 32}), absl::StatusCode::kUnimplemented, "GGUF version 4"},
      {"big-endian", GgufBytes({}, {}, {3 << 24, 32}), absl::StatusCode::kUnimplemented, "big-endian"},
      {"tensors without end", many, absl::StatusCode::kInvalidArgument, "1152921504606846976 tensors"},
      {"keys without end", keys, absl::StatusCode::kInvalidArgument, "1152921504606846976 keys"},
      {"a text without end", text, absl::StatusCode::kInvalidArgument, "18446744073709551615 bytes long"},
      {"an array without end", array, absl::StatusCode::kDataLoss, "key \"k\""},
      {"tokens without end",
       one_key({"tokenizer.ggml.tokens", absl::StrCat(Number(9, 4), Number(8, 4), Number(uint64_t{1} << 50, 8))}),
       absl::StatusCode::kInvalidArgument, "\"tokenizer.ggml.tokens\" has 1125899906842624 entries"},
      {"a type of no value", one_key({"k", Number(13, 4)}), absl::StatusCode::kInvalidArgument, "unknown type 13"},
      {"an array of arrays",
       one_key({"k", absl::StrCat(Number(9, 4), Number(9, 4), Number(1, 8), std::string(12, '\0'))}),
       absl::StatusCode::kInvalidArgument, "an array of type 9"},
      {"no alignment", one_key(GgufUint32("general.alignment", 0)), absl::StatusCode::kInvalidArgument,
       "general.alignment is 0"},
      {"alignment of 48", one_key(GgufUint32("general.alignment", 48)), absl::StatusCode::kInvalidArgument,
       "general.alignment is 48"},
      {"alignment of 2^31", one_key(GgufUint32("general.alignment", 1u << 31)), absl::StatusCode::kInvalidArgument,
       "general.alignment is 2147483648"},
      {"an alignment in words", one_key(GgufText("general.alignment", "wide")), absl::StatusCode::kInvalidArgument,
       "general.alignment is wide"},
      {"a key twice", GgufBytes(std::vector<GgufKey>{GgufUint32("k", 1), GgufUint32("k", 2)}, {}),
       absl::StatusCode::kInvalidArgument, "key \"k\" is there twice"},
      {"tokens twice",
       GgufBytes(
           std::vector<GgufKey>{GgufTexts("tokenizer.ggml.tokens", {"a"}), GgufTexts("tokenizer.ggml.tokens", {"a"})},
           {}),
       absl::StatusCode::kInvalidArgument, "is there twice"},
      {"types of other tokens",
       GgufBytes(std::vector<GgufKey>{GgufTexts("tokenizer.ggml.tokens", {"a", "b"}),
                                      {"tokenizer.ggml.token_type",
                                       absl::StrCat(Number(9, 4), Number(5, 4), Number(1, 8), Number(1, 4))}},
                 {}),
       absl::StatusCode::kInvalidArgument, "2 tokens, but 1 token types"},
      {"five dimensions", one_tensor(Zeros("t", 0, {1, 1, 1, 1, 1}, 4)), absl::StatusCode::kInvalidArgument,
       "tensor \"t\" has 5 dimensions"},
      {"a dimension beyond int64", one_tensor(Zeros("t", 0, {-1}, 4)), absl::StatusCode::kInvalidArgument,
       "a dimension of 18446744073709551615"},
      {"a product beyond int64", one_tensor(Zeros("t", 0, {int64_t{1} << 40, int64_t{1} << 40}, 4)),
       absl::StatusCode::kInvalidArgument, "shape [1099511627776, 1099511627776]"},
      {"more than the file", one_tensor(Zeros("t", 0, {1 << 20}, 4)), absl::StatusCode::kDataLoss, "tensor \"t\""},
      {"a type nobody reads", one_tensor(Zeros("t", 10, {256}, 84)), absl::StatusCode::kUnimplemented,
       "tensor \"t\" has ggml type 10"},
      {"half a block", one_tensor(Zeros("t", 8, {48}, 51)), absl::StatusCode::kInvalidArgument, "rows of 48"},
      {"a scalar in blocks", one_tensor(Zeros("t", 8, {}, 34)), absl::StatusCode::kInvalidArgument, "scalar"},
      {"tensors that overlap", overlap, absl::StatusCode::kInvalidArgument, "\"first\" and \"second\" overlap"},
  };
  for (const auto& test : kCases) {
    SCOPED_TRACE(test.name);
    EXPECT_THAT(ReadGguf(AsBytes(test.file)), StatusIs(test.code, HasSubstr(test.message)));
  }
}

}  // namespace
}  // namespace rwkv::checkpoint
