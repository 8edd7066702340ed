// Opening the records' database, whatever became of it: a state is a cache, so that what is damaged is left out, and
// no damage keeps a store from starting.
#pragma once

#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "services/common/metrics.h"
#include "services/state_store/rocksdb/database.h"

namespace rwkv::state_store {

struct OpenedRecords {
  std::unique_ptr<Database> database;
  bool rescued = false;  // It was damaged: rows may be missing.
};

// The database in DIR/records, where `options` is that of the catalog's in DIR. If it is damaged, what can be read of it
// goes to a new one, and the damaged files stay, as they were, in DIR/records.damaged-N. Errors: its files are in use,
// or cannot be made or written.
absl::StatusOr<OpenedRecords> OpenRecords(const Database::Options& options, common::Metrics* metrics);

// Moves the records that an older build kept in the catalog's database. Does nothing when there are none.
absl::Status MoveRecords(Database& from, Database& to);

}  // namespace rwkv::state_store
