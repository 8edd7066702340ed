#include "services/checkpoint/formats/safetensors.h"

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/checkpoint_writer.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::checkpoint {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::RawTensor;
using testing::StatusIs;

absl::StatusOr<SafetensorsDirectory> Parse(const std::string& file) {
  // A copy of exactly the file's size on the heap, so that the address sanitizer sees a read beyond it.
  const std::vector<uint8_t> bytes(file.begin(), file.end());
  return ReadSafetensors(bytes);
}

std::string WithHeader(const std::string& json, size_t payload_bytes) {
  std::string file(8, '\0');
  for (int i = 0; i < 8; ++i) file[i] = static_cast<char>(static_cast<uint64_t>(json.size()) >> (8 * i));
  return file + json + std::string(payload_bytes, 'x');
}

std::vector<RawTensor> TwoTensors() {
  return {{{"a", ElementType::kFloat32, {2, 3}}, std::string(24, 'a')},
          {{"b", ElementType::kBFloat16, {1, 1, 4}}, std::string(8, 'b')}};
}

// The base row of the tables below: two tensors, 24 and 8 bytes.
constexpr char kGoodHeader[] =
    R"({"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},)"
    R"("b":{"dtype":"BF16","shape":[1,1,4],"data_offsets":[24,32]}})";

TEST(SafetensorsTest, FindsTensorsAndMetadata) {
  ASSERT_OK_AND_ASSIGN(const SafetensorsDirectory directory,
                       Parse(testing::SafetensorsBytes(TwoTensors(), {{"format", "pt"}, {"origin", "a \"test\""}})));
  ASSERT_EQ(directory.tensors.size(), 2);
  EXPECT_EQ(directory.tensors[0].name, "a");
  EXPECT_EQ(directory.tensors[0].type, ElementType::kFloat32);
  EXPECT_THAT(directory.tensors[0].shape, ElementsAre(2, 3));
  EXPECT_TRUE(directory.tensors[0].strides.empty());
  EXPECT_EQ(directory.tensors[1].name, "b");
  EXPECT_EQ(directory.tensors[1].type, ElementType::kBFloat16);
  EXPECT_EQ(directory.tensors[1].offset, directory.tensors[0].offset + 24);
  EXPECT_THAT(directory.metadata, ElementsAre(testing::Pair("format", "pt"), testing::Pair("origin", "a \"test\"")));
}

TEST(SafetensorsTest, AcceptsWhatTheFormatAllows) {
  const struct {
    const char* name;
    std::string json;
    size_t payload;
    size_t tensors;
  } kCases[] = {
      {"the base row", kGoodHeader, 32, 2},
      {"blanks after the object", absl::StrCat(kGoodHeader, "   \n"), 32, 2},
      {"no tensor at all", "{}", 0, 0},
      {"metadata only", R"({"__metadata__":{"a":"b"}})", 0, 0},
      {"a scalar", R"({"a":{"dtype":"I64","shape":[],"data_offsets":[0,8]}})", 8, 1},
      {"an empty tensor",
       R"({"a":{"dtype":"F32","shape":[0,3],"data_offsets":[0,0]},)"
       R"("b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})",
       1, 2},
      {"tensors in another order than their data",
       R"({"b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]},"a":{"dtype":"BOOL","shape":[2],"data_offsets":[0,2]}})",
       3, 2},
      {"fields in another order", R"({"a":{"data_offsets":[0,1],"shape":[1],"dtype":"F8_E4M3"}})", 1, 1},
      {"no metadata", R"({"__metadata__":null,"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 1, 1},
      {"fields of an entry that nobody knows",
       R"({"a":{"x":7,"dtype":"U8","y":[1,[2.5,-1]],"shape":[1],"z":{"shape":[null,{"dtype":"F32"}]},)"
       R"("t":true,"u":null,"s":"q","data_offsets":[0,1],"w":[]}})",
       1, 1},
      {"an empty name", R"({"":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 1, 1},
  };
  for (const auto& test : kCases) {
    SCOPED_TRACE(test.name);
    const absl::StatusOr<SafetensorsDirectory> directory = Parse(WithHeader(test.json, test.payload));
    ASSERT_OK(directory);
    EXPECT_EQ(directory->tensors.size(), test.tensors);
  }
}

TEST(SafetensorsTest, RefusesHeadersThatLie) {
  const auto changed = [](absl::string_view from, absl::string_view to) {
    const std::string json = absl::StrReplaceAll(kGoodHeader, {{from, to}});
    EXPECT_NE(json, kGoodHeader) << from;
    return json;
  };
  const auto kInvalid = absl::StatusCode::kInvalidArgument;
  const auto kLost = absl::StatusCode::kDataLoss;
  std::string deep(100'000, '[');
  const struct {
    const char* name;
    std::string json;
    absl::StatusCode code;
    const char* message;
  } kCases[] = {
      {"shape larger than its bytes", changed("[2,3]", "[2,4]"), kInvalid, "shape [2, 4]"},
      {"shape smaller than its bytes", changed("[2,3]", "[2,2]"), kInvalid, "tensor \"a\""},
      {"type of another size", changed("F32", "F16"), kInvalid, "fp16 of shape [2, 3]"},
      {"shape whose product overflows", changed("[2,3]", "[4294967296,4294967296,6]"), kInvalid, "4294967296"},
      {"shape whose product wraps to the right size", changed("[2,3]", "[9223372036854775807,2,3]"), kInvalid,
       "does not take"},
      {"dimension above int64", changed("[2,3]", "[9223372036854775808]"), kInvalid, "9223372036854775808"},
      {"dimension above uint64", changed("[2,3]", "[99999999999999999999999]"), kInvalid, "99999999999999999999999"},
      {"negative dimension", changed("[2,3]", "[-2,-3]"), kInvalid, "-2"},
      {"fractional dimension", changed("[2,3]", "[2.0,3]"), kInvalid, "2.0"},
      {"dimension that is a string", changed("[2,3]", "[\"2\",3]"), kInvalid, "unexpected a string"},
      {"zero dimension with bytes", changed("[2,3]", "[0,3]"), kInvalid, "does not take"},
      {"nine dimensions", changed("[2,3]", "[1,1,1,1,1,1,1,2,3]"), kInvalid, "more than 8 dimensions"},
      {"nested shape", changed("[2,3]", "[[2],3]"), kInvalid, "unexpected an array"},
      {"shape that is a number", changed("[2,3]", "6"), kInvalid, "unexpected the number 6"},
      {"shape that is null", changed("[2,3]", "null"), kInvalid, "unexpected null"},
      {"unknown type", changed("F32", "F31"), kInvalid, "unknown dtype \"F31\""},
      {"type that is a number", changed("\"F32\"", "32"), kInvalid, "unexpected the number 32"},
      {"offsets beyond the end", changed("[24,32]", "[24,40]"), kLost, "reach beyond"},
      {"offsets near 2^64", changed("[24,32]", "[18446744073709551608,18446744073709551615]"), kLost, "reach beyond"},
      {"offsets backwards", changed("[24,32]", "[32,24]"), kInvalid, "end before they begin"},
      {"negative offset", changed("[0,24]", "[-1,23]"), kInvalid, "-1"},
      {"three offsets", changed("[0,24]", "[0,24,24]"), kInvalid, "more than two data_offsets"},
      {"one offset", changed("[0,24]", "[0]"), kInvalid, "fewer than two data_offsets"},
      {"no offset", changed("[0,24]", "[]"), kInvalid, "fewer than two data_offsets"},
      {"overlap", changed("[24,32]", "[16,24]"), kInvalid, "overlap"},
      {"the same bytes twice",
       R"({"a":{"dtype":"U8","shape":[32],"data_offsets":[0,32]},)"
       R"("b":{"dtype":"U8","shape":[32],"data_offsets":[0,32]}})",
       kInvalid, "overlap"},
      {"a hole at the start", R"({"a":{"dtype":"U8","shape":[24],"data_offsets":[8,32]}})", kInvalid, "nobody's"},
      {"a hole at the end", R"({"a":{"dtype":"U8","shape":[24],"data_offsets":[0,24]}})", kInvalid,
       "belong to no tensor"},
      {"a hole between",
       R"({"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[8],"data_offsets":[24,32]}})",
       kInvalid, "nobody's"},
      {"a name twice", absl::StrReplaceAll(kGoodHeader, {{"\"b\"", "\"a\""}}), kInvalid, "\"a\" twice"},
      {"metadata twice", R"({"__metadata__":{},"__metadata__":{}})", kInvalid, "twice"},
      {"metadata key twice", R"({"__metadata__":{"a":"1","a":"2"}})", kInvalid, "key twice"},
      {"metadata that is not text", R"({"__metadata__":{"a":1}})", kInvalid, "unexpected the number 1"},
      {"nested metadata", R"({"__metadata__":{"a":{}}})", kInvalid, "unexpected an object"},
      {"no dtype", R"({"a":{"shape":[32],"data_offsets":[0,32]}})", kInvalid, "no dtype"},
      {"no shape", R"({"a":{"dtype":"U8","data_offsets":[0,32]}})", kInvalid, "no shape"},
      {"no data_offsets", R"({"a":{"dtype":"U8","shape":[32]}})", kInvalid, "no data_offsets"},
      {"dtype twice", changed("\"dtype\":\"F32\"", "\"dtype\":\"F32\",\"dtype\":\"F32\""), kInvalid,
       "repeated field \"dtype\""},
      {"an unknown field without an end",
       R"({"a":{"x":[{"y":1},"dtype":"U8","shape":[32],"data_offsets":[0,32]}})", kInvalid, "not JSON"},
      {"unknown fields in place of the known",
       R"({"a":{"x":{"dtype":"U8","shape":[32],"data_offsets":[0,32]}}})", kInvalid, "no dtype"},
      {"a tensor that is a number", R"({"a":7})", kInvalid, "the number 7 for \"a\""},
      {"a tensor that is an array", R"({"a":[]})", kInvalid, "unexpected an array"},
      {"an array at the root", "[]", kInvalid, "no safetensors header"},
      {"two objects", absl::StrCat(kGoodHeader, "{}"), kInvalid, "not JSON"},
      {"a comment", absl::StrCat(kGoodHeader, "//"), kInvalid, "not JSON"},
      {"zero bytes as padding", absl::StrCat(kGoodHeader, std::string(4, '\0')), kInvalid, "not JSON"},
      {"an unfinished object", std::string(kGoodHeader, sizeof(kGoodHeader) - 2), kInvalid, "not JSON"},
      {"invalid UTF-8 in a name", "{\"\xff\":{}}", kInvalid, "not JSON"},
      {"a byte order mark", "\xef\xbb\xbf{}", kInvalid, "no safetensors header"},
      {"a hundred thousand open arrays", absl::StrCat("{\"a\":", deep), kInvalid, "unexpected an array"},
      {"a hundred thousand open arrays in a shape", absl::StrCat("{\"a\":{\"shape\":", deep), kInvalid,
       "unexpected an array"},
      {"an infinite dimension", changed("[2,3]", "[1e999]"), kInvalid, ""},
      {"an empty header", "", kInvalid, "no safetensors header"},
  };
  for (const auto& test : kCases) {
    SCOPED_TRACE(test.name);
    EXPECT_THAT(Parse(WithHeader(test.json, 32)), StatusIs(test.code, HasSubstr(test.message)));
  }
}

TEST(SafetensorsTest, HugeHeadersAreRefusedBeforeTheyAreRead) {
  const struct {
    const char* name;
    const char* length;
    absl::StatusCode code;
  } kCases[] = {
      {"100 MB and one byte", "\x01\xe1\xf5\x05\0\0\0\0", absl::StatusCode::kInvalidArgument},
      {"2^64 - 1", "\xff\xff\xff\xff\xff\xff\xff\xff", absl::StatusCode::kInvalidArgument},
      {"2^63", "\0\0\0\0\0\0\0\x80", absl::StatusCode::kInvalidArgument},
      {"100 MB in a file of ten bytes", "\0\xe1\xf5\x05\0\0\0\0", absl::StatusCode::kDataLoss},
  };
  for (const auto& test : kCases) {
    SCOPED_TRACE(test.name);
    EXPECT_THAT(Parse(std::string(test.length, 8) + "{}"), StatusIs(test.code));
  }
}

TEST(SafetensorsTest, TooManyTensorsAreRefused) {
  std::vector<std::string> fields;
  for (int i = 0; i <= kMaxTensors; ++i) {
    fields.push_back(absl::StrCat("\"", i, "\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}"));
  }
  EXPECT_THAT(Parse(WithHeader(absl::StrCat("{", absl::StrJoin(fields, ","), "}"), 0)),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("more than 32768 tensors")));
  fields.pop_back();
  EXPECT_OK(Parse(WithHeader(absl::StrCat("{", absl::StrJoin(fields, ","), "}"), 0)));
}

TEST(SafetensorsTest, TooMuchMetadataIsRefused) {
  std::vector<std::string> fields;
  for (int i = 0; i <= kMaxSafetensorsMetadata; ++i) fields.push_back(absl::StrCat("\"", i, "\":\"\""));
  EXPECT_THAT(Parse(WithHeader(absl::StrCat("{\"__metadata__\":{", absl::StrJoin(fields, ","), "}}"), 0)),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("4096")));
}

TEST(SafetensorsTest, EveryTruncationIsAnError) {
  const std::string file = testing::SafetensorsBytes(TwoTensors(), {{"format", "pt"}});
  ASSERT_OK(Parse(file));
  for (size_t size = 0; size < file.size(); ++size) {
    EXPECT_THAT(Parse(file.substr(0, size)), StatusIs(absl::StatusCode::kDataLoss)) << size << " bytes";
  }
}

TEST(SafetensorsTest, EveryBitFlipOfTheHeaderIsRefusedOrReadsWithinTheFile) {
  const std::string file = testing::SafetensorsBytes(TwoTensors(), {{"format", "pt"}});
  const size_t header = file.size() - 32;
  for (size_t bit = 0; bit < header * 8; ++bit) {
    std::string flipped = file;
    flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << (bit % 8)));
    const absl::StatusOr<SafetensorsDirectory> directory = Parse(flipped);
    if (!directory.ok()) continue;
    for (const TensorRecord& record : directory->tensors) {
      const absl::optional<int64_t> bytes = ByteCount(record.shape, record.type);
      ASSERT_TRUE(bytes.has_value()) << "bit " << bit;
      ASSERT_GE(record.offset, 8) << "bit " << bit;
      ASSERT_LE(record.offset + *bytes, static_cast<int64_t>(file.size())) << "bit " << bit;
    }
  }
}

}  // namespace
}  // namespace rwkv::checkpoint
