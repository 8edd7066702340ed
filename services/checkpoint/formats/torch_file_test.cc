#include "services/checkpoint/formats/torch_file.h"

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/checkpoint_writer.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::checkpoint {
namespace {

using namespace std::string_literals;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::RawTensor;
using testing::StatusIs;
using testing::ZipEntry;

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
constexpr auto kLost = absl::StatusCode::kDataLoss;
constexpr auto kUnimplemented = absl::StatusCode::kUnimplemented;

std::vector<uint8_t> Bytes(const std::string& text) { return std::vector<uint8_t>(text.begin(), text.end()); }

std::vector<RawTensor> TwoTensors() {
  return {{{"a", ElementType::kFloat32, {2, 3}}, std::string(24, 'a')},
          {{"b", ElementType::kBFloat16, {1, 1, 4}}, std::string(8, 'b')}};
}

std::string Int(int64_t value) {
  std::string out = "\x8a\x08";
  for (int i = 0; i < 8; ++i) out += static_cast<char>(static_cast<uint64_t>(value) >> (8 * i));
  return out;
}
std::string Tuple(const std::vector<int64_t>& values) {
  std::string out = "(";
  for (int64_t value : values) out += Int(value);
  return out + "t";
}
std::string Text(const std::string& text) {
  return "X" + std::string(1, static_cast<char>(text.size())) + std::string(3, '\0') + text;
}

// {name: view of storage "0", which has `elements` floats}.
std::string ViewPickle(int64_t elements, int64_t offset, const std::vector<int64_t>& shape,
                       const std::vector<int64_t>& stride) {
  return "\x80\x02}" + Text("view") + "ctorch._utils\n_rebuild_tensor_v2\n((" + Text("storage") +
         "ctorch\nFloatStorage\n" + Text("0") + Text("cuda:0") + Int(elements) + "tQ" + Int(offset) + Tuple(shape) +
         Tuple(stride) + "\x89}tRs.";
}

std::vector<ZipEntry> ViewEntries(int64_t elements, int64_t offset, const std::vector<int64_t>& shape,
                                  const std::vector<int64_t>& stride, size_t payload_bytes) {
  return {{"x/data.pkl", ViewPickle(elements, offset, shape, stride)}, {"x/data/0", std::string(payload_bytes, '\1')}};
}

absl::StatusOr<std::vector<TensorRecord>> ReadZip(const std::vector<ZipEntry>& entries) {
  absl::StatusOr<TorchDirectory> directory = ReadTorchZip(Bytes(testing::ZipBytes(entries)));
  if (!directory.ok()) return directory.status();
  return std::move(directory->tensors);
}

TEST(TorchFileTest, BothContainersGiveTheSameTensors) {
  const std::vector<uint8_t> zip = Bytes(testing::TorchZipBytes(TwoTensors()));
  const std::vector<uint8_t> legacy = Bytes(testing::TorchLegacyBytes(TwoTensors()));
  EXPECT_TRUE(LooksLikeTorchZip(zip));
  EXPECT_FALSE(LooksLikeTorchLegacy(zip));
  EXPECT_TRUE(LooksLikeTorchLegacy(legacy));
  ASSERT_OK_AND_ASSIGN(const TorchDirectory zip_directory, ReadTorchZip(zip));
  ASSERT_OK_AND_ASSIGN(const TorchDirectory legacy_directory, ReadTorchLegacy(legacy));
  const std::vector<TensorRecord>& of_zip = zip_directory.tensors;
  const std::vector<TensorRecord>& of_legacy = legacy_directory.tensors;
  ASSERT_EQ(of_zip.size(), 2);
  ASSERT_EQ(of_legacy.size(), 2);
  for (int i = 0; i < 2; ++i) {
    EXPECT_EQ(of_zip[i].name, of_legacy[i].name);
    EXPECT_EQ(of_zip[i].type, of_legacy[i].type);
    EXPECT_EQ(of_zip[i].shape, of_legacy[i].shape);
    EXPECT_EQ(zip[of_zip[i].offset], legacy[of_legacy[i].offset]);
    EXPECT_EQ(zip[of_zip[i].offset], "ab"[i]);
  }
  EXPECT_EQ(of_zip[0].offset % 64, 0);
}

TEST(TorchFileTest, AcceptsViewsInsideTheirStorage) {
  const struct {
    const char* name;
    int64_t offset;
    std::vector<int64_t> shape;
    std::vector<int64_t> stride;
  } kCases[] = {
      {"all of it", 0, {2, 3}, {3, 1}},
      {"transposed", 0, {3, 2}, {1, 3}},
      {"the last row", 3, {3}, {1}},
      {"a column", 1, {2}, {3}},
      {"a scalar", 5, {}, {}},
      {"nothing at the end", 6, {0}, {1}},
      {"unit dimensions with odd strides", 0, {1, 6, 1}, {999, 1, 12345}},
      {"nothing, hugely", 0, {0, INT64_MAX}, {INT64_MAX, 1}},
  };
  for (const auto& test : kCases) {
    SCOPED_TRACE(test.name);
    const auto records = ReadZip(ViewEntries(6, test.offset, test.shape, test.stride, 24));
    ASSERT_OK(records);
    EXPECT_EQ((*records)[0].shape, test.shape);
    EXPECT_EQ((*records)[0].strides, test.stride);
  }
}

TEST(TorchFileTest, RefusesViewsThatLeaveTheirStorage) {
  const struct {
    const char* name;
    int64_t elements;
    int64_t offset;
    std::vector<int64_t> shape;
    std::vector<int64_t> stride;
    size_t payload;
    const char* message;
  } kCases[] = {
      {"one element too far", 6, 1, {2, 3}, {3, 1}, 24, "reaches out of storage \"0\" of 6 elements"},
      {"stride too long", 6, 0, {2, 3}, {4, 1}, 24, "reaches out of"},
      {"negative stride", 6, 5, {6}, {-1}, 24, "reaches out of"},
      {"negative stride of a unit dimension", 6, 0, {1, 6}, {-6, 1}, 24, "reaches out of"},
      {"negative offset", 6, -1, {2}, {1}, 24, "reaches out of"},
      {"negative offset of nothing", 6, -1, {0}, {1}, 24, "lies outside"},
      {"nothing beyond the end", 6, 7, {0}, {1}, 24, "lies outside"},
      {"negative size", 6, 0, {-6}, {1}, 24, "impossible shape"},
      {"two negative sizes", 6, 0, {-2, -3}, {3, 1}, 24, "impossible shape"},
      {"size that overflows", 6, 0, {INT64_MAX, INT64_MAX}, {1, 1}, 24, "impossible shape"},
      {"reach that overflows", 6, 0, {2, 3}, {INT64_MAX, 1}, 24, "reaches out of"},
      {"reach that wraps", 6, 5, {2}, {INT64_MAX}, 24, "reaches out of"},
      {"offset at the end of int64", 6, INT64_MAX, {1}, {1}, 24, "reaches out of"},
      {"one element for ever", 6, 0, {1000, 1000}, {0, 0}, 24, "more elements than"},
      {"fewer strides than sizes", 6, 0, {2, 3}, {1}, 24, "as many strides"},
      {"more strides than sizes", 6, 0, {6}, {1, 1}, 24, "as many strides"},
      {"payload too short", 6, 0, {2, 3}, {3, 1}, 20, "of 20 bytes"},
      {"payload too long", 6, 0, {2, 3}, {3, 1}, 28, "of 28 bytes"},
      {"no payload", 6, 0, {2, 3}, {3, 1}, 0, "of 0 bytes"},
      {"storage of 2^61 floats, which is 2^63 bytes", int64_t{1} << 61, 0, {2, 3}, {3, 1}, 24, "has a member"},
      {"storage of 2^62 floats, which is 2^64 bytes", int64_t{1} << 62, 0, {2, 3}, {3, 1}, 0, "has a member"},
      {"storage of -1 floats", -1, 0, {2, 3}, {3, 1}, 24, "-1 elements"},
  };
  for (const auto& test : kCases) {
    SCOPED_TRACE(test.name);
    EXPECT_THAT(ReadZip(ViewEntries(test.elements, test.offset, test.shape, test.stride, test.payload)),
                StatusIs(kInvalid, HasSubstr(test.message)));
  }
}

TEST(TorchFileTest, RefusesArchivesThatAreNoCheckpoint) {
  const std::string pickle = ViewPickle(6, 0, {6}, {1});
  const std::string payload(24, '\1');
  const struct {
    const char* name;
    std::vector<ZipEntry> entries;
    absl::StatusCode code;
    const char* message;
  } kCases[] = {
      {"empty", {}, kInvalid, "no data.pkl"},
      {"another archive", {{"readme.txt", "hello"}}, kInvalid, "no data.pkl"},
      {"two pickles",
       {{"x/data.pkl", pickle}, {"y/data.pkl", pickle}, {"x/data/0", payload}},
       kInvalid,
       "both \"x/data.pkl\" and \"y/data.pkl\""},
      {"a member twice",
       {{"x/data.pkl", pickle}, {"x/data/0", payload}, {"x/data/0", payload}},
       kInvalid,
       "two members are named \"x/data/0\""},
      {"no storage", {{"x/data.pkl", pickle}}, kInvalid, "storage \"0\" of 6 fp32 has no member \"x/data/0\""},
      {"the storage in another folder", {{"x/data.pkl", pickle}, {"y/data/0", payload}}, kInvalid, "has no member"},
      {"bytes after the pickle", {{"x/data.pkl", pickle + "N"}, {"x/data/0", payload}}, kInvalid, "goes on after"},
      {"an empty pickle", {{"x/data.pkl", ""}, {"x/data/0", payload}}, kLost, "ends inside the pickle"},
      {"big-endian",
       {{"x/data.pkl", pickle}, {"x/byteorder", "big"}, {"x/data/0", payload}},
       kUnimplemented,
       "byte order \"big\""},
      {"code",
       {{"x/data.pkl", "\x80\x02"s + "cos\nsystem\n" + Text("id") + "\x85R."}},
       kInvalid,
       "refuses global \"os system\""},
      {"a list", {{"x/data.pkl", "\x80\x02]."}}, kInvalid, "not a dict"},
  };
  for (const auto& test : kCases) {
    SCOPED_TRACE(test.name);
    EXPECT_THAT(ReadZip(test.entries), StatusIs(test.code, HasSubstr(test.message)));
  }
}

TEST(TorchFileTest, RefusesBrokenLegacyFiles) {
  const std::string good = testing::TorchLegacyBytes(TwoTensors());
  ASSERT_OK(ReadTorchLegacy(Bytes(good)));
  const auto changed = [&good](absl::string_view from, absl::string_view to) {
    const std::string text = absl::StrReplaceAll(good, {{from, to}});
    EXPECT_NE(text, good) << from;
    return text;
  };
  const struct {
    const char* name;
    std::string file;
    absl::StatusCode code;
    const char* message;
  } kCases[] = {
      {"another magic number", changed("\x8a\x0a\x6c", "\x8a\x0a\x6d"), kInvalid, "magic number"},
      {"another protocol", changed("M\xe9\x03.", "M\xe8\x03."), kInvalid, "1001"},
      {"big-endian", changed("little_endian\x88", "little_endian\x89"), kUnimplemented, "big-endian"},
      {"a key that has no tensor",
       changed("](X\1\0\0\0"
               "0"s,
               "](X\1\0\0\0"
               "7"s),
       kInvalid, "storage key \"7\""},
      {"a key twice",
       changed("0X\1\0\0\0"
               "1e."s,
               "0X\1\0\0\0"
               "0e."s),
       kInvalid, "storage key \"0\" is listed twice"},
      {"a key that is a number",
       changed("](X\1\0\0\0"
               "0"s,
               "](K\0"s),
       kInvalid, "no string"},
      {"a storage without key",
       changed("X\1\0\0\0"
               "1e."s,
               "e."s),
       kInvalid, "storage \"1\" of 4 bf16 has no payload"},
      {"another element count", changed("e.\6\0\0\0"s, "e.\7\0\0\0"s), kInvalid, "payload of 7 elements"},
      {"bytes at the end", good + "x", kInvalid, "belong to no storage"},
      {"code in the system info",
       changed("\x80\x02}("s,
               "\x80\x02"
               "cos\nsystem\n("s),
       kInvalid, "os system"},
  };
  for (const auto& test : kCases) {
    SCOPED_TRACE(test.name);
    EXPECT_THAT(ReadTorchLegacy(Bytes(test.file)), StatusIs(test.code, HasSubstr(test.message)));
  }
  for (size_t size = 15; size < good.size(); ++size) {
    EXPECT_THAT(ReadTorchLegacy(Bytes(good.substr(0, size))), StatusIs(kLost)) << size << " bytes";
  }
}

TEST(TorchFileTest, EveryBitFlipIsRefusedOrReadsWithinTheFile) {
  for (const std::string& file : {testing::TorchZipBytes(TwoTensors()), testing::TorchLegacyBytes(TwoTensors())}) {
    for (size_t bit = 0; bit < file.size() * 8; ++bit) {
      std::vector<uint8_t> flipped = Bytes(file);
      flipped[bit / 8] = static_cast<uint8_t>(flipped[bit / 8] ^ (1 << (bit % 8)));
      const auto records = LooksLikeTorchZip(Bytes(file)) ? ReadTorchZip(flipped) : ReadTorchLegacy(flipped);
      if (!records.ok()) continue;
      for (const TensorRecord& record : records->tensors) {
        int64_t last = record.offset;
        for (size_t i = 0; i < record.shape.size(); ++i) {
          last += (record.shape[i] - 1) * record.strides[i] * ElementSize(record.type);
        }
        if (ElementCount(record.shape) == 0) continue;
        ASSERT_GE(record.offset, 0) << "bit " << bit;
        ASSERT_LE(last + ElementSize(record.type), static_cast<int64_t>(file.size())) << "bit " << bit;
      }
    }
  }
}

}  // namespace
}  // namespace rwkv::checkpoint
