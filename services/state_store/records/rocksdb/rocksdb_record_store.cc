#include "services/state_store/records/rocksdb/rocksdb_record_store.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/types/optional.h"
#include "kernels/base/status_macros.h"
#include "rocksdb/iterator.h"
#include "rocksdb/slice.h"
#include "rocksdb/write_batch.h"
#include "services/common/logging.h"
#include "services/state_store/client/crc32c.h"
#include "services/state_store/rocksdb/rocksdb_status.h"
#include "services/state_store/rows/numbers.h"

namespace rwkv::state_store {
namespace {

// A row of kRecordInfos: three numbers, or four.
struct InfoRow {
  uint64_t bytes = 0;
  uint64_t crc32c = 0;
  absl::Time put_time;
  absl::optional<uint64_t> offset;  // In the snapshot's file; unset: the bytes are in kRecords.
};

std::string EncodeRow(const InfoRow& row) {
  std::string bytes;
  AppendNumber(bytes, row.bytes);
  AppendNumber(bytes, row.crc32c);
  AppendNumber(bytes, static_cast<uint64_t>(absl::ToUnixNanos(row.put_time)));
  if (row.offset.has_value()) AppendNumber(bytes, *row.offset);
  return bytes;
}

absl::optional<InfoRow> DecodeRow(absl::string_view bytes) {
  if (bytes.size() != 24 && bytes.size() != 32) return absl::nullopt;
  InfoRow row{NumberAt(bytes, 0), NumberAt(bytes, 8), absl::FromUnixNanos(static_cast<int64_t>(NumberAt(bytes, 16))),
              absl::nullopt};
  if (bytes.size() == 32) row.offset = NumberAt(bytes, 24);
  return row;
}

// Ids hold no zero byte, so no snapshot's records lie among another's.
std::string Prefix(absl::string_view snapshot_id) {
  std::string prefix(snapshot_id);
  prefix.push_back('\0');
  return prefix;
}

std::string Key(const v1::RecordInfo& info) {
  std::string key = Prefix(info.snapshot_id());
  AppendNumber(key, static_cast<uint64_t>(info.layer()));
  return key;
}

std::string Name(const v1::RecordInfo& info) { return absl::StrCat("record ", info.snapshot_id(), "/", info.layer()); }

std::string Describe(uint64_t bytes, uint64_t crc32c) {
  return absl::StrCat(bytes, " bytes with CRC32C ", absl::Hex(crc32c, absl::kZeroPad8));
}

absl::StatusOr<absl::optional<InfoRow>> ReadInfo(const Database::Access& access, const v1::RecordInfo& info) {
  std::string value;
  const rocksdb::Status status =
      access.db().Get(rocksdb::ReadOptions(), access.family(Family::kRecordInfos), Key(info), &value);
  if (status.IsNotFound()) return absl::optional<InfoRow>();
  RWKV_RETURN_IF_ERROR(FromRocksdbStatus(status, Name(info)));
  const absl::optional<InfoRow> row = DecodeRow(value);
  if (!row.has_value()) return absl::DataLossError(absl::StrCat(Name(info), ": its info is corrupt"));
  return row;
}

bool Matches(const InfoRow& row, const v1::RecordInfo& info) {
  return row.bytes == info.bytes() && row.crc32c == info.crc32c();
}

}  // namespace

RocksdbRecordStore::RocksdbRecordStore(Database* database, common::Clock* clock, common::Metrics* metrics)
    : database_(database),
      clock_(clock),
      bytes_gauge_(metrics->Gauge("rwkv_state_store_records_bytes", "Bytes of all state records.")),
      written_bytes_total_(metrics->Counter("rwkv_state_store_records_written_bytes_total", "Record bytes stored.")),
      read_bytes_total_(metrics->Counter("rwkv_state_store_records_read_bytes_total", "Record bytes served.")),
      corrupt_total_(metrics->Counter("rwkv_state_store_corrupt_records_total",
                                      "Records that could not be served because their bytes had changed.")) {}

absl::StatusOr<std::unique_ptr<RocksdbRecordStore>> RocksdbRecordStore::Create(Database* database, common::Clock* clock,
                                                                               common::Metrics* metrics) {
  std::unique_ptr<RocksdbRecordStore> store(new RocksdbRecordStore(database, clock, metrics));
  RWKV_ASSIGN_OR_RETURN(store->files_, RecordFiles::Open(database->env(), database->data_dir() + "/files"));
  RWKV_ASSIGN_OR_RETURN(const std::vector<std::string> with_files, store->files_->List());
  // What a crash left of records that never were put, or that were deleted.
  std::set<std::string> unknown(with_files.begin(), with_files.end());
  int64_t bytes = 0;
  RWKV_RETURN_IF_ERROR(store->ForEach([&](const Stored& stored) {
    bytes += static_cast<int64_t>(stored.bytes);
    unknown.erase(stored.snapshot_id);
  }));
  store->CountBytes(bytes);
  for (const std::string& snapshot_id : unknown) RWKV_RETURN_IF_ERROR(store->files_->Delete(snapshot_id));
  return store;
}

void RocksdbRecordStore::CountBytes(int64_t delta) {
  bytes_gauge_.Set(static_cast<double>(bytes_.fetch_add(delta, std::memory_order_relaxed) + delta));
}

absl::Status RocksdbRecordStore::Corrupt(const v1::RecordInfo& info, const std::string& what) {
  corrupt_total_.Increment();
  common::LogError("record_corrupt",
                   {{"snapshot", info.snapshot_id()}, {"layer", static_cast<int>(info.layer())}, {"reason", what}});
  return absl::DataLossError(absl::StrCat(Name(info), ": ", what));
}

absl::Status RocksdbRecordStore::Put(const v1::RecordInfo& info, absl::Span<const char> data) {
  const uint32_t crc32c = Crc32c(data);
  if (data.size() != info.bytes() || crc32c != info.crc32c()) {
    return absl::DataLossError(absl::StrCat(Name(info), ": ", Describe(data.size(), crc32c), " came, its info says ",
                                            Describe(info.bytes(), info.crc32c())));
  }
  RWKV_ASSIGN_OR_RETURN(const KeyLocks::Guard guard, snapshot_locks_.Lock({info.snapshot_id()}));
  RWKV_ASSIGN_OR_RETURN(Database::Access access, database_->Read());
  RWKV_ASSIGN_OR_RETURN(const absl::optional<InfoRow> existing, ReadInfo(access, info));
  if (existing.has_value()) {
    if (Matches(*existing, info)) return absl::OkStatus();
    return absl::AlreadyExistsError(
        absl::StrCat(Name(info), " exists already, ", Describe(existing->bytes, existing->crc32c)));
  }
  InfoRow row{info.bytes(), crc32c, clock_->Now(), absl::nullopt};
  rocksdb::WriteBatch batch;
  if (data.size() >= kFileBytes) {
    RWKV_ASSIGN_OR_RETURN(row.offset, files_->Append(info.snapshot_id(), data));
  } else {
    batch.Put(access.family(Family::kRecords), Key(info), rocksdb::Slice(data.data(), data.size()));
  }
  batch.Put(access.family(Family::kRecordInfos), Key(info), EncodeRow(row));
  RWKV_RETURN_IF_ERROR(database_->Write(std::move(access), batch, Durability::kBuffered));
  CountBytes(static_cast<int64_t>(data.size()));
  written_bytes_total_.Increment(static_cast<double>(data.size()));
  return absl::OkStatus();
}

absl::Status RocksdbRecordStore::Load(const v1::RecordInfo& info, absl::Span<char> to) {
  if (to.size() < info.bytes()) {
    return absl::DataLossError(absl::StrCat(Name(info), " has ", info.bytes(), " bytes, its place ", to.size()));
  }
  RWKV_ASSIGN_OR_RETURN(const Database::Access access, database_->Read());
  RWKV_ASSIGN_OR_RETURN(const absl::optional<InfoRow> row, ReadInfo(access, info));
  if (!row.has_value()) return absl::NotFoundError(absl::StrCat(Name(info), " does not exist"));
  if (!Matches(*row, info)) {
    return absl::DataLossError(absl::StrCat(Name(info), " is ", Describe(row->bytes, row->crc32c), ", not ",
                                            Describe(info.bytes(), info.crc32c())));
  }
  absl::Status lost;
  rocksdb::Status status;
  if (row->offset.has_value()) {
    lost = files_->Read(info.snapshot_id(), *row->offset, info.bytes(), to);
  } else {
    rocksdb::ReadOptions options;
    options.fill_cache = false;
    rocksdb::PinnableSlice data;
    status = access.db().Get(options, access.family(Family::kRecords), Key(info), &data);
    if (status.IsNotFound()) lost = absl::DataLossError("its bytes are gone");
    if (status.ok() && data.size() != info.bytes()) {
      lost = absl::DataLossError(absl::StrCat("stored are ", data.size(), " bytes, want ", info.bytes()));
    } else if (status.ok()) {
      std::memcpy(to.data(), data.data(), data.size());
    }
  }
  if (!lost.ok()) {
    // Deleted between the two reads, or lost.
    RWKV_ASSIGN_OR_RETURN(const absl::optional<InfoRow> again, ReadInfo(access, info));
    if (!again.has_value()) return absl::NotFoundError(absl::StrCat(Name(info), " does not exist"));
    return Corrupt(info, std::string(lost.message()));
  }
  // A file of records that is gone stays gone: waiting for it would not help.
  const bool gone =
      status.IsPathNotFound() || (status.IsIOError() && absl::StrContains(status.ToString(), "No such file"));
  if (status.IsCorruption() || gone) return Corrupt(info, status.ToString());
  return FromRocksdbStatus(status, Name(info));
}

absl::Status RocksdbRecordStore::Read(const v1::RecordInfo& info, absl::Span<char> to) {
  RWKV_RETURN_IF_ERROR(Load(info, to));
  to = to.first(info.bytes());
  if (const uint32_t crc32c = Crc32c(to); crc32c != info.crc32c()) {
    return Corrupt(info, absl::StrCat("stored are ", Describe(to.size(), crc32c), ", want ",
                                      Describe(info.bytes(), info.crc32c())));
  }
  read_bytes_total_.Increment(static_cast<double>(to.size()));
  return absl::OkStatus();
}

absl::Status RocksdbRecordStore::Check(const v1::RecordInfo& info) {
  RWKV_ASSIGN_OR_RETURN(const Database::Access access, database_->Read());
  RWKV_ASSIGN_OR_RETURN(const absl::optional<InfoRow> row, ReadInfo(access, info));
  if (!row.has_value()) return absl::DataLossError(absl::StrCat(Name(info), " does not exist"));
  if (!Matches(*row, info)) {
    return absl::DataLossError(absl::StrCat(Name(info), " is ", Describe(row->bytes, row->crc32c), ", not ",
                                            Describe(info.bytes(), info.crc32c())));
  }
  return absl::OkStatus();
}

absl::Status RocksdbRecordStore::MakeDurable() {
  RWKV_RETURN_IF_ERROR(files_->Sync());
  return database_->Sync();
}

absl::Status RocksdbRecordStore::Delete(const std::string& snapshot_id) {
  RWKV_ASSIGN_OR_RETURN(const KeyLocks::Guard guard, snapshot_locks_.Lock({snapshot_id}));
  RWKV_ASSIGN_OR_RETURN(Database::Access access, database_->Read());
  rocksdb::WriteBatch batch;
  int64_t bytes = 0;
  {
    const std::unique_ptr<rocksdb::Iterator> it(
        access.db().NewIterator(rocksdb::ReadOptions(), access.family(Family::kRecordInfos)));
    const std::string prefix = Prefix(snapshot_id);
    for (it->Seek(prefix); it->Valid() && it->key().starts_with(prefix); it->Next()) {
      batch.Delete(access.family(Family::kRecordInfos), it->key());
      batch.Delete(access.family(Family::kRecords), it->key());
      const absl::optional<InfoRow> row = DecodeRow(absl::string_view(it->value().data(), it->value().size()));
      if (row.has_value()) bytes += static_cast<int64_t>(row->bytes);
    }
    RWKV_RETURN_IF_ERROR(FromRocksdbStatus(it->status(), absl::StrCat("records of snapshot ", snapshot_id)));
  }
  if (batch.Count() == 0) return absl::OkStatus();
  // If a crash undoes this, the records are orphans, which a sweep finds.
  RWKV_RETURN_IF_ERROR(database_->Write(std::move(access), batch, Durability::kBuffered));
  CountBytes(-bytes);
  return files_->Delete(snapshot_id);
}

absl::Status RocksdbRecordStore::ForEach(absl::FunctionRef<void(const Stored&)> visit) {
  // In pages, so that neither the database nor `visit` waits for the other for long.
  constexpr size_t kPage = 1024;
  std::string next;
  for (bool more = true; more;) {
    std::vector<Stored> page;
    {
      RWKV_ASSIGN_OR_RETURN(const Database::Access access, database_->Read());
      const std::unique_ptr<rocksdb::Iterator> it(
          access.db().NewIterator(rocksdb::ReadOptions(), access.family(Family::kRecordInfos)));
      for (it->Seek(next); it->Valid(); it->Next()) {
        const std::string key = it->key().ToString();
        const std::string snapshot_id = key.substr(0, key.find('\0'));
        if (page.empty() || page.back().snapshot_id != snapshot_id) {
          if (page.size() == kPage) {
            next = key;
            break;
          }
          page.push_back({snapshot_id, absl::InfinitePast(), 0});
        }
        const absl::optional<InfoRow> row = DecodeRow(absl::string_view(it->value().data(), it->value().size()));
        if (!row.has_value()) continue;  // Reading it will say so; what has no time is old.
        page.back().newest_put = std::max(page.back().newest_put, row->put_time);
        page.back().bytes += row->bytes;
      }
      more = it->Valid();
      RWKV_RETURN_IF_ERROR(FromRocksdbStatus(it->status(), "records"));
    }
    for (const Stored& stored : page) visit(stored);
  }
  return absl::OkStatus();
}

}  // namespace rwkv::state_store
