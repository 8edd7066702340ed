// The bytes of large records: a file a snapshot, to which its records are appended. RocksDB would write each of them
// twice (log, then blob file) and check each with a slow CRC; a file takes them as fast as the disk does.
//
// They are written past the page cache, in whole blocks, where the file system can: a state is read back seldom, and by
// then the kernel would have copied it, written it behind our back and kept it in place of what is read.
//
// It knows offsets, not records: which bytes are a record is in the database (rocksdb_record_store.h). A file may hold
// more than that, after an append that failed.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"
#include "rocksdb/env.h"

namespace rwkv::state_store {

// Thread-safe, except that Append and Delete of one snapshot are called one at a time, and so is Sync, of one snapshot
// and of all.
class RecordFiles {
 public:
  // kUnavailable: the folder cannot be made. `env` outlives it.
  static absl::StatusOr<std::unique_ptr<RecordFiles>> Open(rocksdb::Env* env, const std::string& folder);

  // Where in the snapshot's file each of `records` is now; durable after a Sync() that begins later. One write: several
  // small ones, one after the other or at once, take the disk longer. Of records in places that follow each other, each of
  // whole blocks (record_memory.h), what is behind them in their last block is written, too; others are copied.
  absl::StatusOr<std::vector<uint64_t>> Append(const std::string& snapshot_id,
                                               absl::Span<const absl::Span<const char>> records);
  // Fills the first `bytes` of `to`; anything may be in the rest. kDataLoss: there is no such file, it is too short, or
  // cannot be read there.
  absl::Status Read(const std::string& snapshot_id, uint64_t offset, size_t bytes, absl::Span<char> to) const;
  // All that was appended before, and that the files are there. On an error nobody can tell what of the snapshots in
  // *lost is on the disk, now or after another Sync(): the kernel tells of a write that failed once.
  absl::Status Sync(std::vector<std::string>* lost) ABSL_LOCKS_EXCLUDED(mu_);
  // The same of one snapshot. Of several at once, or beside the other, on an error as much is lost.
  absl::Status Sync(const std::string& snapshot_id, std::vector<std::string>* lost) ABSL_LOCKS_EXCLUDED(mu_);
  // Whether that many snapshots wait for a Sync() that it is time for one.
  bool ManyUnsynced() const ABSL_LOCKS_EXCLUDED(mu_);
  // Whether the snapshot's file is at least so long.
  bool Holds(const std::string& snapshot_id, uint64_t bytes) const;
  // Fine if there is none.
  absl::Status Delete(const std::string& snapshot_id) ABSL_LOCKS_EXCLUDED(mu_);
  // The snapshots that have a file.
  absl::StatusOr<std::vector<std::string>> List() const;

 private:
  // Open for appending.
  struct File {
    absl::Mutex mu;  // Held to append and to sync.
    std::unique_ptr<rocksdb::WritableFile> file ABSL_GUARDED_BY(mu);
    bool direct ABSL_GUARDED_BY(mu) = false;  // Past the page cache.
    uint64_t bytes ABSL_GUARDED_BY(mu) = 0;
  };

  RecordFiles(rocksdb::Env* env, std::string folder) : env_(env), folder_(std::move(folder)) {}

  std::string Path(const std::string& snapshot_id) const { return folder_ + "/" + snapshot_id + ".record"; }
  using Files = std::map<std::string, std::shared_ptr<File>>;

  absl::StatusOr<std::shared_ptr<File>> OpenFile(const std::string& snapshot_id) ABSL_LOCKS_EXCLUDED(mu_);
  absl::Status Sync(const Files& files, std::vector<std::string>* lost);
  // At the end of the file, each record at a whole block of it, if it is written in blocks.
  static rocksdb::Status AppendTo(File& file, absl::Span<const absl::Span<const char>> records)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(file.mu);

  rocksdb::Env* const env_;
  const std::string folder_;
  mutable absl::Mutex mu_;
  Files files_ ABSL_GUARDED_BY(mu_);  // Since the last Sync().
};

}  // namespace rwkv::state_store
