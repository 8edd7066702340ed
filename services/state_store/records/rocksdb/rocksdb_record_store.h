// The embedded record store: one row a record, its bytes in RocksDB's blob files, or in a file of the snapshot if they
// are many (record_files.h). Laws: records/record_store.h.
//
// Rows, in two families under the key SNAPSHOT 0 LAYER: kRecordInfos has length, CRC32C, time and, of a large record,
// where it begins in the file, so that checking and sweeping read no states; kRecords has the bytes of a small one.
// Both are written in one batch, so neither is there without the other. The row of a large one is written behind its
// bytes, and made durable behind them.
#pragma once

#include <atomic>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "services/common/clock.h"
#include "services/common/metrics.h"
#include "services/state_store/key_locks.h"
#include "services/state_store/records/record_store.h"
#include "services/state_store/records/rocksdb/record_files.h"
#include "services/state_store/rocksdb/database.h"

namespace rwkv::state_store {

class RocksdbRecordStore final : public RecordStore {
 public:
  // Records from here on are in files. Smaller ones share fsyncs better in the log of the database.
  static constexpr size_t kFileBytes = 128 << 10;

  // Adds up what is there, which reads every record's info, and removes files that belong to none. All three outlive
  // the store.
  static absl::StatusOr<std::unique_ptr<RocksdbRecordStore>> Create(Database* database, common::Clock* clock,
                                                                    common::Metrics* metrics);

  absl::Status Put(const v1::RecordInfo& info, absl::Span<const char> data) override;
  absl::Status Read(const v1::RecordInfo& info, absl::Span<char> to) override;
  absl::Status Check(const v1::RecordInfo& info) override;
  absl::Status MakeDurable() override;
  absl::Status Delete(const std::string& snapshot_id) override;
  absl::Status ForEach(absl::FunctionRef<void(const Stored&)> visit) override;
  int64_t bytes() const override { return bytes_.load(std::memory_order_relaxed); }

 private:
  RocksdbRecordStore(Database* database, common::Clock* clock, common::Metrics* metrics);

  void CountBytes(int64_t delta);
  // Counts and returns kDataLoss.
  absl::Status Corrupt(const v1::RecordInfo& info, const std::string& what);

  // The record's bytes, unchecked.
  absl::Status Load(const v1::RecordInfo& info, absl::Span<char> to);

  Database* const database_;
  std::unique_ptr<RecordFiles> files_;
  common::Clock* const clock_;
  KeyLocks snapshot_locks_;  // Held to change the records of a snapshot.
  std::atomic<int64_t> bytes_{0};
  prometheus::Gauge& bytes_gauge_;
  prometheus::Counter& written_bytes_total_;
  prometheus::Counter& read_bytes_total_;
  prometheus::Counter& corrupt_total_;
};

}  // namespace rwkv::state_store
