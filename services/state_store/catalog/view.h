// Reading and writing the catalog's rows: what RowCatalog and BranchTree are made of.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/optional.h"
#include "google/protobuf/message_lite.h"
#include "rwkv/v1/state_store.pb.h"
#include "services/state_store/catalog/keys.h"
#include "services/state_store/catalog/rows.pb.h"
#include "services/state_store/rows/row_store.h"

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

// The catalog's rows as messages, read through a reader or transaction, which outlives it.
class View {
 public:
  explicit View(RowReader* rows) : rows_(rows) {}

  // kDataLoss, here and below: a row that does not parse, or rows that contradict each other.
  absl::StatusOr<absl::optional<std::string>> Get(absl::string_view key) const { return rows_->Get(key); }
  // False: no such row.
  absl::StatusOr<bool> Get(absl::string_view key, google::protobuf::MessageLite* row) const;
  absl::Status Scan(absl::string_view begin, absl::string_view end, RowReader::Visit visit) const {
    return rows_->Scan(begin, end, visit);
  }
  absl::Status ScanBack(absl::string_view begin, absl::string_view end, RowReader::Visit visit) const {
    return rows_->ScanBack(begin, end, visit);
  }

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

 private:
  RowReader* const rows_;
};

// The changes of a transaction, which outlives it.
class Edit {
 public:
  explicit Edit(RowTransaction* rows) : rows_(rows) {}

  void Put(absl::string_view key, absl::string_view value) { rows_->Put(key, value); }
  void Put(absl::string_view key, const google::protobuf::MessageLite& row) {
    rows_->Put(key, row.SerializeAsString());
  }
  void Delete(absl::string_view key) { rows_->Delete(key); }
  void DeleteRange(absl::string_view begin, absl::string_view end) { rows_->DeleteRange(begin, end); }

 private:
  RowTransaction* const rows_;
};

}  // namespace rwkv::state_store
