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
#include "services/state_store/records/record_memory.h"
#include "services/state_store/records/rocksdb/record_rows.h"
#include "services/state_store/records/rocksdb/record_search.h"
#include "services/state_store/rocksdb/rocksdb_status.h"

namespace rwkv::state_store {

namespace {

absl::optional<RecordInfoRow> Decode(const rocksdb::Slice& row) {
  return RecordInfoRow::Decode(absl::string_view(row.data(), row.size()));
}

std::string SnapshotOf(const rocksdb::Slice& key) {
  const absl::string_view bytes(key.data(), key.size());
  return std::string(bytes.substr(0, bytes.find('\0')));
}

std::string Name(const v1::RecordInfo& info) { return absl::StrCat("record ", info.snapshot_id(), "/", info.layer()); }

std::string Describe(uint64_t bytes, uint64_t crc32c) {
  return absl::StrCat(bytes, " bytes with CRC32C ", absl::Hex(crc32c, absl::kZeroPad8));
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
                                                                               common::Metrics* metrics,
                                                                               const Committed& committed) {
  std::unique_ptr<RocksdbRecordStore> store(new RocksdbRecordStore(database, clock, metrics));
  RWKV_ASSIGN_OR_RETURN(store->files_, RecordFiles::Open(database->env(), database->data_dir() + "/files"));
  RWKV_ASSIGN_OR_RETURN(const std::vector<std::string> with_files, store->files_->List());
  std::set<std::string> without_rows(with_files.begin(), with_files.end());
  RWKV_RETURN_IF_ERROR(store->ForEachSnapshot([&](const Stored& stored, uint64_t file_bytes) {
    store->CountBytes(static_cast<int64_t>(stored.bytes));
    without_rows.erase(stored.snapshot_id);
    if (file_bytes > 0 && !store->files_->Holds(stored.snapshot_id, file_bytes)) store->files_were_whole_ = false;
  }));
  for (const std::string& snapshot_id : with_files) {
    const bool has_rows = without_rows.count(snapshot_id) == 0;
    if (has_rows && !committed.check_all) continue;
    absl::StatusOr<absl::optional<v1::SnapshotManifest>> manifest = absl::nullopt;
    if (committed.find) manifest = committed.find(snapshot_id);
    if (!manifest.ok()) continue;
    if (manifest->has_value()) {
      RWKV_RETURN_IF_ERROR(store->FindLostRows(**manifest));
    } else if (!has_rows) {
      // What a crash left of records that never were made durable, or that were deleted.
      RWKV_RETURN_IF_ERROR(store->files_->Delete(snapshot_id));
    }
  }
  return store;
}

absl::Status RocksdbRecordStore::FindLostRows(const v1::SnapshotManifest& manifest) {
  RWKV_ASSIGN_OR_RETURN(const bool whole, HoldsAll(manifest));
  if (whole) return absl::OkStatus();
  std::vector<v1::RecordInfo> lost;
  for (const v1::RecordInfo& info : manifest.records()) {
    const absl::Status status = Check(info);
    if (!status.ok() && !absl::IsDataLoss(status)) return status;
    if (!status.ok() && info.bytes() >= kFileBytes) lost.push_back(info);
  }
  if (lost.empty()) return absl::OkStatus();
  const std::vector<absl::optional<uint64_t>> offsets = SearchFile(*files_, lost);
  RWKV_ASSIGN_OR_RETURN(Database::Access access, database_->Read());
  rocksdb::WriteBatch batch;
  for (size_t i = 0; i < lost.size(); ++i) {
    if (!offsets[i].has_value()) continue;
    const RecordInfoRow row{lost[i].bytes(), lost[i].crc32c(), clock_->Now(), offsets[i]};
    batch.Put(access.family(Family::kRecordInfos), RecordKey(lost[i]), row.Encode());
    CountBytes(static_cast<int64_t>(row.bytes));
  }
  common::LogWarning("record_rows_lost", {{"snapshot", manifest.snapshot_id()},
                                          {"records", lost.size()},
                                          {"found_in_its_file", static_cast<int64_t>(batch.Count())}});
  return database_->Write(std::move(access), batch, Durability::kSynced);
}

RocksdbRecordStore::~RocksdbRecordStore() {
  early_syncs_.Stop();
  if (files_ != nullptr) WriteWaiting().IgnoreError();  // What failed is in the log and the metrics.
}

absl::StatusOr<absl::optional<RecordInfoRow>> RocksdbRecordStore::ReadInfo(const Database::Access& access,
                                                                           const v1::RecordInfo& info) {
  const std::string key = RecordKey(info);
  {
    // First: a row moves from here to the database.
    absl::MutexLock lock(&waiting_mu_);
    if (const auto row = waiting_.find(key); row != waiting_.end()) return Decode(row->second);
  }
  std::string value;
  const rocksdb::Status status =
      access.db().Get(rocksdb::ReadOptions(), access.family(Family::kRecordInfos), key, &value);
  if (status.IsNotFound()) return absl::optional<RecordInfoRow>();
  RWKV_RETURN_IF_ERROR(FromRocksdbStatus(status, Name(info)));
  const absl::optional<RecordInfoRow> row = Decode(value);
  if (!row.has_value()) return absl::DataLossError(absl::StrCat(Name(info), ": its info is corrupt"));
  return row;
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

absl::Status RocksdbRecordStore::PutAll(absl::Span<const v1::RecordInfo> infos,
                                        absl::Span<const absl::Span<const char>> data) {
  for (size_t i = 0; i < infos.size(); ++i) {
    const uint32_t crc32c = Crc32c(data[i]);
    if (data[i].size() == infos[i].bytes() && crc32c == infos[i].crc32c()) continue;
    return absl::DataLossError(absl::StrCat(Name(infos[i]), ": ", Describe(data[i].size(), crc32c),
                                            " came, its info says ", Describe(infos[i].bytes(), infos[i].crc32c())));
  }
  if (files_->ManyUnsynced()) RWKV_RETURN_IF_ERROR(WriteWaiting());
  RWKV_ASSIGN_OR_RETURN(const KeyLocks::Guard guard, snapshot_locks_.Lock({infos[0].snapshot_id()}));
  RWKV_ASSIGN_OR_RETURN(Database::Access access, database_->Read());
  std::vector<v1::RecordInfo> large;
  std::vector<absl::Span<const char>> large_data;
  rocksdb::WriteBatch small;
  int64_t bytes = 0;
  for (size_t i = 0; i < infos.size(); ++i) {
    const v1::RecordInfo& info = infos[i];
    RWKV_ASSIGN_OR_RETURN(const absl::optional<RecordInfoRow> existing, ReadInfo(access, info));
    if (existing.has_value()) {
      if (!existing->Is(info)) {
        return absl::AlreadyExistsError(
            absl::StrCat(Name(info), " exists already, ", Describe(existing->bytes, existing->crc32c)));
      }
      RWKV_RETURN_IF_ERROR(CheckFile(info, *existing));
      continue;
    }
    bytes += static_cast<int64_t>(data[i].size());
    if (data[i].size() >= kFileBytes) {
      large.push_back(info);
      large_data.push_back(data[i]);
      continue;
    }
    const RecordInfoRow row{info.bytes(), info.crc32c(), clock_->Now(), absl::nullopt};
    small.Put(access.family(Family::kRecords), RecordKey(info), rocksdb::Slice(data[i].data(), data[i].size()));
    small.Put(access.family(Family::kRecordInfos), RecordKey(info), row.Encode());
  }
  if (!large.empty()) RWKV_RETURN_IF_ERROR(PutInFile(large, large_data));
  if (small.Count() > 0) RWKV_RETURN_IF_ERROR(database_->Write(std::move(access), small, Durability::kBuffered));
  CountBytes(bytes);
  written_bytes_total_.Increment(static_cast<double>(bytes));
  return absl::OkStatus();
}

absl::Status RocksdbRecordStore::PutInFile(absl::Span<const v1::RecordInfo> infos,
                                           absl::Span<const absl::Span<const char>> data) {
  uint64_t failed_syncs;
  {
    absl::MutexLock lock(&waiting_mu_);
    failed_syncs = failed_syncs_;
  }
  RWKV_ASSIGN_OR_RETURN(const std::vector<uint64_t> offsets, files_->Append(infos[0].snapshot_id(), data));
  absl::MutexLock lock(&waiting_mu_);
  if (failed_syncs_ != failed_syncs) {
    return absl::UnavailableError(absl::StrCat(Name(infos[0]), ": an fsync failed that it may have been part of"));
  }
  for (size_t i = 0; i < infos.size(); ++i) {
    const RecordInfoRow row{infos[i].bytes(), infos[i].crc32c(), clock_->Now(), offsets[i]};
    waiting_[RecordKey(infos[i])] = row.Encode();
  }
  return absl::OkStatus();
}

absl::Status RocksdbRecordStore::CheckFile(const v1::RecordInfo& info, const RecordInfoRow& row) const {
  if (!row.offset.has_value() || files_->Holds(info.snapshot_id(), *row.offset + row.bytes)) return absl::OkStatus();
  return absl::DataLossError(absl::StrCat(Name(info), ": its bytes are gone"));
}

absl::Status RocksdbRecordStore::Load(const v1::RecordInfo& info, absl::Span<char> to) {
  if (to.size() < info.bytes()) {
    return absl::DataLossError(absl::StrCat(Name(info), " has ", info.bytes(), " bytes, its place ", to.size()));
  }
  RWKV_ASSIGN_OR_RETURN(const Database::Access access, database_->Read());
  RWKV_ASSIGN_OR_RETURN(const absl::optional<RecordInfoRow> row, ReadInfo(access, info));
  if (!row.has_value()) return absl::NotFoundError(absl::StrCat(Name(info), " does not exist"));
  if (!row->Is(info)) {
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
    status = access.db().Get(options, access.family(Family::kRecords), RecordKey(info), &data);
    if (status.IsNotFound()) lost = absl::DataLossError("its bytes are gone");
    if (status.ok() && data.size() != info.bytes()) {
      lost = absl::DataLossError(absl::StrCat("stored are ", data.size(), " bytes, want ", info.bytes()));
    } else if (status.ok()) {
      std::memcpy(to.data(), data.data(), data.size());
    }
  }
  if (!lost.ok()) {
    // Deleted between the two reads, or lost.
    RWKV_ASSIGN_OR_RETURN(const absl::optional<RecordInfoRow> again, ReadInfo(access, info));
    if (!again.has_value()) return absl::NotFoundError(absl::StrCat(Name(info), " does not exist"));
    return Corrupt(info, std::string(lost.message()));
  }
  // A file of records that is gone stays gone: waiting for it would not help.
  const bool gone =
      status.IsPathNotFound() || (status.IsIOError() && absl::StrContains(status.ToString(), "No such file"));
  if (status.IsCorruption() || gone) return Corrupt(info, status.ToString());
  return FromRocksdbStatus(status, Name(info));
}

absl::StatusOr<size_t> RocksdbRecordStore::LoadTogether(absl::Span<const v1::RecordInfo> infos,
                                                        absl::Span<const absl::Span<char>> to) {
  RWKV_ASSIGN_OR_RETURN(const Database::Access access, database_->Read());
  size_t count = 0;
  uint64_t begin = 0, bytes = 0;  // In the file, of all of them.
  for (; count < infos.size() && to[count].size() >= infos[count].bytes(); ++count) {
    RWKV_ASSIGN_OR_RETURN(const absl::optional<RecordInfoRow> row, ReadInfo(access, infos[count]));
    if (!row.has_value() || !row->Is(infos[count]) || !row->offset.has_value()) break;
    if (count == 0) begin = *row->offset;
    const uint64_t at = WholeBlocks(bytes);
    if (*row->offset != begin + at || to[count].data() != to[0].data() + at) break;
    bytes = at + row->bytes;
  }
  if (count < 2) return 0;
  const absl::Span<char> last = to[count - 1];
  const absl::Span<char> room(to[0].data(), last.data() + last.size() - to[0].data());
  // Which of them is lost is found by reading each.
  return files_->Read(infos[0].snapshot_id(), begin, bytes, room).ok() ? count : 0;
}

absl::Status RocksdbRecordStore::ReadAll(absl::Span<const v1::RecordInfo> infos,
                                         absl::Span<const absl::Span<char>> to) {
  for (size_t i = 0, loaded = 0; i < infos.size(); ++i) {
    const v1::RecordInfo& info = infos[i];
    if (loaded == 0) {
      RWKV_ASSIGN_OR_RETURN(loaded, LoadTogether(infos.subspan(i), to.subspan(i)));
    }
    if (loaded == 0) {
      RWKV_RETURN_IF_ERROR(Load(info, to[i]));
    } else {
      --loaded;
    }
    const absl::Span<const char> data = to[i].first(info.bytes());
    if (const uint32_t crc32c = Crc32c(data); crc32c != info.crc32c()) {
      return Corrupt(info, absl::StrCat("stored are ", Describe(data.size(), crc32c), ", want ",
                                        Describe(info.bytes(), info.crc32c())));
    }
    read_bytes_total_.Increment(static_cast<double>(data.size()));
  }
  return absl::OkStatus();
}

absl::Status RocksdbRecordStore::Check(const v1::RecordInfo& info) {
  RWKV_ASSIGN_OR_RETURN(const Database::Access access, database_->Read());
  RWKV_ASSIGN_OR_RETURN(const absl::optional<RecordInfoRow> row, ReadInfo(access, info));
  if (!row.has_value()) return absl::DataLossError(absl::StrCat(Name(info), " does not exist"));
  if (!row->Is(info)) {
    return absl::DataLossError(absl::StrCat(Name(info), " is ", Describe(row->bytes, row->crc32c), ", not ",
                                            Describe(info.bytes(), info.crc32c())));
  }
  return CheckFile(info, *row);
}

absl::StatusOr<bool> RocksdbRecordStore::HoldsAll(const v1::SnapshotManifest& manifest) {
  RWKV_RETURN_IF_ERROR(WriteWaiting(manifest.snapshot_id()));  // So that all rows are in one place.
  RWKV_ASSIGN_OR_RETURN(const Database::Access access, database_->Read());
  const std::string prefix = RecordPrefix(manifest.snapshot_id());
  std::map<std::string, RecordInfoRow> rows;
  const std::unique_ptr<rocksdb::Iterator> it(
      access.db().NewIterator(rocksdb::ReadOptions(), access.family(Family::kRecordInfos)));
  for (it->Seek(prefix); it->Valid() && it->key().starts_with(prefix); it->Next()) {
    if (const absl::optional<RecordInfoRow> row = Decode(it->value())) rows.emplace(it->key().ToString(), *row);
  }
  RWKV_RETURN_IF_ERROR(FromRocksdbStatus(it->status(), absl::StrCat("records of snapshot ", manifest.snapshot_id())));
  uint64_t file_bytes = 0;
  for (const v1::RecordInfo& info : manifest.records()) {
    const auto row = rows.find(RecordKey(info));
    if (row == rows.end() || !row->second.Is(info)) return false;
    if (row->second.offset.has_value()) file_bytes = std::max(file_bytes, *row->second.offset + info.bytes());
  }
  return file_bytes == 0 || files_->Holds(manifest.snapshot_id(), file_bytes);
}

absl::Status RocksdbRecordStore::MakeDurable() {
  RWKV_RETURN_IF_ERROR(WriteWaiting());
  return database_->Sync();
}

absl::Status RocksdbRecordStore::MakeDurable(const v1::SnapshotManifest& manifest) {
  const bool all_large = std::all_of(manifest.records().begin(), manifest.records().end(),
                                     [](const v1::RecordInfo& info) { return info.bytes() >= kFileBytes; });
  return all_large ? WriteWaiting(manifest.snapshot_id()) : MakeDurable();
}

void RocksdbRecordStore::MakeDurableSoon(const std::string& snapshot_id, size_t records) {
  {
    absl::MutexLock lock(&waiting_mu_);
    const std::string prefix = RecordPrefix(snapshot_id);
    auto row = waiting_.lower_bound(prefix);
    for (size_t i = 0; i < records; ++i, ++row) {
      if (row == waiting_.end() || !absl::StartsWith(row->first, prefix)) return;
    }
  }
  early_syncs_.TryRun([this, snapshot_id] {
    const absl::Status status = WriteWaiting(snapshot_id);
    if (!status.ok()) common::LogWarning("records_not_durable", {{"snapshot", snapshot_id}, {"error", status}});
  });
}

absl::Status RocksdbRecordStore::WriteWaiting() {
  absl::MutexLock one_at_a_time(&all_mu_);
  std::map<std::string, std::string> rows;
  {
    absl::MutexLock lock(&waiting_mu_);
    rows = waiting_;
  }
  std::vector<std::string> lost;
  const absl::Status synced = files_->Sync(&lost);
  return synced.ok() ? WriteRows(rows) : SyncFailed(synced, lost);
}

absl::Status RocksdbRecordStore::WriteWaiting(const std::string& snapshot_id) {
  RWKV_ASSIGN_OR_RETURN(const KeyLocks::Guard one_at_a_time, sync_locks_.Lock({snapshot_id}));
  absl::ReaderMutexLock not_all(&all_mu_);
  std::map<std::string, std::string> rows;
  {
    absl::MutexLock lock(&waiting_mu_);
    const std::string prefix = RecordPrefix(snapshot_id);
    for (auto row = waiting_.lower_bound(prefix); row != waiting_.end() && absl::StartsWith(row->first, prefix);
         ++row) {
      rows.insert(*row);
    }
  }
  std::vector<std::string> lost;
  const absl::Status synced = files_->Sync(snapshot_id, &lost);
  return synced.ok() ? WriteRows(rows) : SyncFailed(synced, lost);
}

absl::Status RocksdbRecordStore::SyncFailed(const absl::Status& error, const std::vector<std::string>& lost) {
  absl::MutexLock lock(&waiting_mu_);
  ++failed_syncs_;
  for (const std::string& snapshot_id : lost) ForgetWaiting(snapshot_id);
  return error;
}

absl::Status RocksdbRecordStore::WriteRows(const std::map<std::string, std::string>& rows) {
  if (rows.empty()) return absl::OkStatus();
  RWKV_ASSIGN_OR_RETURN(Database::Access access, database_->Read());
  rocksdb::WriteBatch batch;
  std::vector<std::string> written;
  absl::MutexLock lock(&waiting_mu_);  // Until they are in the database, so that none is written that was deleted.
  for (const auto& [key, row] : rows) {
    const auto waiting = waiting_.find(key);
    if (waiting == waiting_.end() || waiting->second != row) continue;
    batch.Put(access.family(Family::kRecordInfos), key, row);
    written.push_back(key);
  }
  RWKV_RETURN_IF_ERROR(database_->Write(std::move(access), batch, Durability::kBuffered));
  for (const std::string& key : written) waiting_.erase(key);
  return absl::OkStatus();
}

void RocksdbRecordStore::ForgetWaiting(const std::string& snapshot_id) {
  const std::string prefix = RecordPrefix(snapshot_id);
  int64_t bytes = 0;
  for (auto row = waiting_.lower_bound(prefix); row != waiting_.end() && absl::StartsWith(row->first, prefix);) {
    bytes += static_cast<int64_t>(Decode(row->second)->bytes);
    row = waiting_.erase(row);
  }
  CountBytes(-bytes);
}

absl::Status RocksdbRecordStore::Delete(const std::string& snapshot_id) {
  RWKV_ASSIGN_OR_RETURN(const KeyLocks::Guard guard, snapshot_locks_.Lock({snapshot_id}));
  {
    absl::MutexLock lock(&waiting_mu_);
    ForgetWaiting(snapshot_id);
  }
  RWKV_ASSIGN_OR_RETURN(Database::Access access, database_->Read());
  rocksdb::WriteBatch batch;
  int64_t bytes = 0;
  {
    const std::unique_ptr<rocksdb::Iterator> it(
        access.db().NewIterator(rocksdb::ReadOptions(), access.family(Family::kRecordInfos)));
    const std::string prefix = RecordPrefix(snapshot_id);
    for (it->Seek(prefix); it->Valid() && it->key().starts_with(prefix); it->Next()) {
      batch.Delete(access.family(Family::kRecordInfos), it->key());
      batch.Delete(access.family(Family::kRecords), it->key());
      const absl::optional<RecordInfoRow> row = Decode(it->value());
      if (row.has_value()) bytes += static_cast<int64_t>(row->bytes);
    }
    RWKV_RETURN_IF_ERROR(FromRocksdbStatus(it->status(), absl::StrCat("records of snapshot ", snapshot_id)));
  }
  // If a crash undoes this, the records are orphans, which a sweep or the next start finds.
  if (batch.Count() > 0) RWKV_RETURN_IF_ERROR(database_->Write(std::move(access), batch, Durability::kBuffered));
  CountBytes(-bytes);
  return files_->Delete(snapshot_id);
}

absl::Status RocksdbRecordStore::ForEachSnapshot(absl::FunctionRef<void(const Stored&, uint64_t file_bytes)> visit) {
  RWKV_RETURN_IF_ERROR(WriteWaiting());  // So that all rows are in one place.
  // In pages, so that neither the database nor `visit` waits for the other for long.
  constexpr size_t kPage = 1024;
  std::string next;
  for (bool more = true; more;) {
    std::vector<std::pair<Stored, uint64_t>> page;
    {
      RWKV_ASSIGN_OR_RETURN(const Database::Access access, database_->Read());
      const std::unique_ptr<rocksdb::Iterator> it(
          access.db().NewIterator(rocksdb::ReadOptions(), access.family(Family::kRecordInfos)));
      for (it->Seek(next); it->Valid(); it->Next()) {
        const std::string key = it->key().ToString();
        const std::string snapshot_id = SnapshotOf(it->key());
        if (page.empty() || page.back().first.snapshot_id != snapshot_id) {
          if (page.size() == kPage) {
            next = key;
            break;
          }
          page.push_back({{snapshot_id, absl::InfinitePast(), 0}, 0});
        }
        const absl::optional<RecordInfoRow> row = Decode(it->value());
        if (!row.has_value()) continue;  // Reading it will say so; what has no time is old.
        auto& [stored, file_bytes] = page.back();
        stored.newest_put = std::max(stored.newest_put, row->put_time);
        stored.bytes += row->bytes;
        if (row->offset.has_value()) file_bytes = std::max(file_bytes, *row->offset + row->bytes);
      }
      more = it->Valid();
      RWKV_RETURN_IF_ERROR(FromRocksdbStatus(it->status(), "records"));
    }
    for (const auto& [stored, file_bytes] : page) visit(stored, file_bytes);
  }
  return absl::OkStatus();
}

}  // namespace rwkv::state_store
