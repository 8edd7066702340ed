#include "services/state_store/embedded_state_store.h"

#include "kernels/base/status_macros.h"
#include "services/common/logging.h"

namespace rwkv::state_store {

absl::StatusOr<std::unique_ptr<EmbeddedStateStore>> EmbeddedStateStore::Create(const Options& options,
                                                                               common::Clock* clock,
                                                                               common::Metrics* metrics) {
  RWKV_RETURN_IF_ERROR(SessionLimits::Check(options.store.limits));
  RocksdbCatalog::Options catalog_options = options.catalog;
  catalog_options.how_sessions_end = SessionLimits::HowSessionsEnd(options.store.limits);
  std::unique_ptr<EmbeddedStateStore> embedded(new EmbeddedStateStore());
  RWKV_ASSIGN_OR_RETURN(embedded->database_, Database::Open(options.database, metrics));
  Database* const database = embedded->database_.get();
  RWKV_ASSIGN_OR_RETURN(embedded->catalog_, RocksdbCatalog::Create(catalog_options, database, clock, metrics));
  RWKV_ASSIGN_OR_RETURN(embedded->records_, RocksdbRecordStore::Create(database, clock, metrics));
  embedded->store_ =
      std::make_unique<StateStore>(options.store, embedded->catalog_.get(), embedded->records_.get(), clock, metrics);
  if (options.sweep_interval > absl::ZeroDuration()) {
    embedded->sweep_ = std::make_unique<Periodic>(options.sweep_interval, [store = embedded->store_.get()] {
      if (const absl::Status status = store->SweepOrphans(); !status.ok()) {
        common::LogWarning("orphan_sweep_failed", {{"error", status}});
      }
    });
  }
  if (options.session_sweep_interval > absl::ZeroDuration()) {
    embedded->session_sweep_ =
        std::make_unique<Periodic>(options.session_sweep_interval, [store = embedded->store_.get()] {
          if (const absl::Status status = store->SweepSessions(); !status.ok()) {
            common::LogWarning("session_sweep_failed", {{"error", status}});
          }
        });
  }
  if (options.reclaim_interval > absl::ZeroDuration()) {
    embedded->reclaim_ = std::make_unique<Periodic>(options.reclaim_interval, [database] {
      if (const absl::Status status = database->Reclaim(); !status.ok() && !absl::IsCancelled(status)) {
        common::LogWarning("reclaim_failed", {{"error", status}});
      }
    });
  }
  if (options.resume_check_interval > absl::ZeroDuration()) {
    // Its result is in the logs and in rwkv_state_store_writable already.
    embedded->resume_ =
        std::make_unique<Periodic>(options.resume_check_interval, [database] { database->TryResume().IgnoreError(); });
  }
  const CatalogCounts counts = embedded->catalog_->counts();
  common::LogInfo("state_store_open", {{"data_dir", options.database.data_dir},
                                       {"sessions", counts.sessions},
                                       {"snapshots", counts.snapshots},
                                       {"leases", counts.leases},
                                       {"records_bytes", embedded->records_->bytes()}});
  return embedded;
}

EmbeddedStateStore::~EmbeddedStateStore() {
  if (database_ != nullptr) database_->CancelReclaim();
}

}  // namespace rwkv::state_store
