#include "services/state_store/offline/repair.h"

#include <filesystem>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "rocksdb/env.h"
#include "services/common/clock.h"
#include "services/common/metrics.h"
#include "services/state_store/catalog/keys.h"
#include "services/state_store/embedded_state_store.h"
#include "services/state_store/offline/scratch.h"
#include "services/state_store/offline/survey.h"
#include "services/state_store/rocksdb/database.h"
#include "services/state_store/rocksdb/directories.h"
#include "services/state_store/rocksdb/kept_tables.h"
#include "services/state_store/rows/rocksdb/rocksdb_row_store.h"
#include "services/state_store/rows/sealed_value.h"

namespace rwkv::state_store {
namespace {

namespace fs = std::filesystem;

constexpr int kBatchRows = 1000;

void Report(const Survey& survey, const Say& say) {
  if (!survey.opening.empty()) say(absl::StrCat("does not start: ", survey.opening));
  say(absl::StrCat(survey.sessions.size(), " sessions, ", survey.tokens, " tokens, ", survey.snapshots, " snapshots, ",
                   survey.records, " records"));
  if (survey.kept_rows > 0) {
    say(absl::StrCat(survey.kept_rows, " changes of rows are from tables that the list of files does not name"));
  }
  if (survey.unreadable_rows > 0) say(absl::StrCat(survey.unreadable_rows, " rows are damaged"));
  for (const Gap& gap : survey.gaps) {
    say(absl::StrCat("blocks of rows cannot be read, between ",
                     gap.after.empty() ? "the first one" : PrintableKey(gap.after), " and ",
                     gap.before.empty() ? "the last one" : PrintableKey(gap.before),
                     ": sessions that were in them alone are lost, and not known"));
  }
  if (survey.unreadable_tables > 0) {
    say(absl::StrCat(survey.unreadable_tables,
                     " files of rows cannot be read at all: sessions that were in them alone are lost, and not known"));
  }
  if (survey.bad_records > 0) say(absl::StrCat(survey.bad_records, " records are damaged or missing"));
  for (const auto& [id, why] : survey.damaged) say(absl::StrCat("lost: session ", id, ": ", why));
  for (const auto& [id, why] : survey.regressed) say(absl::StrCat("older than acknowledged: session ", id, ": ", why));
  for (const auto& [id, why] : survey.stateless) say(absl::StrCat("slower: session ", id, ": ", why));
  for (const auto& [tenant, why] : survey.usage) say(absl::StrCat("what tenant ", tenant, " has used: ", why));
}

// Puts rows in transactions of bounded size.
absl::Status PutRows(RowStore& store, const std::map<std::string, std::string>& rows) {
  for (auto row = rows.begin(); row != rows.end();) {
    RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<RowTransaction> edit, store.Begin({}));
    for (int i = 0; i < kBatchRows && row != rows.end(); ++i, ++row) edit->Put(row->first, row->second);
    RWKV_RETURN_IF_ERROR(edit->Commit());
  }
  return absl::OkStatus();
}

absl::Status Rename(const fs::path& from, const fs::path& to) {
  std::error_code failed;
  fs::rename(from, to, failed);
  if (!failed) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("cannot move ", from.string(), ": ", failed.message()));
}

absl::Status Sync(const std::string& folder) { return SyncDirectory(*rocksdb::Env::Default(), folder); }

// Where CURRENT is not, there is no database: it is the first to leave and the last to come.
absl::Status MoveCurrent(const std::string& from, const std::string& to) {
  if (!fs::exists(from + "/CURRENT")) return absl::OkStatus();
  RWKV_RETURN_IF_ERROR(Rename(from + "/CURRENT", to + "/CURRENT"));
  RWKV_RETURN_IF_ERROR(Sync(to));
  return Sync(from);
}

// A database's other files.
absl::Status MoveFiles(const std::string& from, const std::string& to) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(from)) {
    const std::string name = entry.path().filename().string();
    if (entry.is_regular_file() && name != "LOCK" && name != "CURRENT") names.push_back(name);
  }
  for (const std::string& name : names) RWKV_RETURN_IF_ERROR(Rename(fs::path(from) / name, fs::path(to) / name));
  RWKV_RETURN_IF_ERROR(Sync(to));
  return Sync(from);
}

// Puts what kRepairReady or kRepairMoving holds in the place of the damaged files, which go to a new folder, *aside. May
// be broken off anywhere and called again.
absl::Status PutInPlace(const std::string& data_dir, std::string* aside) {
  for (int n = 0; aside->empty() || fs::exists(*aside); ++n) *aside = absl::StrCat(data_dir, "/damaged-", n);
  const std::string ready = data_dir + kRepairReady, moving = data_dir + kRepairMoving;
  if (fs::exists(ready)) {
    RWKV_RETURN_IF_ERROR(MakeDirectories(*rocksdb::Env::Default(), *aside, "repair"));
    RWKV_RETURN_IF_ERROR(MoveCurrent(data_dir, *aside));
    RWKV_RETURN_IF_ERROR(MoveFiles(data_dir, *aside));
    if (fs::exists(data_dir + kKeptTables)) {
      RWKV_RETURN_IF_ERROR(Rename(data_dir + kKeptTables, *aside + kKeptTables));
    }
    RWKV_RETURN_IF_ERROR(Rename(ready, moving));
    RWKV_RETURN_IF_ERROR(Sync(data_dir));
  }
  RWKV_RETURN_IF_ERROR(MoveFiles(moving, data_dir));
  RWKV_RETURN_IF_ERROR(MoveCurrent(moving, data_dir));
  std::error_code ignored;
  fs::remove_all(moving, ignored);
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckStore(const std::string& data_dir, const Say& say) {
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<FolderLock> lock, FolderLock::Take(data_dir));
  RWKV_ASSIGN_OR_RETURN(const Survey survey, SurveyStore(data_dir));
  Report(survey, say);
  if (survey.healthy()) {
    say("all of it is whole");
    return absl::OkStatus();
  }
  return absl::DataLossError(absl::StrCat(survey.damaged.size(), " sessions are lost, ", survey.regressed.size(),
                                          " are older than acknowledged, ", survey.stateless.size(),
                                          " lost states that are made anew"));
}

absl::Status RepairStore(const std::string& data_dir, const Say& say) {
  // To its end: a supervisor that starts the store anew would have the files taken from under it.
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<FolderLock> lock, FolderLock::Take(data_dir));
  std::string aside;
  if (IsRepairBrokenOff(data_dir)) {
    RWKV_RETURN_IF_ERROR(PutInPlace(data_dir, &aside));
    say("ended a repair that was broken off: what was saved then is in place");
  }
  RWKV_ASSIGN_OR_RETURN(const Survey survey, SurveyStore(data_dir));
  Report(survey, say);
  if (survey.opening.empty() && survey.unreadable_rows == 0 && survey.gaps.empty() && survey.damaged.empty() &&
      survey.regressed.empty() && survey.lost_snapshots.empty()) {
    say("nothing to repair: the store starts, and drops states that are damaged by itself");
    return absl::OkStatus();
  }
  std::map<std::string, std::string> rows = SurvivingRows(survey);
  AppendNumber(rows[RocksdbRowStore::kNextIdKey], survey.next_id);
  const std::string fresh = data_dir + "/.repaired";
  std::error_code ignored;
  // And what a repair left that was broken off before it changed anything.
  for (const std::string& left : {fresh, data_dir + kRepairReady, data_dir + kRepairMoving}) {
    fs::remove_all(left, ignored);
  }
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<common::Metrics> metrics, common::Metrics::Create(""));
  {
    Database::Options options;
    options.data_dir = fresh;
    RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<Database> database, Database::Open(options, metrics.get()));
    RocksdbRowStore store(database.get());
    RWKV_RETURN_IF_ERROR(PutRows(store, rows));
  }
  RWKV_RETURN_IF_ERROR(Sync(fresh));
  RWKV_RETURN_IF_ERROR(Rename(fresh, data_dir + kRepairReady));
  RWKV_RETURN_IF_ERROR(Sync(data_dir));
  RWKV_RETURN_IF_ERROR(PutInPlace(data_dir, &aside));
  say(absl::StrCat(survey.sessions.size() - survey.damaged.size(), " sessions saved, ", survey.damaged.size(), " lost",
                   survey.unreadable_tables > 0 || !survey.gaps.empty() ? " and maybe others that are not known" : "",
                   "; the damaged files are in ", aside));
  return absl::OkStatus();
}

absl::Status MoveStore(const std::string& data_dir, const SharedStateStore::Options& to, const Say& say) {
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<common::Metrics> metrics, common::Metrics::Create(""));
  common::SystemClock clock;
  EmbeddedStateStore::Options from_options;
  from_options.database.data_dir = data_dir;
  from_options.sweep_interval = from_options.session_sweep_interval = absl::ZeroDuration();
  from_options.reclaim_interval = from_options.resume_check_interval = absl::ZeroDuration();
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<EmbeddedStateStore> from,
                        EmbeddedStateStore::Create(from_options, &clock, metrics.get()));
  SharedStateStore::Options to_options = to;
  to_options.sweep_interval = to_options.session_sweep_interval = to_options.recount_interval = absl::ZeroDuration();
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<common::Metrics> to_metrics, common::Metrics::Create(""));
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<SharedStateStore> target,
                        SharedStateStore::Create(to_options, &clock, to_metrics.get()));
  if (target->store().catalog().counts().sessions > 0) {
    return absl::FailedPreconditionError(absl::StrCat("the catalog in ", to.catalog.url, " holds ",
                                                      target->store().catalog().counts().sessions,
                                                      " sessions already; move to an empty one"));
  }
  std::map<std::string, std::string> batch;
  int64_t rows = 0, records = 0, bytes = 0;
  uint64_t next_id = 1;
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<RowReader> reader, from->rows().Read());
  // States first: a manifest that is there has its records. Rows of sessions last of all, so that a move that was broken
  // off leaves no session.
  RWKV_RETURN_IF_ERROR(
      reader->Scan("", "\x7f", [&](absl::string_view key, absl::string_view value) -> absl::StatusOr<bool> {
        if (key == RocksdbRowStore::kNextIdKey) next_id = value.size() == 8 ? NumberAt(value, 0) : next_id;
        v1::SnapshotManifest manifest;
        if ((key[0] != 'p' && key[0] != 'm') ||
            !manifest.ParseFromArray(value.data(), static_cast<int>(value.size()))) {
          return true;
        }
        for (const v1::RecordInfo& info : manifest.records()) {
          const absl::StatusOr<std::string> data = from->store().records().Get(info);
          if (absl::IsDataLoss(data.status()) || absl::IsNotFound(data.status())) {
            say(absl::StrCat("left out: ", data.status().message()));
            continue;
          }
          RWKV_RETURN_IF_ERROR(data.status());
          RWKV_RETURN_IF_ERROR(target->store().records().Put(info, *data));
          ++records;
          bytes += static_cast<int64_t>(data->size());
        }
        return true;
      }));
  RWKV_RETURN_IF_ERROR(target->RaiseNextId(next_id));
  for (const bool sessions : {false, true}) {
    RWKV_RETURN_IF_ERROR(
        reader->Scan("", "\x7f", [&](absl::string_view key, absl::string_view value) -> absl::StatusOr<bool> {
          if (key == RocksdbRowStore::kNextIdKey || key[0] == '!' || (key[0] == 's') != sessions) return true;
          if (IsCacheKey(key)) return true;
          batch[std::string(key)] = std::string(value);
          ++rows;
          if (batch.size() < kBatchRows) return true;
          RWKV_RETURN_IF_ERROR(PutRows(target->rows(), batch));
          batch.clear();
          return true;
        }));
    RWKV_RETURN_IF_ERROR(PutRows(target->rows(), batch));
    batch.clear();
  }
  say(absl::StrCat(from->store().catalog().counts().sessions, " sessions moved: ", rows, " rows, ", records,
                   " records of ", bytes, " bytes; ", data_dir, " is as it was, and not to be served any more"));
  return absl::OkStatus();
}

}  // namespace rwkv::state_store
