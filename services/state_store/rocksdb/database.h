// The one RocksDB under a data directory, which the embedded catalog and the embedded record store share.
//
// Files: its own lock (one process at a time), a write-ahead log for everything, and blob files for records, so that
// compaction moves their keys and not their bytes.
//
// When a write fails (disk full, input or output error) the database stops writing and keeps reading. Later reads try
// to resume, at most every `resume_interval`, and so does TryResume(): when the cause is gone, writing goes on.
// Resuming may open the files again, and then a write that failed may turn out to have happened: what was read before
// must not be written after. A write that has returned OK with Durability::kSynced is there after a crash at any later
// moment.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "rocksdb/db.h"
#include "rocksdb/env.h"
#include "rocksdb/options.h"
#include "rocksdb/statistics.h"
#include "rocksdb/write_batch.h"
#include "services/common/metrics.h"
#include "services/state_store/rocksdb/ack_journal.h"

namespace rwkv::state_store {

// Column families. Their order is the order of the handles, not stored anywhere.
enum class Family {
  kMeta = 0,         // RocksDB's "default": the format's version, counters.
  kCatalog = 1,      // Sessions, branches, logs, turns, snapshots: see catalog/keys.h. Called "rows".
  kRecordInfos = 2,  // Length, checksum and age of each record.
  kRecords = 3,      // The records' bytes, in blob files.
};
inline constexpr int kFamilyCount = 4;

enum class Durability {
  kBuffered,  // Outlives the process, not a crash of the machine. The next kSynced write, or Sync(), makes it durable.
  kSynced,    // On the disk when the call returns; concurrent calls share one fsync.
};

// Thread-safe.
class Database {
 public:
  struct Options {
    std::string data_dir;         // Required. Made if missing, with its parents.
    rocksdb::Env* env = nullptr;  // Null: the operating system's files. Borrowed; for tests.
    absl::Duration resume_interval = absl::Milliseconds(250);
    // Whether it notes what it acknowledges of Family::kCatalog, see ack_journal.h.
    bool journal = true;
    // To read what is left of a damaged one: takes what its log has before and behind damage.
    bool salvage = false;
    // Whether it rearranges its tables. Those of one that is looked into stay as they are: what a table that the list
    // of files has lost says of a row is compared by sequence numbers, of which rearranging leaves little.
    bool compacts = true;
    common::Metrics::Labels metrics_labels;  // Of its gauges, where a process has two databases.
  };

  // Every message is one line that names data_dir. kFailedPrecondition: it is not a directory, or of a newer format.
  // kUnavailable: another process has it open, or it cannot be made, read or written. kResourceExhausted: the disk is
  // full. kDataLoss: what is in it is corrupt. `metrics` outlives the database.
  static absl::StatusOr<std::unique_ptr<Database>> Open(const Options& options, common::Metrics* metrics);
  ~Database();
  // Makes a new list of files of those tables that can be read, and of the log. For copies: it moves what it cannot read.
  static absl::Status Rebuild(const Options& options);

  // The right to read, and then to write what the reading led to. While it lives the database is not reopened, so it is
  // held for one operation, never across another call of this class (they would wait for each other) or over the
  // network.
  class Access {
   public:
    rocksdb::DB& db() const { return *db_; }
    rocksdb::ColumnFamilyHandle* family(Family family) const { return families_[static_cast<size_t>(family)]; }
    // Counts how often the files were opened. What was read under another number is not to be relied on.
    uint64_t opening() const { return opening_; }

    Access(Access&&) = default;
    Access& operator=(Access&&) = default;

   private:
    friend class Database;
    Access() = default;
    std::unique_ptr<absl::ReaderMutexLock> lock_;
    rocksdb::DB* db_ = nullptr;
    rocksdb::ColumnFamilyHandle* const* families_ = nullptr;
    uint64_t opening_ = 0;
  };
  // Fails only if the database was closed after a failure and cannot be opened again so far.
  absl::StatusOr<Access> Read() ABSL_LOCKS_EXCLUDED(db_mu_, resume_mu_);

  // All of the batch or nothing. On kResourceExhausted (no space) and kUnavailable the batch is not visible; after a
  // reopening or a crash it may be. Either way nothing that was acknowledged is lost. `access` is what the batch was
  // built under; it ends here.
  absl::Status Write(Access access, rocksdb::WriteBatch& batch, Durability durability);

  // The keys of acknowledged changes that the files do not have, found when it was opened: its write-ahead log was cut
  // or lost a part. Empty: none that it knows of. Until AcceptLoss() every opening finds them again.
  const std::vector<std::string>& lost_rows() const { return lost_rows_; }
  absl::Status AcceptLoss();
  // Whether every write is there that outlived the former process, of whatever family. False: its log was cut, or nobody
  // can tell, as after a crash of the machine. From TrustLog() on, the next opening can tell.
  bool log_is_whole() const { return log_is_whole_; }
  void TrustLog() ABSL_LOCKS_EXCLUDED(db_mu_, resume_mu_);
  // Puts what the journal speaks of into files, if it has grown long; else notes the list of files there. Now and then,
  // by one thread.
  absl::Status TrimJournal() ABSL_LOCKS_EXCLUDED(db_mu_, resume_mu_);

  // Makes every write so far durable.
  absl::Status Sync() ABSL_LOCKS_EXCLUDED(db_mu_, resume_mu_);
  // The same, if there was one since that is not.
  absl::Status SyncBuffered() ABSL_LOCKS_EXCLUDED(db_mu_, resume_mu_);

  // OK if the database writes, or does again.
  absl::Status TryResume() ABSL_LOCKS_EXCLUDED(db_mu_, resume_mu_);

  // Gives the space of what was deleted back to the disk, as far as that is worth what it writes (reclaim.h). May take
  // minutes, in which everything else goes on. kCancelled: writing failed, or CancelReclaim(). Not by two at a time.
  absl::Status Reclaim() ABSL_LOCKS_EXCLUDED(db_mu_, resume_mu_);
  // Ends a Reclaim() soon, and lets no other begin: the database is about to go.
  void CancelReclaim() { closing_ = cancel_reclaim_ = true; }

  rocksdb::Env* env() const { return env_; }
  const std::string& data_dir() const { return options_.data_dir; }

  // "state store in DIR", to begin an error's message with.
  const std::string& name() const { return name_; }

  // Calls of Write() that were made durable, and the fsyncs of the write-ahead log that this took.
  uint64_t synced_writes() const { return synced_writes_.load(std::memory_order_relaxed); }
  uint64_t wal_syncs() const;

 private:
  Database(const Options& options, common::Metrics* metrics);

  absl::optional<Access> TryRead() ABSL_LOCKS_EXCLUDED(db_mu_);
  absl::Status OpenDb() ABSL_EXCLUSIVE_LOCKS_REQUIRED(db_mu_);
  void CloseDb() ABSL_EXCLUSIVE_LOCKS_REQUIRED(db_mu_);
  // Notes that writing has stopped, and returns what to tell the caller.
  absl::Status Failed(const absl::Status& error) ABSL_LOCKS_EXCLUDED(error_mu_);
  absl::Status Resume() ABSL_EXCLUSIVE_LOCKS_REQUIRED(resume_mu_) ABSL_LOCKS_EXCLUDED(db_mu_);
  absl::Status CheckFormat() ABSL_LOCKS_EXCLUDED(db_mu_);
  absl::Status Upgrade(const std::string& version) ABSL_LOCKS_EXCLUDED(db_mu_);
  absl::Status CheckJournal(const AcknowledgedRows& acknowledged) ABSL_LOCKS_EXCLUDED(db_mu_);
  void CountSyncs();

  const Options options_;
  const std::string name_;
  rocksdb::Env* const env_;
  const std::shared_ptr<rocksdb::Statistics> statistics_;
  const std::shared_ptr<rocksdb::Cache> block_cache_;
  const std::unique_ptr<AckJournal> journal_;  // Null: none.
  std::vector<std::string> lost_rows_;         // Changes only before the database is used.
  bool log_is_whole_ = false;                  // As lost_rows_.
  std::atomic<bool> log_is_trusted_{false};    // Writes are noted.

  mutable absl::Mutex db_mu_;  // Shared: using the database. Exclusive: opening and closing it.
  std::unique_ptr<rocksdb::DB> db_ ABSL_GUARDED_BY(db_mu_);
  std::vector<rocksdb::ColumnFamilyHandle*> families_ ABSL_GUARDED_BY(db_mu_);  // Owned by RocksDB until closed.
  uint64_t opening_ ABSL_GUARDED_BY(db_mu_) = 0;

  std::atomic<bool> stopped_{false};  // A write failed and none has succeeded since.
  absl::Mutex resume_mu_;             // One resumes, the others are refused meanwhile.
  absl::Time last_resume_ ABSL_GUARDED_BY(resume_mu_) = absl::InfinitePast();
  mutable absl::Mutex error_mu_;
  absl::Status error_ ABSL_GUARDED_BY(error_mu_);  // Why it stopped.

  std::atomic<bool> has_buffered_{false};  // Since the last fsync of the log began.
  std::atomic<bool> closing_{false};
  std::atomic<bool> cancel_reclaim_{false};  // The database is to be closed, or opened again.

  std::atomic<uint64_t> synced_writes_{0};
  std::atomic<uint64_t> counted_syncs_{0};
  prometheus::Histogram& commit_seconds_;
  prometheus::Counter& commits_total_;
  prometheus::Counter& wal_syncs_total_;
  prometheus::Counter& no_space_total_;
  prometheus::Counter& io_errors_total_;
  prometheus::Counter& corruptions_total_;
  prometheus::Counter& resumes_total_;
  prometheus::Counter& reclaimed_bytes_total_;
  prometheus::Gauge& writable_;
};

}  // namespace rwkv::state_store
