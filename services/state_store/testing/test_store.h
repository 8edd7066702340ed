// An embedded state store in a folder of its own, with a clock that stands still and chores done by hand.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "rocksdb/env.h"
#include "rwkv/v1/state_store.pb.h"
#include "services/common/metrics.h"
#include "services/state_store/embedded_state_store.h"
#include "services/state_store/session_limits.h"
#include "services/state_store/shared_state_store.h"
#include "tests/testing/fake_clock.h"
#include "tests/testing/test_servers.h"

namespace rwkv::state_store {

inline constexpr char kTestModel[] = "0123456789abcdef0123456789abcdef";

// A new, empty folder of this test. The test's runner removes it.
std::string NewTestFolder();

// `seed` decides the bytes.
std::string TestRecordData(uint32_t seed, size_t bytes);
v1::RecordInfo TestRecordInfo(const std::string& snapshot_id, int layer, const std::string& data);

// Those that all tests of a process share. Abort the test if they do not start.
rwkv::testing::PostgresServer& SharedPostgres();
rwkv::testing::S3Server& SharedS3();

class TestStore {
 public:
  struct Options {
    std::string data_dir;         // Empty: a new folder.
    rocksdb::Env* env = nullptr;  // As Database::Options.
    int snapshots_per_branch = 8;
    SessionLimits::Options limits;
    int64_t prefix_cache_bytes = 1 << 20;
    // Over a PostgreSQL and an S3 that the process starts for all its tests, as a tenant of its own, instead of in a
    // folder. database() and what is made of it are then not to be used.
    bool shared = false;
    std::string tenant;  // Of a shared one; empty: a new one.
  };
  // Aborts the test if the store does not open.
  explicit TestStore(const Options& options);
  TestStore() : TestStore(Options()) {}

  // From the next Reopen() on.
  void SetPrefixCacheBytes(int64_t bytes) {
    options_.store.prefix_cache_bytes = shared_options_.store.prefix_cache_bytes = bytes;
  }

  // Closes and opens again, as a restart does. Clock and folder stay.
  absl::Status Reopen();

  StateStore& store() { return shared_ != nullptr ? shared_->store() : embedded_->store(); }
  Catalog& catalog() { return store().catalog(); }
  RecordStore& records() { return store().records(); }
  Database& database() { return embedded_->database(); }
  Database& records_database() { return embedded_->records_database(); }
  RowStore& rows() { return shared_ != nullptr ? shared_->rows() : embedded_->rows(); }
  absl::Status Reclaim() { return embedded_->Reclaim(); }
  testing::FakeClock& clock() { return clock_; }
  common::Metrics& metrics() { return *metrics_; }
  const std::string& tenant() const { return shared_options_.tenant; }
  const std::string& data_dir() const { return options_.database.data_dir; }

  // Short forms. A lease of holder "router-0", incarnation "1", for a minute.
  absl::StatusOr<v1::Lease> Acquire(const std::string& session_id);
  // Makes a session and takes its lease.
  absl::StatusOr<v1::Lease> Create(const std::string& session_id);
  // A finished turn: `prompt` and then `generated`.
  absl::Status AddTurn(const v1::Lease& lease, const std::string& request_id, const std::vector<uint32_t>& prompt,
                       const std::vector<uint32_t>& generated);
  // From where the log begins.
  absl::StatusOr<std::vector<uint32_t>> Tokens(const std::string& session_id);
  // Puts two small records and commits a snapshot at `position`, on the session's current branch.
  absl::Status AddSnapshot(const v1::Lease& lease, const std::string& snapshot_id, uint64_t position);
  // A session with two small records of a state at `position`; `token_ids`: all of the log up to there, or none.
  absl::StatusOr<v1::Session> Import(const std::string& session_id, const std::string& snapshot_id, uint64_t position,
                                     const std::vector<uint32_t>& token_ids, bool base);
  std::string LogBranch(const std::string& session_id);

  // Keys of the catalog's family, and of both record families. Without the row of the next id.
  std::vector<std::string> CatalogKeys();
  std::vector<std::string> RecordKeys();
  // All that the rows of the logs hold.
  int64_t LogTokens();

 private:
  // Puts the records of a snapshot.
  absl::StatusOr<v1::SnapshotManifest> PutSnapshot(const std::string& session_id, const std::string& snapshot_id,
                                                   uint64_t position);

  testing::FakeClock clock_;
  EmbeddedStateStore::Options options_;
  std::unique_ptr<common::Metrics> metrics_;
  SharedStateStore::Options shared_options_;
  bool is_shared_ = false;
  std::unique_ptr<EmbeddedStateStore> embedded_;  // One of the two.
  std::unique_ptr<SharedStateStore> shared_;
};

// One item of AppendTokens; log-probabilities are minus the token's id.
v1::AppendItem TestAppend(const v1::Lease& lease, const std::string& request_id, uint64_t expected_length,
                          const std::vector<uint32_t>& token_ids,
                          v1::FinishReason finish_reason = v1::FINISH_REASON_UNSPECIFIED);
absl::Status AppendOne(Catalog& catalog, const v1::AppendItem& item);

// Makes the rows of sessions those of a build that knew nothing of idle ones.
absl::Status RemoveIdleRows(RowStore& rows);

// What the rows of a catalog must satisfy among themselves: kInternal names the first that does not. Reads everything.
absl::Status CheckCatalogRows(RowStore& rows, int snapshots_per_branch);

}  // namespace rwkv::state_store
