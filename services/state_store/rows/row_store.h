// Rows by key, sorted, with transactions: all that the catalog's rules need of a database. One set of rules
// (catalog/row_catalog.h) stands on it, whatever the engine: rocksdb/ in this process, postgres/ for many.
//
// Laws of every engine:
// - A transaction holds the locks that it names until it ends. Two that name a common lock never overlap, in whatever
//   process they are. Whoever writes a row holds a lock that everybody who decides by that row holds too; thus changes
//   are serialisable.
// - All of a transaction's changes happen at Commit(), or none; they are durable when it returns OK. After
//   kUnavailable or kDeadlineExceeded they may have happened; after any other error they have not.
// - Reads of a transaction see what was committed before it got its locks, and nothing of its own changes.
// - A value comes back as it was put, or the read is kDataLoss: each row is stored with a checksum over key and value.
//
// kResourceExhausted: the disk is full. kUnavailable: the storage is away, or a lock was not free in time. A RowStore is
// thread-safe; what it gives out is for one thread, and is gone before it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/optional.h"

namespace rwkv::state_store {

class RowReader {
 public:
  virtual ~RowReader() = default;
  // Unset: no such row.
  virtual absl::StatusOr<absl::optional<std::string>> Get(absl::string_view key) = 0;
  // Called for each row until it returns false or an error, which is then the scan's. It may Get().
  using Visit = absl::FunctionRef<absl::StatusOr<bool>(absl::string_view key, absl::string_view value)>;
  // Rows with keys in [begin, end), ascending.
  virtual absl::Status Scan(absl::string_view begin, absl::string_view end, Visit visit) = 0;
  // The same, descending.
  virtual absl::Status ScanBack(absl::string_view begin, absl::string_view end, Visit visit) = 0;
};

class RowTransaction : public RowReader {
 public:
  // More locks, to be held with those that are. A kind of lock that is extended by comes after all kinds that a
  // transaction begins with, so that no two wait for each other.
  virtual absl::Status Extend(const std::vector<std::string>& locks) = 0;
  // A number never given out before, larger than all that were.
  virtual absl::StatusOr<uint64_t> NextId() = 0;

  virtual void Put(absl::string_view key, absl::string_view value) = 0;
  virtual void Delete(absl::string_view key) = 0;
  virtual void DeleteRange(absl::string_view begin, absl::string_view end) = 0;
  // Whether there is nothing to commit.
  virtual bool empty() const = 0;

  // Once, and the last call. Locks are held until the transaction is destroyed.
  virtual absl::Status Commit() = 0;
};

class RowStore {
 public:
  virtual ~RowStore() = default;
  // Waits for the locks, for a bounded time.
  virtual absl::StatusOr<std::unique_ptr<RowTransaction>> Begin(const std::vector<std::string>& locks) = 0;
  // All reads see one moment, which is not before the call.
  virtual absl::StatusOr<std::unique_ptr<RowReader>> Read() = 0;
  // Whether other processes change these rows too: what this one has counted is then an estimate.
  virtual bool shared() const = 0;
};

}  // namespace rwkv::state_store
