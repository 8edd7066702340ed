#include "services/state_store/rocksdb/layout.h"

#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "kernels/base/status_macros.h"
#include "rocksdb/filter_policy.h"
#include "rocksdb/iterator.h"
#include "rocksdb/table.h"
#include "rocksdb/write_batch.h"
#include "services/state_store/rocksdb/kept_tables.h"
#include "services/state_store/rocksdb/rocksdb_status.h"
#include "services/state_store/rows/sealed_value.h"

namespace rwkv::state_store {
namespace {

constexpr size_t kProbeBytes = 1 << 20;  // A disk with less than that to spare is full.
constexpr size_t kBatchBytes = 4 << 20;
constexpr uint64_t kMaxJournalBytes = uint64_t{8} << 20;

}  // namespace

rocksdb::ColumnFamilyOptions FamilyOptions(Family family, const std::shared_ptr<rocksdb::Cache>& block_cache) {
  rocksdb::ColumnFamilyOptions options;
  rocksdb::BlockBasedTableOptions table;
  table.block_cache = block_cache;
  table.filter_policy.reset(rocksdb::NewBloomFilterPolicy(10));
  options.table_factory.reset(rocksdb::NewBlockBasedTableFactory(table));
  options.write_buffer_size = 16 << 20;
  // fp32 states do not compress, and the catalog is small: speed and few dependencies over space.
  options.compression = rocksdb::kNoCompression;
  if (family == Family::kRecords) {
    options.write_buffer_size = 64 << 20;
    options.enable_blob_files = true;
    options.min_blob_size = 4 << 10;
    options.blob_compression_type = rocksdb::kNoCompression;
    // Records die young (retention keeps a few per branch), so old blob files are mostly garbage: rewrite them when
    // half of the oldest ones is.
    options.enable_blob_garbage_collection = true;
    options.blob_garbage_collection_age_cutoff = 1.0;
    options.blob_garbage_collection_force_threshold = 0.5;
  }
  return options;
}

std::string FamilyName(Family family) {
  switch (family) {
    case Family::kMeta:
      return rocksdb::kDefaultColumnFamilyName;
    case Family::kCatalog:
      return "rows";
    case Family::kRecordInfos:
      return "record_infos";
    case Family::kRecords:
      return "records";
  }
  return "";
}

absl::Status CheckWritable(rocksdb::Env& env, const std::string& data_dir, const std::string& name) {
  const std::string path = data_dir + "/.writable";
  std::unique_ptr<rocksdb::WritableFile> file;
  rocksdb::Status status = env.NewWritableFile(path, &file, rocksdb::EnvOptions());
  if (status.ok()) status = file->Append(std::string(kProbeBytes, '\0'));
  if (status.ok()) status = file->Sync();
  if (status.ok()) status = file->Close();
  file.reset();
  env.DeleteFile(path).PermitUncheckedError();
  return FromRocksdbStatus(status, absl::StrCat(name, ": not writable"));
}

absl::Status Database::Rebuild(const Options& options) {
  std::vector<rocksdb::ColumnFamilyDescriptor> families;
  const std::shared_ptr<rocksdb::Cache> cache = rocksdb::NewLRUCache(8 << 20);
  for (int i = 0; i < kFamilyCount; ++i) {
    const Family family = static_cast<Family>(i);
    families.emplace_back(FamilyName(family), FamilyOptions(family, cache));
  }
  rocksdb::DBOptions db_options;
  if (options.env != nullptr) db_options.env = options.env;
  return FromRocksdbStatus(rocksdb::RepairDB(options.data_dir, db_options, families, families[0].options),
                           absl::StrCat("cannot rebuild ", options.data_dir));
}

absl::Status Database::AcceptLoss() {
  lost_rows_.clear();
  if (journal_ == nullptr) return absl::OkStatus();
  RWKV_RETURN_IF_ERROR(journal_->Rotate());
  journal_->DropOlder();
  DropKeptTables(*env_, options_.data_dir);
  return absl::OkStatus();
}

absl::Status Database::TrimJournal() {
  if (journal_ == nullptr) return absl::OkStatus();
  if (journal_->bytes() < kMaxJournalBytes) {
    journal_->NoteFiles();
    return absl::OkStatus();
  }
  RWKV_ASSIGN_OR_RETURN(const Access access, Read());
  RWKV_RETURN_IF_ERROR(journal_->Rotate());
  const std::vector<rocksdb::ColumnFamilyHandle*> rows = {access.family(Family::kMeta),
                                                          access.family(Family::kCatalog)};
  RWKV_RETURN_IF_ERROR(FromRocksdbStatus(access.db().Flush({}, rows), name_));
  if (log_is_trusted_) journal_->NoteWritten(access.db().GetLatestSequenceNumber(), /*closed=*/false);
  journal_->DropOlder();
  return absl::OkStatus();
}

absl::StatusOr<int64_t> CopyFormerRows(rocksdb::DB& db, rocksdb::ColumnFamilyHandle* former,
                                       rocksdb::ColumnFamilyHandle* rows, const std::string& name) {
  const std::unique_ptr<rocksdb::Iterator> it(db.NewIterator(rocksdb::ReadOptions(), former));
  rocksdb::WriteBatch batch;
  rocksdb::WriteOptions options;
  int64_t count = 0;
  for (it->SeekToFirst(); it->Valid(); it->Next()) {
    const absl::string_view key(it->key().data(), it->key().size());
    batch.Put(rows, it->key(), SealValue(key, absl::string_view(it->value().data(), it->value().size())));
    ++count;
    if (batch.GetDataSize() < kBatchBytes) continue;
    RWKV_RETURN_IF_ERROR(FromRocksdbStatus(db.Write(options, &batch), name));
    batch.Clear();
  }
  RWKV_RETURN_IF_ERROR(FromRocksdbStatus(it->status(), name));
  options.sync = true;
  RWKV_RETURN_IF_ERROR(FromRocksdbStatus(db.Write(options, &batch), name));
  return count;
}

}  // namespace rwkv::state_store
