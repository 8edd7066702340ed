// The whole state store in one process: RocksDB for both halves, and its chores.
//
//   DIR           the catalog's database, which nothing may be lost of: if it is damaged, the store does not start
//   DIR/records   the states' database. States are caches: if it is damaged, what cannot be read is left out
#pragma once

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "rocksdb/env.h"
#include "services/common/clock.h"
#include "services/common/metrics.h"
#include "services/common/periodic.h"
#include "services/state_store/catalog/row_catalog.h"
#include "services/state_store/records/rocksdb/rocksdb_record_store.h"
#include "services/state_store/rocksdb/database.h"
#include "services/state_store/rows/rocksdb/rocksdb_row_store.h"
#include "services/state_store/state_store.h"

namespace rwkv::state_store {

// The catalog of a database that is open, whose rows are `rows`, as the store opens it at its start. kDataLoss: it is
// damaged, or acknowledged changes are missing. All but `options` outlive it.
absl::StatusOr<std::unique_ptr<RowCatalog>> StartCatalog(const RowCatalog::Options& options, const Database& database,
                                                         RowStore* rows, common::Clock* clock,
                                                         common::Metrics* metrics);

// Thread-safe.
class EmbeddedStateStore {
 public:
  struct Options {
    Database::Options database;
    RowCatalog::Options catalog;
    StateStore::Options store;
    // Orphans are swept at start and then so often, sessions that are due are ended, and writing is tried again after a
    // failure. Zero: no chores, for tests that do them by hand.
    absl::Duration sweep_interval = absl::Minutes(10);
    absl::Duration session_sweep_interval = absl::Seconds(10);
    absl::Duration reclaim_interval = absl::Minutes(1);  // Of disk space, see Database::Reclaim.
    absl::Duration resume_check_interval = absl::Seconds(1);
  };
  // Errors as Database::Open; kInvalidArgument: an option; kDataLoss: the catalog is damaged, or acknowledged
  // changes are missing; the message names the command that helps. Clock and metrics outlive
  // it.
  static absl::StatusOr<std::unique_ptr<EmbeddedStateStore>> Create(const Options& options, common::Clock* clock,
                                                                    common::Metrics* metrics);

  ~EmbeddedStateStore();

  StateStore& store() { return *store_; }
  RowStore& rows() { return *rows_; }
  Database& database() { return *database_; }
  Database& records_database() { return *records_database_; }
  // Database::Reclaim of both.
  absl::Status Reclaim();

 private:
  EmbeddedStateStore() = default;

  absl::Status OpenCatalog(const RowCatalog::Options& catalog_options, const Options& options, common::Clock* clock,
                           common::Metrics* metrics);
  // In the log: the sessions whose snapshots have records that are not there.
  void NameLostStates();

  // In the order of making; destroyed in reverse.
  std::unique_ptr<Database> database_;
  std::unique_ptr<Database> records_database_;
  std::unique_ptr<RocksdbRowStore> rows_;
  std::unique_ptr<RowCatalog> catalog_;
  std::unique_ptr<RocksdbRecordStore> records_;
  std::unique_ptr<StateStore> store_;
  std::unique_ptr<common::Periodic> sweep_;
  std::unique_ptr<common::Periodic> session_sweep_;
  std::unique_ptr<common::Periodic> reclaim_;
  std::unique_ptr<common::Periodic> resume_;
};

}  // namespace rwkv::state_store
