// The whole state store in one process: RocksDB for both halves, and its chores.
#pragma once

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "rocksdb/env.h"
#include "services/common/clock.h"
#include "services/common/metrics.h"
#include "services/state_store/catalog/rocksdb/rocksdb_catalog.h"
#include "services/state_store/periodic.h"
#include "services/state_store/records/rocksdb/rocksdb_record_store.h"
#include "services/state_store/rocksdb/database.h"
#include "services/state_store/state_store.h"

namespace rwkv::state_store {

// Thread-safe.
class EmbeddedStateStore {
 public:
  struct Options {
    Database::Options database;
    RocksdbCatalog::Options catalog;
    StateStore::Options store;
    // Orphans are swept at start and then so often, sessions that are due are ended, and writing is tried again after a
    // failure. Zero: no chores, for tests that do them by hand.
    absl::Duration sweep_interval = absl::Minutes(10);
    absl::Duration session_sweep_interval = absl::Seconds(10);
    absl::Duration reclaim_interval = absl::Minutes(1);  // Of disk space, see Database::Reclaim.
    absl::Duration resume_check_interval = absl::Seconds(1);
  };
  // Errors as Database::Open; kInvalidArgument: an option; kDataLoss: the catalog is corrupt. Clock and metrics outlive
  // it.
  static absl::StatusOr<std::unique_ptr<EmbeddedStateStore>> Create(const Options& options, common::Clock* clock,
                                                                    common::Metrics* metrics);

  ~EmbeddedStateStore();

  StateStore& store() { return *store_; }
  Database& database() { return *database_; }

 private:
  EmbeddedStateStore() = default;

  // In the order of making; destroyed in reverse.
  std::unique_ptr<Database> database_;
  std::unique_ptr<RocksdbCatalog> catalog_;
  std::unique_ptr<RocksdbRecordStore> records_;
  std::unique_ptr<StateStore> store_;
  std::unique_ptr<Periodic> sweep_;
  std::unique_ptr<Periodic> session_sweep_;
  std::unique_ptr<Periodic> reclaim_;
  std::unique_ptr<Periodic> resume_;
};

}  // namespace rwkv::state_store
