#include "services/state_store/rocksdb/reclaim.h"

#include <algorithm>
#include <string>

#include "kernels/base/status_macros.h"
#include "rocksdb/metadata.h"
#include "rocksdb/options.h"
#include "rocksdb/table_properties.h"
#include "services/state_store/rocksdb/rocksdb_status.h"

namespace rwkv::state_store {
namespace {

absl::Status Convert(const rocksdb::Status& status, const char* context) {
  if (status.IsIncomplete()) return absl::CancelledError(context);
  return FromRocksdbStatus(status, context);
}

uint64_t Property(rocksdb::DB& db, rocksdb::ColumnFamilyHandle* family, const std::string& name) {
  uint64_t value = 0;
  db.GetIntProperty(family, name, &value);
  return value;
}

bool HasDeletesInMemory(rocksdb::DB& db, rocksdb::ColumnFamilyHandle* family) {
  return Property(db, family, rocksdb::DB::Properties::kNumDeletesActiveMemTable) > 0 ||
         Property(db, family, rocksdb::DB::Properties::kNumDeletesImmMemTables) > 0;
}

rocksdb::CompactRangeOptions Compaction(std::atomic<bool>* canceled) {
  rocksdb::CompactRangeOptions options;
  // Tombstones that have sunk to the last level, and blobs of keys there, are reached by this only.
  options.bottommost_level_compaction = rocksdb::BottommostLevelCompaction::kForceOptimized;
  options.canceled = canceled;
  return options;
}

absl::Status CompactKeys(rocksdb::DB& db, rocksdb::ColumnFamilyHandle* family, std::atomic<bool>* canceled) {
  rocksdb::TablePropertiesCollection tables;
  RWKV_RETURN_IF_ERROR(Convert(db.GetPropertiesOfAllTables(family, &tables), "reclaim: reading properties"));
  uint64_t entries = 0, deletions = 0, bytes = 0;
  for (const auto& [name, table] : tables) {
    entries += table->num_entries;
    deletions += table->num_deletions + table->num_range_deletions;
    bytes += table->data_size;
  }
  if (!ShouldCompact(entries, deletions, bytes)) return absl::OkStatus();
  rocksdb::CompactRangeOptions options = Compaction(canceled);
  options.blob_garbage_collection_policy = rocksdb::BlobGarbageCollectionPolicy::kDisable;
  return Convert(db.CompactRange(options, family, nullptr, nullptr), "reclaim: compaction");
}

absl::Status RewriteBlobs(rocksdb::DB& db, rocksdb::ColumnFamilyHandle* family, std::atomic<bool>* canceled) {
  rocksdb::ColumnFamilyMetaData metadata;
  db.GetColumnFamilyMetaData(family, &metadata);
  std::sort(metadata.blob_files.begin(), metadata.blob_files.end(),
            [](const auto& a, const auto& b) { return a.blob_file_number < b.blob_file_number; });
  std::vector<BlobBytes> files;
  for (const rocksdb::BlobMetaData& file : metadata.blob_files) {
    files.push_back({file.total_blob_bytes, file.garbage_blob_bytes});
  }
  const size_t rewritten = FilesToRewrite(files);
  if (rewritten == 0) return absl::OkStatus();
  rocksdb::CompactRangeOptions options = Compaction(canceled);
  options.blob_garbage_collection_policy = rocksdb::BlobGarbageCollectionPolicy::kForce;
  // RocksDB takes the whole part of this times the number of files; the half is for the rounding.
  options.blob_garbage_collection_age_cutoff =
      std::min(1.0, (static_cast<double>(rewritten) + 0.5) / static_cast<double>(files.size()));
  return Convert(db.CompactRange(options, family, nullptr, nullptr), "reclaim: blob files");
}

}  // namespace

size_t FilesToRewrite(absl::Span<const BlobBytes> files) {
  BlobBytes all;
  for (const BlobBytes& file : files) {
    all.total += file.total;
    all.garbage += file.garbage;
  }
  if (all.garbage == 0) return 0;
  const uint64_t live = all.total - all.garbage;
  // To the last file with garbage, if that is cheap.
  size_t last = 0;
  uint64_t moved = 0, moved_to_last = 0;
  for (size_t i = 0; i < files.size(); ++i) {
    moved += files[i].total - files[i].garbage;
    if (files[i].garbage == 0) continue;
    last = i + 1;
    moved_to_last = moved;
  }
  if (moved_to_last <= kCheapBytes) return last;
  uint64_t left = all.garbage;
  for (size_t i = 0; i < files.size(); ++i) {
    if (left <= live / 5) return i;
    left -= files[i].garbage;
  }
  return files.size();
}

bool ShouldCompact(uint64_t entries, uint64_t deletions, uint64_t file_bytes) {
  if (deletions == 0) return false;
  return file_bytes <= kCheapBytes || deletions > entries / 5;
}

absl::Status ReclaimSpace(rocksdb::DB& db, absl::Span<rocksdb::ColumnFamilyHandle* const> families,
                          std::atomic<bool>* canceled) {
  if (std::any_of(families.begin(), families.end(), [&](auto* family) { return HasDeletesInMemory(db, family); })) {
    // All of them, since the log goes only when none needs it; and the log holds records too.
    const std::vector<rocksdb::ColumnFamilyHandle*> all(families.begin(), families.end());
    RWKV_RETURN_IF_ERROR(Convert(db.Flush(rocksdb::FlushOptions(), all), "reclaim: flush"));
  }
  for (const Family family : {Family::kCatalog, Family::kRecordInfos, Family::kRecords}) {
    RWKV_RETURN_IF_ERROR(CompactKeys(db, families[static_cast<size_t>(family)], canceled));
  }
  RWKV_RETURN_IF_ERROR(RewriteBlobs(db, families[static_cast<size_t>(Family::kRecords)], canceled));
  // A compaction looks for files to delete before it lets go of what it replaced; this looks again.
  RWKV_RETURN_IF_ERROR(Convert(db.DisableFileDeletions(), "reclaim: deleting files"));
  return Convert(db.EnableFileDeletions(/*force=*/true), "reclaim: deleting files");
}

}  // namespace rwkv::state_store
