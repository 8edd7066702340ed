// What the database has acknowledged since its files last held everything, so that damage to its write-ahead log is
// noticed: RocksDB takes a log that was cut, or that lost its middle, for one that simply ends there.
//
//   before a write: intent, the keys and the checksums of their new values ──► write-ahead log, fsync ──► acknowledged
//
// The journal is never fsynced: it need only outlive this process, since what a crash of the machine leaves of the log
// is what was fsynced. After another boot of the machine it may lag behind the log, and then it says nothing.
// It begins anew, in a file of the next number, whenever all families have been flushed; its head then says how the
// list of the database's files (MANIFEST) was. What has been added to that since is noted now and then: RocksDB takes a
// list that was cut for a shorter one, and deletes the files that are not in it.
//
// Of rows that are many and that others know of, it notes how many writes there have been (RocksDB's sequence number)
// instead of their keys: a log that has fewer was cut.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/optional.h"
#include "rocksdb/env.h"

namespace rwkv::state_store {

// One change of one row, or of a range of them.
struct JournalEdit {
  enum class Kind : uint8_t { kPut = 1, kDelete = 2, kDeleteRange = 3 };
  Kind kind = Kind::kPut;
  std::string key;    // Of a range its begin.
  std::string end;    // Of a range.
  uint32_t seal = 0;  // Of a put: the checksum that the value ends with.
};

// What a stopped database's journal says.
struct AcknowledgedRows {
  struct Row {
    absl::optional<uint32_t> acknowledged;       // The checksum; unset: deleted.
    std::set<absl::optional<uint32_t>> allowed;  // What writes after that, not acknowledged, may have made of it.
  };
  std::map<std::string, Row> rows;
  // Ranges that were deleted: a row in one of which `rows` says nothing is gone.
  std::vector<std::pair<std::string, std::string>> deleted;
  // Ranges that may have been deleted without being acknowledged.
  std::vector<std::pair<std::string, std::string>> maybe_deleted;
  bool damaged = false;  // It is not whole: rows may be missing from it.

  // Whether a row that is stored so (unset: not there) is as acknowledged.
  bool Agrees(const std::string& key, absl::optional<uint32_t> stored) const;
};

// Thread-safe.
class AckJournal {
 public:
  // In the database's folder. Borrows env.
  AckJournal(rocksdb::Env* env, std::string directory);

  // Before the database is opened: kDataLoss if its list of files is not what the journal saw, or is gone. The message
  // begins with `name`.
  absl::Status CheckFiles(const std::string& name) const;
  // What was acknowledged according to all journals there are; nothing after another boot.
  AcknowledgedRows Read() const;

  // Begins anew. The former files stay until DropOlder().
  absl::Status Rotate() ABSL_LOCKS_EXCLUDED(mu_);
  // Once all that older files speak of is in the database's own files. That they are gone outlives a crash.
  void DropOlder() ABSL_LOCKS_EXCLUDED(mu_);

  // Returns the intent's number. An error: nothing may be written.
  absl::StatusOr<uint64_t> Intend(const std::vector<JournalEdit>& edits) ABSL_LOCKS_EXCLUDED(mu_);
  // The intent's write has happened.
  void Acknowledge(uint64_t intent) ABSL_LOCKS_EXCLUDED(mu_);
  // All writes up to that one have happened. `closed`: they are in the database's files, and nothing is in its log.
  void NoteWritten(uint64_t sequence, bool closed) ABSL_LOCKS_EXCLUDED(mu_);
  // What was noted last; unset: nothing that says anything about the log as it is now. After another boot of the machine
  // that is only what a database said that was closed.
  absl::optional<uint64_t> ReadWritten() const;

  // How the list of files is now, if it has grown.
  void NoteFiles() ABSL_LOCKS_EXCLUDED(mu_);

  uint64_t bytes() const ABSL_LOCKS_EXCLUDED(mu_);

 private:
  struct Head {
    std::string boot;
    std::string manifest;  // Its name.
    uint64_t manifest_bytes = 0;
    uint32_t manifest_crc32c = 0;
  };

  std::vector<uint64_t> Numbers() const;  // Of the files there are, ascending.
  std::string Path(uint64_t number) const;
  // The name of the list of files in use; empty: there is none.
  std::string Manifest() const;
  absl::Status Append(absl::string_view payload) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // `kind`: of the frame, kHead or kNote.
  absl::Status AppendHead(char kind) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status Open() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  rocksdb::Env* const env_;
  const std::string directory_;
  mutable absl::Mutex mu_;
  std::unique_ptr<rocksdb::WritableFile> file_ ABSL_GUARDED_BY(mu_);
  uint64_t number_ ABSL_GUARDED_BY(mu_) = 0;  // Of file_.
  uint64_t bytes_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t next_intent_ ABSL_GUARDED_BY(mu_) = 1;
  // The list of files as it was noted last.
  std::string noted_manifest_ ABSL_GUARDED_BY(mu_);
  uint64_t noted_bytes_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace rwkv::state_store
