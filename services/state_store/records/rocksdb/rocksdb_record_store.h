// The embedded record store: one row a record, its bytes in RocksDB's blob files, or in a file of the snapshot if they
// are many (record_files.h). Laws: records/record_store.h.
//
// Rows, in two families under the key SNAPSHOT 0 LAYER: kRecordInfos has length, CRC32C, time and, of a large record,
// where it begins in the file, so that checking and sweeping read no states; kRecords has the bytes of a small one.
// Both are written in one batch, so neither is there without the other.
//
// The row of a large record is written when its bytes and the name of its file are durable; until then it is kept in
// memory. So a row speaks of bytes that a crash of the machine has left, whichever part of the database it has left:
//
//   Put: bytes ──► memory     MakeDurable: fsync of files and folder ──► rows ──► fsync of the database
//
// A crash in between, also one of this process alone, loses the record, as it may (records/record_store.h). The rows of a
// snapshot whose records are all large need no fsync before its manifest is committed: those that a crash of the machine
// takes are found again by the manifest and the checksums, when the next start sees that the database is not as it was
// (Database::log_is_whole).
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/optional.h"
#include "services/common/clock.h"
#include "services/common/executor.h"
#include "services/common/metrics.h"
#include "services/state_store/key_locks.h"
#include "services/state_store/records/record_store.h"
#include "services/state_store/records/rocksdb/record_files.h"
#include "services/state_store/records/rocksdb/record_rows.h"
#include "services/state_store/rocksdb/database.h"

namespace rwkv::state_store {

class RocksdbRecordStore final : public RecordStore {
 public:
  // Records from here on are in files. Smaller ones share fsyncs better in the log of the database.
  static constexpr size_t kFileBytes = 128 << 10;

  // What the catalog knows of snapshots that must be here. A row that was lost of a large record is found again by it,
  // in the snapshot's file.
  struct Committed {
    // Null: of none.
    std::function<absl::StatusOr<absl::optional<v1::SnapshotManifest>>(const std::string& snapshot_id)> find;
    // Rows may have been lost, whose nobody knows. Else those files are looked at of which there is no row.
    bool check_all = false;
  };
  // Adds up what is there, which reads every record's info, and removes files that belong to none. The first three
  // outlive the store.
  static absl::StatusOr<std::unique_ptr<RocksdbRecordStore>> Create(Database* database, common::Clock* clock,
                                                                    common::Metrics* metrics,
                                                                    const Committed& committed);
  ~RocksdbRecordStore() override;  // MakeDurable(), so that a stop loses nothing.

  absl::Status Put(const v1::RecordInfo& info, absl::Span<const char> data) override {
    return PutAll({&info, 1}, {&data, 1});
  }
  absl::Status PutAll(absl::Span<const v1::RecordInfo> infos, absl::Span<const absl::Span<const char>> data) override;
  absl::Status Read(const v1::RecordInfo& info, absl::Span<char> to) override { return ReadAll({&info, 1}, {&to, 1}); }
  absl::Status ReadAll(absl::Span<const v1::RecordInfo> infos, absl::Span<const absl::Span<char>> to) override;
  absl::Status Check(const v1::RecordInfo& info) override;
  absl::Status MakeDurable() override;
  void MakeDurableSoon(const std::string& snapshot_id, size_t records) override ABSL_LOCKS_EXCLUDED(waiting_mu_);
  absl::Status MakeDurable(const v1::SnapshotManifest& manifest) override;
  absl::Status Delete(const std::string& snapshot_id) override;
  absl::Status ForEach(absl::FunctionRef<void(const Stored&)> visit) override {
    return ForEachSnapshot([visit](const Stored& stored, uint64_t) { visit(stored); });
  }
  // Check() of every record of a manifest, in one pass over its rows.
  absl::StatusOr<bool> HoldsAll(const v1::SnapshotManifest& manifest);
  // When it was made: whether every file was there that rows speak of, and as long as they say.
  bool files_were_whole() const { return files_were_whole_; }
  int64_t bytes() const override { return bytes_.load(std::memory_order_relaxed); }

 private:
  RocksdbRecordStore(Database* database, common::Clock* clock, common::Metrics* metrics);

  absl::StatusOr<absl::optional<RecordInfoRow>> ReadInfo(const Database::Access& access, const v1::RecordInfo& info)
      ABSL_LOCKS_EXCLUDED(waiting_mu_);
  // `file_bytes`: how long the snapshot's file must be at least; 0: it needs none.
  absl::Status ForEachSnapshot(absl::FunctionRef<void(const Stored&, uint64_t file_bytes)> visit);
  // Writes rows of those records of it that have none, and are in its file.
  absl::Status FindLostRows(const v1::SnapshotManifest& manifest);
  // kDataLoss: the record's file has been lost, or cut. A crash can undo the deletion of a row and not of the file.
  absl::Status CheckFile(const v1::RecordInfo& info, const RecordInfoRow& row) const;
  // Appends to the snapshot's file. The rows wait.
  absl::Status PutInFile(absl::Span<const v1::RecordInfo> infos, absl::Span<const absl::Span<const char>> data)
      ABSL_LOCKS_EXCLUDED(waiting_mu_);
  // Makes the bytes of the records that wait durable, then writes their rows. Those whose bytes may be lost by an error
  // are forgotten, to be put again.
  absl::Status WriteWaiting() ABSL_LOCKS_EXCLUDED(all_mu_, waiting_mu_);
  // The same of one snapshot. Waits for another call of the same, so that what it has taken up is durable.
  absl::Status WriteWaiting(const std::string& snapshot_id) ABSL_LOCKS_EXCLUDED(all_mu_, waiting_mu_);
  // Those of `rows` that still wait; their bytes are durable.
  absl::Status WriteRows(const std::map<std::string, std::string>& rows) ABSL_LOCKS_EXCLUDED(waiting_mu_);
  // Returns the error.
  absl::Status SyncFailed(const absl::Status& error, const std::vector<std::string>& lost)
      ABSL_LOCKS_EXCLUDED(waiting_mu_);
  void ForgetWaiting(const std::string& snapshot_id) ABSL_EXCLUSIVE_LOCKS_REQUIRED(waiting_mu_);

  void CountBytes(int64_t delta);
  // Counts and returns kDataLoss.
  absl::Status Corrupt(const v1::RecordInfo& info, const std::string& what);

  // The record's bytes, unchecked.
  absl::Status Load(const v1::RecordInfo& info, absl::Span<char> to);
  // The bytes of the first few, unchecked, if they follow each other in the file and in memory, in one read. Returns of
  // how many; 0: Load() them.
  absl::StatusOr<size_t> LoadTogether(absl::Span<const v1::RecordInfo> infos, absl::Span<const absl::Span<char>> to);

  Database* const database_;
  std::unique_ptr<RecordFiles> files_;
  bool files_were_whole_ = true;
  common::Clock* const clock_;
  KeyLocks snapshot_locks_;  // Held to change the records of a snapshot.
  KeyLocks sync_locks_;      // Held to make the records of a snapshot durable.
  absl::Mutex all_mu_;  // Whose records one WriteWaiting() has taken up, another waits for. Shared: of one snapshot.
  absl::Mutex waiting_mu_;
  // Rows of large records, as the database will have them, whose bytes nobody has made durable.
  std::map<std::string, std::string> waiting_ ABSL_GUARDED_BY(waiting_mu_);
  uint64_t failed_syncs_ ABSL_GUARDED_BY(waiting_mu_) = 0;
  std::atomic<int64_t> bytes_{0};
  prometheus::Gauge& bytes_gauge_;
  prometheus::Counter& written_bytes_total_;
  prometheus::Counter& read_bytes_total_;
  prometheus::Counter& corrupt_total_;
  common::Executor early_syncs_{/*threads=*/1, /*max_queued=*/16};  // MakeDurable() does what is not done here.
};

}  // namespace rwkv::state_store
