// Reading and writing the catalog's rows: what RocksdbCatalog and BranchTree are made of.
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
#include "google/protobuf/message_lite.h"
#include "rocksdb/db.h"
#include "rocksdb/iterator.h"
#include "rocksdb/snapshot.h"
#include "rocksdb/write_batch.h"
#include "rwkv/v1/state_store.pb.h"
#include "services/state_store/catalog/rocksdb/keys.h"
#include "services/state_store/catalog/rocksdb/rows.pb.h"
#include "services/state_store/rocksdb/database.h"

namespace rwkv::state_store {

// The part of a branch that a session uses: tokens [begin, end), snapshots at positions in (begin, end].
struct Link {
  uint64_t branch = 0;
  uint64_t begin = 0;
  uint64_t end = 0;
};

struct SnapshotAt {
  uint64_t position = 0;
  v1::SnapshotManifest manifest;
};

// The catalog's rows at a moment. Holds the right to read the database, so it is short-lived. Not thread-safe.
class View {
 public:
  enum class At {
    kLatest,  // Each read sees what is newest: for one who holds the locks of what it reads.
    kOnce,    // All reads see the moment of Open().
  };
  static absl::StatusOr<View> Open(Database& database, At at);
  // Latest, for an operation that has read before: kUnavailable if the database was reopened since `opening`.
  static absl::StatusOr<View> Reopen(Database& database, uint64_t opening);
  View(View&&) = default;
  View& operator=(View&&) = delete;

  // See Database::Access.
  uint64_t opening() const { return access_.opening(); }

  // Ends the view, to write what it led to.
  Database::Access Close() &&;

  // kDataLoss, here and below: a row that does not parse, or rows that contradict each other.
  absl::StatusOr<absl::optional<std::string>> Get(absl::string_view key) const;
  // False: no such row.
  absl::StatusOr<bool> Get(absl::string_view key, google::protobuf::MessageLite* row) const;
  // Rows with keys in [begin, end), ascending, until `visit` returns false.
  absl::Status Scan(
      absl::string_view begin, absl::string_view end,
      absl::FunctionRef<absl::StatusOr<bool>(absl::string_view key, absl::string_view value)> visit) const;
  // The same, descending.
  absl::Status ScanBack(
      absl::string_view begin, absl::string_view end,
      absl::FunctionRef<absl::StatusOr<bool>(absl::string_view key, absl::string_view value)> visit) const;

  // kNotFound, naming it.
  absl::StatusOr<SessionRow> Session(absl::string_view session_id) const;
  absl::StatusOr<BranchRow> Branch(uint64_t branch) const;
  // What the session's log is made of, newest part first. Never an empty part, except an empty head, and a root that is
  // forked at its base.
  absl::StatusOr<std::vector<Link>> Chain(const SessionRow& session) const;
  // Tokens [begin, end) of the log, which has them; with log-probabilities if asked, 0 where there are none.
  absl::StatusOr<LogChunk> ReadLog(const std::vector<Link>& chain, uint64_t begin, uint64_t end,
                                   bool with_logprobs) const;
  // What a session with a base_position begins with.
  absl::StatusOr<v1::SnapshotManifest> Base(const std::vector<Link>& chain) const;
  // Snapshots of a branch at positions in (after, last], ascending.
  absl::StatusOr<std::vector<SnapshotAt>> Snapshots(uint64_t branch, uint64_t after, uint64_t last) const;

  rocksdb::ColumnFamilyHandle* family() const { return access_.family(Family::kCatalog); }

 private:
  explicit View(Database::Access access) : access_(std::move(access)) {}

  rocksdb::ReadOptions Options() const;
  std::unique_ptr<rocksdb::Iterator> Iterate(const rocksdb::ReadOptions& options) const;

  Database::Access access_;
  std::unique_ptr<rocksdb::ManagedSnapshot> snapshot_;  // Goes before access_.
};

// A change that is being put together. Outlives its View.
class Edit {
 public:
  explicit Edit(const View& view) : family_(view.family()) {}

  void Put(absl::string_view key, absl::string_view value);
  void Put(absl::string_view key, const google::protobuf::MessageLite& row);
  void Delete(absl::string_view key);
  void DeleteRange(absl::string_view begin, absl::string_view end);

  bool empty() const { return batch_.Count() == 0; }
  rocksdb::WriteBatch& batch() { return batch_; }

 private:
  rocksdb::ColumnFamilyHandle* const family_;
  rocksdb::WriteBatch batch_;
};

}  // namespace rwkv::state_store
