#include "services/state_store/embedded_state_store.h"

#include <algorithm>
#include <cstdint>
#include <set>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "kernels/base/status_macros.h"
#include "services/common/logging.h"
#include "services/state_store/catalog/lost_rows.h"
#include "services/state_store/records/rocksdb/open_records.h"

namespace rwkv::state_store {
namespace {

// A database that is damaged does not heal by being started again, so that whoever reads the message needs to know what
// does help.
absl::Status NameTheRemedy(const absl::Status& status, const EmbeddedStateStore::Options& options) {
  if (!absl::IsDataLoss(status)) return status;
  const std::string& directory = options.database.data_dir;
  return absl::DataLossError(absl::StrCat(status.message(), "; `rwkvctl store check ", directory,
                                          "` says which sessions are touched, `rwkvctl store repair ", directory,
                                          "` saves the others"));
}

// kDataLoss: acknowledged changes are missing.
absl::Status LossError(const Database& database) {
  const int64_t lost = CountLoss(database.lost_rows());
  if (lost == 0) return absl::OkStatus();
  return absl::DataLossError(absl::StrCat(database.name(), ": its write-ahead log was cut or damaged: ", lost,
                                          " acknowledged rows are missing or old, of ",
                                          SessionNames(LostSessions(database.lost_rows()))));
}

}  // namespace

absl::StatusOr<std::unique_ptr<RowCatalog>> StartCatalog(const RowCatalog::Options& options, const Database& database,
                                                         RowStore* rows, common::Clock* clock,
                                                         common::Metrics* metrics) {
  RWKV_RETURN_IF_ERROR(LossError(database));
  return RowCatalog::Create(options, rows, clock, metrics);
}

absl::StatusOr<std::unique_ptr<EmbeddedStateStore>> EmbeddedStateStore::Create(const Options& options,
                                                                               common::Clock* clock,
                                                                               common::Metrics* metrics) {
  RWKV_RETURN_IF_ERROR(SessionLimits::Check(options.store.limits));
  RowCatalog::Options catalog_options = options.catalog;
  catalog_options.how_sessions_end = SessionLimits::HowSessionsEnd(options.store.limits);
  std::unique_ptr<EmbeddedStateStore> embedded(new EmbeddedStateStore());
  RWKV_RETURN_IF_ERROR(NameTheRemedy(embedded->OpenCatalog(catalog_options, options, clock, metrics), options));
  RWKV_ASSIGN_OR_RETURN(OpenedRecords opened, OpenRecords(options.database, metrics));
  Database* const records_database = opened.database.get();
  embedded->records_database_ = std::move(opened.database);
  RWKV_RETURN_IF_ERROR(MoveRecords(*embedded->database_, *records_database));
  RocksdbRecordStore::Committed committed;
  // A log that was cut may have lost rows of any snapshot, and so may a crash of the machine of large records.
  committed.check_all = opened.rescued || !records_database->log_is_whole();
  committed.find = [catalog = embedded->catalog_.get()](const std::string& id) { return catalog->FindManifest(id); };
  RWKV_ASSIGN_OR_RETURN(embedded->records_, RocksdbRecordStore::Create(records_database, clock, metrics, committed));
  if (committed.check_all || !embedded->records_->files_were_whole()) embedded->NameLostStates();
  records_database->TrustLog();
  embedded->store_ =
      std::make_unique<StateStore>(options.store, embedded->catalog_.get(), embedded->records_.get(), clock, metrics);
  if (options.sweep_interval > absl::ZeroDuration()) {
    embedded->sweep_ = std::make_unique<common::Periodic>(options.sweep_interval, [store = embedded->store_.get()] {
      if (const absl::Status status = store->SweepOrphans(); !status.ok()) {
        common::LogWarning("orphan_sweep_failed", {{"error", status}});
      }
    });
  }
  if (options.session_sweep_interval > absl::ZeroDuration()) {
    embedded->session_sweep_ =
        std::make_unique<common::Periodic>(options.session_sweep_interval, [store = embedded->store_.get()] {
          if (const absl::Status status = store->SweepSessions(); !status.ok()) {
            common::LogWarning("session_sweep_failed", {{"error", status}});
          }
        });
  }
  if (options.reclaim_interval > absl::ZeroDuration()) {
    embedded->reclaim_ = std::make_unique<common::Periodic>(options.reclaim_interval, [store = embedded.get()] {
      if (const absl::Status status = store->Reclaim(); !status.ok() && !absl::IsCancelled(status)) {
        common::LogWarning("reclaim_failed", {{"error", status}});
      }
    });
  }
  if (options.resume_check_interval > absl::ZeroDuration()) {
    // Its result is in the logs and in rwkv_state_store_writable already.
    embedded->resume_ = std::make_unique<common::Periodic>(options.resume_check_interval, [store = embedded.get()] {
      for (Database* const database : {store->records_database_.get(), store->database_.get()}) {
        if (!database->TryResume().ok()) continue;
        database->SyncBuffered().IgnoreError();  // As above.
        if (const absl::Status status = database->TrimJournal(); !status.ok()) {
          common::LogWarning("journal_trim_failed", {{"data_dir", database->data_dir()}, {"error", status}});
        }
      }
    });
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
  for (Database* const database : {database_.get(), records_database_.get()}) {
    if (database != nullptr) database->CancelReclaim();
  }
}

absl::Status EmbeddedStateStore::OpenCatalog(const RowCatalog::Options& catalog_options, const Options& options,
                                             common::Clock* clock, common::Metrics* metrics) {
  RWKV_ASSIGN_OR_RETURN(database_, Database::Open(options.database, metrics));
  rows_ = std::make_unique<RocksdbRowStore>(database_.get());
  RWKV_ASSIGN_OR_RETURN(catalog_, StartCatalog(catalog_options, *database_, rows_.get(), clock, metrics));
  return absl::OkStatus();
}

void EmbeddedStateStore::NameLostStates() {
  std::set<std::string> sessions;
  int64_t snapshots = 0, lost = 0;
  const auto look = [&](absl::string_view, absl::string_view value) -> absl::StatusOr<bool> {
    v1::SnapshotManifest manifest;
    if (!manifest.ParseFromArray(value.data(), static_cast<int>(value.size()))) return true;
    ++snapshots;
    const bool whole = records_->HoldsAll(manifest).value_or(false);
    lost += whole ? 0 : 1;
    if (!whole) sessions.insert(manifest.session_id());
    return true;
  };
  absl::Status status;
  if (const auto reader = rows_->Read(); reader.ok()) {
    for (const char kind : {'m', 'p'}) {  // Bases and snapshots: catalog/keys.h.
      status.Update((*reader)->Scan(std::string(1, kind), std::string(1, static_cast<char>(kind + 1)), look));
    }
  } else {
    status = reader.status();
  }
  if (lost == 0 && status.ok()) return;
  common::LogWarning("states_lost", {{"snapshots", snapshots},
                                     {"lost", lost},
                                     {"of", SessionNames(sessions)},
                                     {"then", "made anew from the logs; an import without its log is lost"},
                                     {"error", status}});
}

absl::Status EmbeddedStateStore::Reclaim() {
  const absl::Status status = records_database_->Reclaim();
  RWKV_RETURN_IF_ERROR(database_->Reclaim());
  return status;
}

}  // namespace rwkv::state_store
