// A state store process over one PostgreSQL and one bucket of S3, beside any number of others: nothing that matters is
// in the process, so any of them serves any session.
#pragma once

#include <memory>
#include <string>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "services/common/clock.h"
#include "services/common/metrics.h"
#include "services/common/periodic.h"
#include "services/state_store/catalog/row_catalog.h"
#include "services/state_store/records/s3/s3_client.h"
#include "services/state_store/records/s3/s3_record_store.h"
#include "services/state_store/rows/postgres/postgres_row_store.h"
#include "services/state_store/rows/tenant_rows.h"
#include "services/state_store/state_store.h"

namespace rwkv::state_store {

// Thread-safe.
class SharedStateStore {
 public:
  struct Options {
    PostgresPool::Options catalog;
    S3Client::Options records;
    std::string records_prefix;  // Of all objects; empty or ending in '/'.
    std::string tenant;          // Whose rows it serves; empty: those of nobody in particular.
    RowCatalog::Options rules;
    StateStore::Options store;
    // As EmbeddedStateStore has them. Zero: no chores.
    absl::Duration sweep_interval = absl::Minutes(10);
    absl::Duration session_sweep_interval = absl::Seconds(10);
    // What this process has counted is an estimate, since others change the rows too; it counts anew so often.
    absl::Duration recount_interval = absl::Minutes(5);
  };
  // "s3://BUCKET[/PREFIX]" into bucket and prefix. kInvalidArgument.
  static absl::Status ParseRecords(const std::string& url, Options* options);
  // Two lines: access key, secret key. kInvalidArgument: it is not that. kUnavailable: it cannot be read.
  static absl::Status ReadS3Credentials(const std::string& path, S3Client::Options* options);
  // One line. Errors likewise.
  static absl::StatusOr<std::string> ReadPassword(const std::string& path);

  // Errors as PostgresRowStore::Open, S3RecordStore::Create. Clock and metrics outlive it.
  static absl::StatusOr<std::unique_ptr<SharedStateStore>> Create(const Options& options, common::Clock* clock,
                                                                  common::Metrics* metrics);

  // The same, but waits, for as long as it takes, while PostgreSQL or S3 is away (kUnavailable). kCancelled: `stopped`
  // said true, which is asked often.
  static absl::StatusOr<std::unique_ptr<SharedStateStore>> CreateWhenReachable(const Options& options,
                                                                               common::Clock* clock,
                                                                               common::Metrics* metrics,
                                                                               absl::FunctionRef<bool()> stopped);

  StateStore& store() { return *store_; }
  RowStore& rows() { return *tenant_rows_; }
  // PostgresRowStore::RaiseNextId.
  absl::Status RaiseNextId(uint64_t at_least) { return rows_->RaiseNextId(at_least); }

 private:
  SharedStateStore() = default;

  // In the order of making; destroyed in reverse.
  std::unique_ptr<PostgresRowStore> rows_;
  std::unique_ptr<TenantRows> tenant_rows_;
  std::unique_ptr<RowCatalog> catalog_;
  std::unique_ptr<S3RecordStore> records_;
  std::unique_ptr<StateStore> store_;
  std::unique_ptr<common::Periodic> sweep_;
  std::unique_ptr<common::Periodic> session_sweep_;
  std::unique_ptr<common::Periodic> recount_;
};

}  // namespace rwkv::state_store
