#include "services/checkpoint/formats/inflated_zip.h"

#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>
#include <zlib.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "absl/cleanup/cleanup.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/formats/tensor_record.h"
#include "services/checkpoint/formats/torch_file.h"
#include "services/checkpoint/formats/zip_archive.h"

namespace rwkv::checkpoint {
namespace {

constexpr uint16_t kStored = 0;
constexpr size_t kPieceBytes = 1 << 20;
constexpr uint64_t kAlignment = 64;  // Of payloads, as torch.save gives them.

// Little-endian, appended.
template <typename T>
void Put(T value, std::string* out) {
  for (size_t i = 0; i < sizeof(T); ++i) out->push_back(static_cast<char>(static_cast<uint64_t>(value) >> (8 * i)));
}

// An archive being written, with ZIP64 records throughout. Format: PKWARE APPNOTE 6.3.
class StoredZip {
 public:
  explicit StoredZip(int descriptor) : descriptor_(descriptor) {}

  uint64_t position() const { return position_; }

  absl::Status Write(absl::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t count = write(descriptor_, bytes.data(), bytes.size());
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) {
        return absl::ResourceExhaustedError(
            absl::StrCat("no memory to unpack it: ", absl::ErrnoToStatus(errno, "").message()));
      }
      position_ += static_cast<uint64_t>(count);
      bytes.remove_prefix(static_cast<size_t>(count));
    }
    return absl::OkStatus();
  }

  // Of a member whose payload is written next.
  absl::Status Begin(absl::string_view name, uint64_t size) {
    const uint64_t header = position_;
    const uint64_t padding = (kAlignment - (header + 30 + name.size() + 4) % kAlignment) % kAlignment;
    std::string local;
    Put<uint32_t>(0x04034b50, &local);
    Put<uint16_t>(45, &local);
    local.append(20, '\0');  // Flags, method, time, checksum and sizes, which the directory has.
    Put<uint16_t>(static_cast<uint16_t>(name.size()), &local);
    Put<uint16_t>(static_cast<uint16_t>(4 + padding), &local);
    absl::StrAppend(&local, name);
    Put<uint16_t>(0x4246, &local);  // "FB", torch's padding.
    Put<uint16_t>(static_cast<uint16_t>(padding), &local);
    local.append(padding, '\0');

    Put<uint32_t>(0x02014b50, &directory_);
    Put<uint16_t>(45, &directory_);
    Put<uint16_t>(45, &directory_);
    directory_.append(2, '\0');  // Flags
    Put<uint16_t>(kStored, &directory_);
    directory_.append(8, '\0');  // Time, checksum: nobody looks at them.
    Put<uint32_t>(0xffffffff, &directory_);
    Put<uint32_t>(0xffffffff, &directory_);
    Put<uint16_t>(static_cast<uint16_t>(name.size()), &directory_);
    Put<uint16_t>(4 + 24, &directory_);
    directory_.append(10, '\0');  // Comment, disk, attributes
    Put<uint32_t>(0xffffffff, &directory_);
    absl::StrAppend(&directory_, name);
    Put<uint16_t>(1, &directory_);
    Put<uint16_t>(24, &directory_);
    Put<uint64_t>(size, &directory_);
    Put<uint64_t>(size, &directory_);
    Put<uint64_t>(header, &directory_);
    ++members_;
    return Write(local);
  }

  absl::Status End() {
    const uint64_t directory = position_;
    const uint64_t end = directory + directory_.size();
    std::string records = std::move(directory_);
    Put<uint32_t>(0x06064b50, &records);
    Put<uint64_t>(44, &records);
    Put<uint16_t>(45, &records);
    Put<uint16_t>(45, &records);
    records.append(8, '\0');  // Disks
    Put<uint64_t>(members_, &records);
    Put<uint64_t>(members_, &records);
    Put<uint64_t>(end - directory, &records);
    Put<uint64_t>(directory, &records);
    Put<uint32_t>(0x07064b50, &records);
    Put<uint32_t>(0, &records);
    Put<uint64_t>(end, &records);
    Put<uint32_t>(1, &records);
    Put<uint32_t>(0x06054b50, &records);
    records.append(4, '\0');
    Put<uint16_t>(0xffff, &records);
    Put<uint16_t>(0xffff, &records);
    Put<uint32_t>(0xffffffff, &records);
    Put<uint32_t>(0xffffffff, &records);
    Put<uint16_t>(0, &records);
    return Write(records);
  }

 private:
  const int descriptor_;
  uint64_t position_ = 0;
  uint64_t members_ = 0;
  std::string directory_;
};

absl::Status Inflate(absl::Span<const uint8_t> packed, const ZipMember& member, StoredZip* out) {
  z_stream stream = {};
  if (inflateInit2(&stream, -MAX_WBITS) != Z_OK) return absl::ResourceExhaustedError("no memory to unpack it");
  const auto end = absl::MakeCleanup([&stream] { inflateEnd(&stream); });
  std::vector<uint8_t> piece(kPieceBytes);
  uint64_t done = 0;
  int result = Z_OK;
  while (result == Z_OK) {
    if (stream.avail_in == 0) {
      const absl::Span<const uint8_t> next = packed.subspan(0, kPieceBytes);
      stream.next_in = const_cast<uint8_t*>(next.data());
      stream.avail_in = static_cast<unsigned>(next.size());
      packed.remove_prefix(next.size());
    }
    stream.next_out = piece.data();
    stream.avail_out = static_cast<unsigned>(piece.size());
    result = inflate(&stream, Z_NO_FLUSH);
    const size_t count = piece.size() - stream.avail_out;
    if ((result != Z_OK && result != Z_STREAM_END) || count > member.size - done) break;
    RWKV_RETURN_IF_ERROR(out->Write({reinterpret_cast<const char*>(piece.data()), count}));
    done += count;
  }
  if (result == Z_STREAM_END && done == member.size && stream.avail_in == 0 && packed.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("zip archive: member ", Quoted(member.name),
                                                 " does not inflate to the ", member.size, " bytes it should have"));
}

}  // namespace

absl::StatusOr<std::unique_ptr<MappedFile>> InflateZip(std::unique_ptr<MappedFile> file) {
  const absl::Span<const uint8_t> bytes = file->bytes();
  if (!LooksLikeTorchZip(bytes)) return file;
  ForgetBehind forget(*file);
  RWKV_ASSIGN_OR_RETURN(const std::vector<ZipMember> members,
                        ReadZipDirectory(bytes, [&forget](uint64_t offset, uint64_t size) { forget(offset, size); }));
  file->Forget(0, static_cast<int64_t>(bytes.size()));
  if (std::all_of(members.begin(), members.end(), [](const ZipMember& member) { return !member.is_deflated; })) {
    return file;
  }
  uint64_t total = 0;
  const uint64_t limit = bytes.size() * kMaxInflation + kInflationSlackBytes;
  for (const ZipMember& member : members) {
    if (__builtin_add_overflow(total, member.size, &total) || total > limit) {
      return absl::InvalidArgumentError(absl::StrCat("zip archive: its members would be more than ", limit,
                                                     " bytes when unpacked, the file has ", bytes.size()));
    }
  }
  const int descriptor = memfd_create("unpacked checkpoint", MFD_CLOEXEC);
  if (descriptor < 0) return absl::ErrnoToStatus(errno, "memory to unpack the archive");
  auto close_it = absl::MakeCleanup([descriptor] { close(descriptor); });
  StoredZip stored(descriptor);
  for (const ZipMember& member : members) {
    RWKV_RETURN_IF_ERROR(stored.Begin(member.name, member.size));
    const absl::Span<const uint8_t> payload = bytes.subspan(member.offset, member.stored_size);
    if (member.is_deflated) {
      RWKV_RETURN_IF_ERROR(Inflate(payload, member, &stored));
    } else {
      RWKV_RETURN_IF_ERROR(stored.Write({reinterpret_cast<const char*>(payload.data()), payload.size()}));
    }
    file->Forget(static_cast<int64_t>(member.offset), static_cast<int64_t>(member.stored_size));
  }
  RWKV_RETURN_IF_ERROR(stored.End());
  std::move(close_it).Cancel();
  return MappedFile::OfDescriptor(descriptor, "the unpacked archive");
}

}  // namespace rwkv::checkpoint
