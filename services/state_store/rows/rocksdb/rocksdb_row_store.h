// Rows in the embedded database. Locks are those of this process, which is the only one that has the database open.
// Laws: rows/row_store.h. Transactions that commit at the same time share one fsync.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "services/state_store/key_locks.h"
#include "services/state_store/rocksdb/database.h"
#include "services/state_store/rows/row_store.h"

namespace rwkv::state_store {

class RocksdbRowStore final : public RowStore {
 public:
  // The row that holds the first id that is not reserved.
  static constexpr char kNextIdKey[] = "next_id";

  // The database outlives the store.
  explicit RocksdbRowStore(Database* database) : database_(database) {}

  absl::StatusOr<std::unique_ptr<RowTransaction>> Begin(const std::vector<std::string>& locks) override;
  absl::StatusOr<std::unique_ptr<RowReader>> Read() override;
  bool shared() const override { return false; }

 private:
  class Reader;
  class Transaction;

  absl::StatusOr<uint64_t> NextId() ABSL_LOCKS_EXCLUDED(id_mu_);
  absl::Status ReserveIds() ABSL_EXCLUSIVE_LOCKS_REQUIRED(id_mu_);

  Database* const database_;
  KeyLocks locks_;
  absl::Mutex id_mu_;
  uint64_t next_id_ ABSL_GUARDED_BY(id_mu_) = 0;
  uint64_t reserved_ids_end_ ABSL_GUARDED_BY(id_mu_) = 0;  // Below this may be given out; durable.
};

}  // namespace rwkv::state_store
