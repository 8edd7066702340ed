#include "services/state_store/records/rocksdb/blob_files.h"

#include <cstdint>
#include <cstring>

#include "absl/types/span.h"
#include "kernels/base/status_macros.h"
#include "services/state_store/client/crc32c.h"
#include "services/state_store/rocksdb/rocksdb_status.h"

namespace rwkv::state_store {
namespace {

// RocksDB 7.8, db/blob/blob_log_format.h: a file has a header, then blobs, each after its own: lengths of key and
// value, expiration, checksum of those 24 bytes, checksum of key and value. Numbers are little-endian.
constexpr size_t kFileHeader = 30;
constexpr size_t kCompression = 13;  // The byte of the file's header that says how values are compressed; 0: not.
constexpr size_t kBlobHeader = 32;

template <typename T>
T At(absl::string_view bytes, size_t offset) {
  T number;
  std::memcpy(&number, bytes.data() + offset, sizeof(number));
  return number;
}

// As RocksDB stores it (util/crc32c.h, Mask).
uint32_t MaskedCrc(absl::string_view bytes) {
  const uint32_t crc = Crc32c(absl::MakeConstSpan(bytes.data(), bytes.size()));
  return (crc >> 15 | crc << 17) + 0xa282ead8u;
}

}  // namespace

absl::Status ForEachBlob(rocksdb::Env& env, const std::string& path,
                         absl::FunctionRef<absl::Status(absl::string_view key, absl::string_view value)> visit) {
  std::string content;
  RWKV_RETURN_IF_ERROR(FromRocksdbStatus(rocksdb::ReadFileToString(&env, path, &content), path));
  absl::string_view rest(content);
  if (rest.size() < kFileHeader || rest[kCompression] != 0) return absl::OkStatus();
  rest.remove_prefix(kFileHeader);
  while (rest.size() >= kBlobHeader) {
    const auto key_bytes = At<uint64_t>(rest, 0), value_bytes = At<uint64_t>(rest, 8);
    const size_t room = rest.size() - kBlobHeader;
    const bool is_blob =
        At<uint32_t>(rest, 24) == MaskedCrc(rest.substr(0, 24)) && key_bytes <= room && value_bytes <= room - key_bytes;
    if (!is_blob) {
      rest.remove_prefix(1);
      continue;
    }
    const absl::string_view blob = rest.substr(kBlobHeader, key_bytes + value_bytes);
    if (At<uint32_t>(rest, 28) == MaskedCrc(blob)) {
      RWKV_RETURN_IF_ERROR(visit(blob.substr(0, key_bytes), blob.substr(key_bytes)));
    }
    rest.remove_prefix(kBlobHeader + blob.size());
  }
  return absl::OkStatus();
}

}  // namespace rwkv::state_store
