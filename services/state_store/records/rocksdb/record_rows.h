// The rows of a record in the embedded store's database, see rocksdb_record_store.h.
#pragma once

#include <cstdint>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "rwkv/v1/state_store.pb.h"
#include "services/state_store/rows/numbers.h"

namespace rwkv::state_store {

// Of all records of a snapshot. Ids hold no zero byte, so no snapshot's records lie among another's.
inline std::string RecordPrefix(absl::string_view snapshot_id) {
  return absl::StrCat(snapshot_id, absl::string_view("\0", 1));
}

inline std::string RecordKey(absl::string_view snapshot_id, uint64_t layer) {
  std::string key = RecordPrefix(snapshot_id);
  AppendNumber(key, layer);
  return key;
}
inline std::string RecordKey(const v1::RecordInfo& info) {
  return RecordKey(info.snapshot_id(), static_cast<uint64_t>(info.layer()));
}

// nullopt: it is not the key of a record.
inline absl::optional<std::string> SnapshotOfRecord(absl::string_view key) {
  const size_t end = key.find('\0');
  if (end == 0 || end == absl::string_view::npos || key.size() != end + 9) return absl::nullopt;
  return std::string(key.substr(0, end));
}

// A row of kRecordInfos: three numbers, or four.
struct RecordInfoRow {
  uint64_t bytes = 0;
  uint64_t crc32c = 0;
  absl::Time put_time;
  absl::optional<uint64_t> offset;  // In the snapshot's file; unset: the bytes are in kRecords.

  std::string Encode() const {
    std::string row;
    AppendNumber(row, bytes);
    AppendNumber(row, crc32c);
    AppendNumber(row, static_cast<uint64_t>(absl::ToUnixNanos(put_time)));
    if (offset.has_value()) AppendNumber(row, *offset);
    return row;
  }

  static absl::optional<RecordInfoRow> Decode(absl::string_view row) {
    if (row.size() != 24 && row.size() != 32) return absl::nullopt;
    RecordInfoRow info{NumberAt(row, 0), NumberAt(row, 8), absl::FromUnixNanos(static_cast<int64_t>(NumberAt(row, 16))),
                       absl::nullopt};
    if (row.size() == 32) info.offset = NumberAt(row, 24);
    return info;
  }

  bool Is(const v1::RecordInfo& info) const { return bytes == info.bytes() && crc32c == info.crc32c(); }
};

}  // namespace rwkv::state_store
