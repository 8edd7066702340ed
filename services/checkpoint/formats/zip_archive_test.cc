#include "services/checkpoint/formats/zip_archive.h"

#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/checkpoint_writer.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::checkpoint {
namespace {

using testing::HasSubstr;
using testing::StatusIs;
using testing::ZipEntry;
using testing::ZipOptions;

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
constexpr auto kLost = absl::StatusCode::kDataLoss;
constexpr auto kUnimplemented = absl::StatusCode::kUnimplemented;

// Members as copies, so that they outlive the bytes; those are exactly the file's size, for the address sanitizer.
struct Listed {
  std::string name;
  std::string data;
};
absl::StatusOr<std::vector<Listed>> List(const std::string& file) {
  const std::vector<uint8_t> bytes(file.begin(), file.end());
  const absl::StatusOr<std::vector<ZipMember>> members = ReadZipDirectory(bytes);
  if (!members.ok()) return members.status();
  std::vector<Listed> listed;
  for (const ZipMember& member : *members) {
    EXPECT_LE(member.offset, bytes.size());
    EXPECT_LE(member.size, bytes.size() - member.offset);
    listed.push_back({std::string(member.name),
                      std::string(bytes.begin() + member.offset, bytes.begin() + member.offset + member.size)});
  }
  return listed;
}
absl::Status ListStatus(const std::string& file) { return List(file).status(); }

const std::vector<ZipEntry> kEntries = {
    {"a/data.pkl", "pickle"}, {"a/data/0", std::string(100, '0')}, {"a/version", "3\n"}};

constexpr size_t kEnd = 22;       // Size of the end of central directory,
constexpr size_t kLocator = 20;   // of the ZIP64 locator before it,
constexpr size_t kZip64End = 56;  // and of the ZIP64 end before that.

void Set(std::string* file, size_t at, uint64_t value, int bytes) {
  for (int i = 0; i < bytes; ++i) (*file)[at + i] = static_cast<char>(value >> (8 * i));
}

// Where the nth central header begins.
size_t CentralHeader(const std::string& file, int n) {
  size_t at = file.find("PK\x01\x02");
  for (; n > 0; --n) at = file.find("PK\x01\x02", at + 1);
  return at;
}

TEST(ZipArchiveTest, FindsMembersInEveryFormTorchWrites) {
  for (bool zip64 : {false, true}) {
    for (bool data_descriptors : {false, true}) {
      SCOPED_TRACE(absl::StrCat("zip64 ", zip64, ", descriptors ", data_descriptors));
      ASSERT_OK_AND_ASSIGN(const std::vector<Listed> members,
                           List(ZipBytes(kEntries, ZipOptions{zip64, data_descriptors})));
      ASSERT_EQ(members.size(), kEntries.size());
      for (size_t i = 0; i < members.size(); ++i) {
        EXPECT_EQ(members[i].name, kEntries[i].name);
        EXPECT_EQ(members[i].data, kEntries[i].data);
      }
    }
  }
}

TEST(ZipArchiveTest, AnEmptyArchiveHasNoMembers) {
  ASSERT_OK_AND_ASSIGN(const std::vector<Listed> members, List(testing::ZipBytes({})));
  EXPECT_TRUE(members.empty());
}

TEST(ZipArchiveTest, ACommentAtTheEndIsSkipped) {
  std::string file = testing::ZipBytes(kEntries);
  Set(&file, file.size() - 2, 5, 2);
  EXPECT_THAT(List(file + "hello"), testing::IsOkAndHolds(testing::SizeIs(3)));
  EXPECT_THAT(List(file + "hell"), StatusIs(kLost));
}

TEST(ZipArchiveTest, RefusesWhatItCannotRead) {
  EXPECT_THAT(ListStatus(testing::ZipBytes(kEntries, ZipOptions{true, true, 12})),
              StatusIs(kUnimplemented, HasSubstr("\"a/data.pkl\" is compressed (method 12)")));
  EXPECT_THAT(ListStatus(testing::ZipBytes(kEntries, ZipOptions{false, false, 93})),
              StatusIs(kUnimplemented, HasSubstr("method 93")));
}

TEST(ZipArchiveTest, RefusesDirectoriesThatLie) {
  const struct {
    const char* name;
    bool zip64;
    std::function<void(std::string*)> change;
    absl::StatusCode code;
    const char* message;
  } kCases[] = {
      {"no end", false, [](std::string* f) { Set(f, f->size() - kEnd, 0, 4); }, kLost, "cut short"},
      {"a comment longer than the file", false, [](std::string* f) { Set(f, f->size() - 2, 9, 2); }, kLost,
       "cut short"},
      {"directory beyond the file", false, [](std::string* f) { Set(f, f->size() - 6, 0x7fffffff, 4); }, kLost,
       "does not fit"},
      {"directory larger than the file", false, [](std::string* f) { Set(f, f->size() - 10, 0x7fffffff, 4); }, kLost,
       "does not fit"},
      {"directory at another place", false, [](std::string* f) { Set(f, f->size() - 6, 0, 4); }, kInvalid, "broken"},
      {"fewer members than there are", false, [](std::string* f) { Set(f, f->size() - 14, 0x00020002, 4); }, kInvalid,
       "more than its members"},
      {"more members than there are", false, [](std::string* f) { Set(f, f->size() - 14, 0x00040004, 4); }, kInvalid,
       "cannot hold 4 members"},
      {"more members than fit", false, [](std::string* f) { Set(f, f->size() - 14, 0x7fff7fff, 4); }, kInvalid,
       "cannot hold 32767"},
      {"members on several disks", false, [](std::string* f) { Set(f, f->size() - 14, 2, 2); }, kUnimplemented,
       "several disks"},
      {"another disk", false, [](std::string* f) { Set(f, f->size() - 18, 1, 2); }, kUnimplemented, "several disks"},
      {"ends that disagree", true, [](std::string* f) { Set(f, f->size() - 10, 7, 4); }, kInvalid, "disagree"},
      {"a locator that points nowhere", true,
       [](std::string* f) { Set(f, f->size() - kEnd - kLocator + 8, ~uint64_t{0}, 8); }, kInvalid, "no ZIP64 end"},
      {"a locator that points elsewhere", true, [](std::string* f) { Set(f, f->size() - kEnd - kLocator + 8, 0, 8); },
       kInvalid, "no ZIP64 end"},
      {"a locator of several disks", true, [](std::string* f) { Set(f, f->size() - kEnd - 4, 2, 4); }, kUnimplemented,
       "several disks"},
      {"2^64 - 1 members", true,
       [](std::string* f) {
         Set(f, f->size() - kEnd - kLocator - kZip64End + 24, ~uint64_t{0}, 8);
         Set(f, f->size() - kEnd - kLocator - kZip64End + 32, ~uint64_t{0}, 8);
       },
       kInvalid, "above the limit"},
      {"a directory of 2^64 - 1 bytes", true,
       [](std::string* f) { Set(f, f->size() - kEnd - kLocator - 16, ~uint64_t{0}, 8); }, kLost, "does not fit"},
      {"a directory at 2^64 - 1", true,
       [](std::string* f) { Set(f, f->size() - kEnd - kLocator - 8, ~uint64_t{0}, 8); }, kLost, "does not fit"},
      {"an encrypted member", false, [](std::string* f) { Set(f, CentralHeader(*f, 1) + 8, 1, 2); }, kUnimplemented,
       "\"a/data/0\" is encrypted"},
      {"a compressed member", false, [](std::string* f) { Set(f, CentralHeader(*f, 1) + 10, 9, 2); }, kUnimplemented,
       "\"a/data/0\" is compressed"},
      {"two sizes for one member", false, [](std::string* f) { Set(f, CentralHeader(*f, 1) + 20, 99, 4); }, kInvalid,
       "in 99 bytes for 100"},
      {"a member larger than the file", false,
       [](std::string* f) {
         Set(f, CentralHeader(*f, 1) + 20, 9999, 4);
         Set(f, CentralHeader(*f, 1) + 24, 9999, 4);
       },
       kLost, "beyond the payloads' end"},
      {"a member that runs into the next", false,
       [](std::string* f) {
         Set(f, CentralHeader(*f, 0) + 20, 60, 4);
         Set(f, CentralHeader(*f, 0) + 24, 60, 4);
       },
       kInvalid, "overlap"},
      {"a header beyond the file", false, [](std::string* f) { Set(f, CentralHeader(*f, 1) + 42, 0x7fffffff, 4); },
       kInvalid, "no local header"},
      {"a header at another member", false, [](std::string* f) { Set(f, CentralHeader(*f, 1) + 42, 0, 4); }, kInvalid,
       "another name"},
      {"a header in the data", false, [](std::string* f) { Set(f, CentralHeader(*f, 1) + 42, 50, 4); }, kInvalid,
       "no local header"},
      {"a name of 65535 bytes", false, [](std::string* f) { Set(f, CentralHeader(*f, 1) + 28, 65535, 2); }, kInvalid,
       "broken"},
      {"an extra field beyond the directory", false,
       [](std::string* f) { Set(f, CentralHeader(*f, 2) + 30, 65535, 2); }, kInvalid, "broken"},
      {"a local name beyond the file", false, [](std::string* f) { Set(f, 26, 65535, 2); }, kInvalid,
       "no local header"},
      {"a local extra field beyond the file", false, [](std::string* f) { Set(f, 28, 65535, 2); }, kInvalid,
       "no local header"},
      {"64-bit sizes promised, not given", false,
       [](std::string* f) { Set(f, CentralHeader(*f, 1) + 24, 0xffffffff, 4); }, kInvalid, "lacks the ZIP64 field"},
      {"64-bit sizes cut short", true, [](std::string* f) { Set(f, CentralHeader(*f, 1) + 46 + 8 + 2, 8, 2); },
       kInvalid, "lacks the ZIP64 field"},
      {"a 64-bit size near 2^64", true,
       [](std::string* f) {
         Set(f, CentralHeader(*f, 1) + 46 + 8 + 4, ~uint64_t{0} - 7, 8);
         Set(f, CentralHeader(*f, 1) + 46 + 8 + 12, ~uint64_t{0} - 7, 8);
       },
       kLost, "beyond the payloads' end"},
      {"a 64-bit header near 2^64", true,
       [](std::string* f) { Set(f, CentralHeader(*f, 1) + 46 + 8 + 20, ~uint64_t{0} - 7, 8); }, kInvalid,
       "no local header"},
  };
  for (const auto& test : kCases) {
    SCOPED_TRACE(test.name);
    std::string file = testing::ZipBytes(kEntries, ZipOptions{test.zip64, true});
    ASSERT_OK(ListStatus(file));
    test.change(&file);
    EXPECT_THAT(ListStatus(file), StatusIs(test.code, HasSubstr(test.message)));
  }
}

TEST(ZipArchiveTest, EveryTruncationIsAnError) {
  const std::string file = testing::ZipBytes(kEntries);
  for (size_t size = 0; size < file.size(); ++size) {
    EXPECT_THAT(ListStatus(file.substr(0, size)), StatusIs(kLost)) << size << " bytes";
  }
}

TEST(ZipArchiveTest, EveryBitFlipIsRefusedOrReadsWithinTheFile) {
  for (bool zip64 : {false, true}) {
    const std::string file = testing::ZipBytes(kEntries, ZipOptions{zip64, true});
    for (size_t bit = 0; bit < file.size() * 8; ++bit) {
      std::string flipped = file;
      flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << (bit % 8)));
      (void)List(flipped);  // Its expectations are the test.
      ASSERT_FALSE(HasFailure()) << "bit " << bit;
    }
  }
}

}  // namespace
}  // namespace rwkv::checkpoint
