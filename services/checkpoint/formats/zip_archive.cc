#include "services/checkpoint/formats/zip_archive.h"

#include <algorithm>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/formats/byte_reader.h"
#include "services/checkpoint/formats/tensor_record.h"

namespace rwkv::checkpoint {
namespace {

// Section numbers are the APPNOTE's.
constexpr uint32_t kLocalHeader = 0x04034b50;          // 4.3.7
constexpr uint32_t kCentralHeader = 0x02014b50;        // 4.3.12
constexpr uint32_t kEndOfDirectory = 0x06054b50;       // 4.3.16
constexpr uint32_t kZip64EndOfDirectory = 0x06064b50;  // 4.3.14
constexpr uint32_t kZip64EndLocator = 0x07064b50;      // 4.3.15
constexpr uint64_t kEndOfDirectoryBytes = 22;          // Without the comment.
constexpr uint64_t kZip64EndLocatorBytes = 20;
constexpr uint64_t kCentralHeaderBytes = 46;  // Without name, extra field and comment.
constexpr uint16_t kZip64ExtraField = 1;      // 4.5.3
constexpr uint16_t kEncryptedFlag = 1;
constexpr uint16_t kStored = 0;  // 4.4.5
constexpr uint16_t kDeflated = 8;
constexpr uint32_t kIn64Bits32 = 0xffffffff;  // "The real value is in the ZIP64 record."
constexpr uint16_t kIn64Bits16 = 0xffff;
// Each tensor's payload and a few small files.
constexpr uint64_t kMaxMembers = kMaxTensors + 64;
constexpr uint16_t kMaxNameBytes = 1024;

struct Directory {
  uint64_t entries = 0;
  uint64_t size = 0;
  uint64_t offset = 0;
};

absl::Status Bad(absl::string_view what) { return absl::InvalidArgumentError(absl::StrCat("zip archive: ", what)); }

// The record at the very end: its comment must reach exactly to the end of the file.
absl::StatusOr<uint64_t> FindEndOfDirectory(absl::Span<const uint8_t> file) {
  if (file.size() >= kEndOfDirectoryBytes) {
    const uint64_t last = file.size() - kEndOfDirectoryBytes;
    const uint64_t first = last - std::min<uint64_t>(last, 0xffff);
    for (uint64_t at = last + 1; at-- > first;) {
      ByteReader reader(file, at);
      uint32_t signature = 0;
      uint16_t comment_bytes = 0;
      reader.U32(&signature);
      reader.Skip(kEndOfDirectoryBytes - 6);
      reader.U16(&comment_bytes);
      if (signature == kEndOfDirectory && comment_bytes == reader.remaining()) return at;
    }
  }
  return absl::DataLossError("zip archive: no central directory at its end; the file is cut short");
}

absl::StatusOr<Directory> ReadEnd(absl::Span<const uint8_t> file) {
  RWKV_ASSIGN_OR_RETURN(uint64_t end, FindEndOfDirectory(file));
  ByteReader reader(file, end + 4);
  uint16_t disk = 0, directory_disk = 0, entries_here = 0, entries = 0;
  uint32_t size = 0, offset = 0;
  reader.U16(&disk);
  reader.U16(&directory_disk);
  reader.U16(&entries_here);
  reader.U16(&entries);
  reader.U32(&size);
  reader.U32(&offset);
  Directory directory{entries, size, offset};

  ByteReader locator(file, end < kZip64EndLocatorBytes ? file.size() : end - kZip64EndLocatorBytes);
  uint32_t signature = 0;
  if (locator.U32(&signature) && signature == kZip64EndLocator) {
    uint32_t record_disk = 0, disks = 0;
    uint64_t record_offset = 0;
    locator.U32(&record_disk);
    locator.U64(&record_offset);
    locator.U32(&disks);
    if (record_disk != 0 || disks > 1) return absl::UnimplementedError("zip archive: spans several disks");

    ByteReader record(file, record_offset);
    uint64_t record_bytes = 0, entries_here64 = 0;
    uint16_t made_by = 0, needs = 0;
    uint32_t disk64 = 0, directory_disk64 = 0;
    Directory wide;
    if (!record.U32(&signature) || signature != kZip64EndOfDirectory || !record.U64(&record_bytes) ||
        !record.U16(&made_by) || !record.U16(&needs) || !record.U32(&disk64) || !record.U32(&directory_disk64) ||
        !record.U64(&entries_here64) || !record.U64(&wide.entries) || !record.U64(&wide.size) ||
        !record.U64(&wide.offset)) {
      return Bad(absl::StrCat("no ZIP64 end of central directory at byte ", record_offset));
    }
    if (disk64 != 0 || directory_disk64 != 0 || entries_here64 != wide.entries) {
      return absl::UnimplementedError("zip archive: spans several disks");
    }
    if ((entries != kIn64Bits16 && entries != wide.entries) || (size != kIn64Bits32 && size != wide.size) ||
        (offset != kIn64Bits32 && offset != wide.offset)) {
      return Bad("its two ends of central directory disagree");
    }
    directory = wide;
    end = std::min(end, record_offset);
  } else if (disk != 0 || directory_disk != 0 || entries_here != entries) {
    return absl::UnimplementedError("zip archive: spans several disks");
  }

  if (directory.offset > end || directory.size > end - directory.offset) {
    return absl::DataLossError(absl::StrCat("zip archive: central directory of ", directory.size, " bytes at byte ",
                                            directory.offset, " does not fit before its end at ", end));
  }
  if (directory.entries > kMaxMembers) {
    return Bad(absl::StrCat(directory.entries, " members, above the limit of ", kMaxMembers));
  }
  if (directory.entries > directory.size / kCentralHeaderBytes) {
    return Bad(
        absl::StrCat("a central directory of ", directory.size, " bytes cannot hold ", directory.entries, " members"));
  }
  return directory;
}

// A member as the central directory gives it.
struct Entry {
  ZipMember member;
  uint64_t header = 0;  // Offset of the local header.
};

absl::Status ReadZip64Field(absl::Span<const uint8_t> extra, bool wants_size, bool wants_stored, bool wants_header,
                            uint64_t* size, uint64_t* stored, uint64_t* header) {
  ByteReader fields(extra);
  uint16_t id = 0, length = 0;
  absl::Span<const uint8_t> body;
  while (fields.U16(&id) && fields.U16(&length) && fields.Bytes(length, &body)) {
    if (id != kZip64ExtraField) continue;
    ByteReader field(body);
    if ((!wants_size || field.U64(size)) && (!wants_stored || field.U64(stored)) &&
        (!wants_header || field.U64(header))) {
      return absl::OkStatus();
    }
    break;
  }
  return Bad("a member lacks the ZIP64 field that its sizes refer to");
}

absl::StatusOr<Entry> ReadCentralHeader(ByteReader* reader) {
  uint32_t signature = 0, time_and_date = 0, checksum = 0, stored32 = 0, size32 = 0, external = 0, header32 = 0;
  uint16_t made_by = 0, needs = 0, flags = 0, method = 0, name_bytes = 0, extra_bytes = 0, comment_bytes = 0, disk = 0,
           internal = 0;
  absl::Span<const uint8_t> name;
  absl::Span<const uint8_t> extra;
  const bool fits =
      reader->U32(&signature) && reader->U16(&made_by) && reader->U16(&needs) && reader->U16(&flags) &&
      reader->U16(&method) && reader->U32(&time_and_date) && reader->U32(&checksum) && reader->U32(&stored32) &&
      reader->U32(&size32) && reader->U16(&name_bytes) && reader->U16(&extra_bytes) && reader->U16(&comment_bytes) &&
      reader->U16(&disk) && reader->U16(&internal) && reader->U32(&external) && reader->U32(&header32) &&
      reader->Bytes(name_bytes, &name) && reader->Bytes(extra_bytes, &extra) && reader->Skip(comment_bytes);
  if (!fits || signature != kCentralHeader) return Bad("its central directory is broken");
  if (name_bytes > kMaxNameBytes) return Bad(absl::StrCat("a member's name has ", name_bytes, " bytes"));

  Entry entry;
  entry.member.name = absl::string_view(reinterpret_cast<const char*>(name.data()), name.size());
  const std::string what = absl::StrCat("zip archive: member ", Quoted(entry.member.name));
  if ((flags & kEncryptedFlag) != 0) return absl::UnimplementedError(absl::StrCat(what, " is encrypted"));
  if (method != kStored && method != kDeflated) {
    return absl::UnimplementedError(absl::StrCat(what, " is compressed (method ", method, "); save it uncompressed"));
  }
  entry.member.is_deflated = method == kDeflated;
  if (disk != 0 && disk != kIn64Bits16) return absl::UnimplementedError(absl::StrCat(what, " is on another disk"));

  uint64_t stored = stored32;
  entry.member.size = size32;
  entry.header = header32;
  if (size32 == kIn64Bits32 || stored32 == kIn64Bits32 || header32 == kIn64Bits32) {
    RWKV_RETURN_IF_ERROR(ReadZip64Field(extra, size32 == kIn64Bits32, stored32 == kIn64Bits32, header32 == kIn64Bits32,
                                        &entry.member.size, &stored, &entry.header));
  }
  entry.member.stored_size = stored;
  if (!entry.member.is_deflated && stored != entry.member.size) {
    return absl::InvalidArgumentError(
        absl::StrCat(what, " is stored as it is, yet in ", stored, " bytes for ", entry.member.size));
  }
  return entry;
}

// Finds the payload behind the local header. `limit`: where the central directory begins.
absl::Status LocatePayload(absl::Span<const uint8_t> file, uint64_t limit, Entry* entry) {
  const std::string what = absl::StrCat("zip archive: member ", Quoted(entry->member.name));
  ByteReader reader(file.subspan(0, limit), entry->header);
  uint32_t signature = 0;
  uint16_t name_bytes = 0, extra_bytes = 0;
  absl::Span<const uint8_t> name;
  if (entry->header > limit || !reader.U32(&signature) || signature != kLocalHeader || !reader.Skip(22) ||
      !reader.U16(&name_bytes) || !reader.U16(&extra_bytes) || !reader.Bytes(name_bytes, &name) ||
      !reader.Skip(extra_bytes)) {
    return absl::InvalidArgumentError(absl::StrCat(what, " has no local header at byte ", entry->header));
  }
  if (absl::string_view(reinterpret_cast<const char*>(name.data()), name.size()) != entry->member.name) {
    return absl::InvalidArgumentError(absl::StrCat(what, " has another name in its local header"));
  }
  if (entry->member.stored_size > reader.remaining()) {
    return absl::DataLossError(absl::StrCat(what, " of ", entry->member.stored_size, " bytes at byte ",
                                            reader.position(), " reaches beyond the payloads' end at ", limit));
  }
  entry->member.offset = reader.position();
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::vector<ZipMember>> ReadZipDirectory(absl::Span<const uint8_t> file, DoneWith done) {
  RWKV_ASSIGN_OR_RETURN(const Directory directory, ReadEnd(file));
  ByteReader reader(file.subspan(0, directory.offset + directory.size), directory.offset);
  std::vector<Entry> entries;
  entries.reserve(directory.entries);
  for (uint64_t i = 0; i < directory.entries; ++i) {
    RWKV_ASSIGN_OR_RETURN(Entry entry, ReadCentralHeader(&reader));
    RWKV_RETURN_IF_ERROR(LocatePayload(file, directory.offset, &entry));
    done(entry.header, entry.member.offset - entry.header);
    entries.push_back(entry);
  }
  if (reader.remaining() != 0) return Bad("its central directory holds more than its members");

  std::vector<ZipMember> members;
  members.reserve(entries.size());
  for (const Entry& entry : entries) members.push_back(entry.member);

  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.header < b.header; });
  for (size_t i = 1; i < entries.size(); ++i) {
    const ZipMember& before = entries[i - 1].member;
    if (entries[i].header < before.offset + before.stored_size) {
      return Bad(absl::StrCat("members ", Quoted(before.name), " and ", Quoted(entries[i].member.name), " overlap"));
    }
  }
  return members;
}

}  // namespace rwkv::checkpoint
