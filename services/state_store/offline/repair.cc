#include "services/state_store/offline/repair.h"

#include <filesystem>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "services/common/clock.h"
#include "services/common/metrics.h"
#include "services/state_store/catalog/keys.h"
#include "services/state_store/embedded_state_store.h"
#include "services/state_store/offline/survey.h"
#include "services/state_store/rocksdb/database.h"
#include "services/state_store/rows/rocksdb/rocksdb_row_store.h"

namespace rwkv::state_store {
namespace {

namespace fs = std::filesystem;

constexpr int kBatchRows = 1000;

void Report(const Survey& survey, const Say& say) {
  if (!survey.opening.empty()) say(absl::StrCat("does not start: ", survey.opening));
  say(absl::StrCat(survey.sessions.size(), " sessions, ", survey.tokens, " tokens, ", survey.snapshots, " snapshots, ",
                   survey.records, " records"));
  if (survey.unreadable_rows > 0) say(absl::StrCat(survey.unreadable_rows, " rows or blocks of them are damaged"));
  if (survey.bad_records > 0) say(absl::StrCat(survey.bad_records, " records are damaged or missing"));
  for (const auto& [id, why] : survey.damaged) say(absl::StrCat("lost: session ", id, ": ", why));
  for (const auto& [id, why] : survey.regressed) say(absl::StrCat("older than acknowledged: session ", id, ": ", why));
  for (const auto& [id, why] : survey.stateless) say(absl::StrCat("slower: session ", id, ": ", why));
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

// Of a folder: everything but what is named in `but`, to the new folder `to`.
absl::Status MoveFiles(const std::string& from, const std::string& to, const std::vector<std::string>& but) {
  std::error_code failed;
  fs::create_directories(to, failed);
  std::vector<fs::path> paths;
  for (const auto& entry : fs::directory_iterator(from)) paths.push_back(entry.path());
  for (const fs::path& path : paths) {
    const std::string name = path.filename().string();
    if (std::find(but.begin(), but.end(), name) != but.end() || name.rfind("damaged-", 0) == 0) continue;
    fs::rename(path, fs::path(to) / name, failed);
    if (failed) return absl::UnavailableError(absl::StrCat("cannot move ", path.string(), ": ", failed.message()));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckStore(const std::string& data_dir, const Say& say) {
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
  RWKV_ASSIGN_OR_RETURN(const Survey survey, SurveyStore(data_dir));
  Report(survey, say);
  if (survey.opening.empty() && survey.unreadable_rows == 0 && survey.damaged.empty() && survey.regressed.empty()) {
    say("nothing to repair: the store starts, and drops states that are damaged by itself");
    return absl::OkStatus();
  }
  std::map<std::string, std::string> rows = SurvivingRows(survey);
  AppendNumber(rows[RocksdbRowStore::kNextIdKey], survey.next_id);
  const std::string fresh = data_dir + "/.repaired";
  std::error_code ignored;
  fs::remove_all(fresh, ignored);
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<common::Metrics> metrics, common::Metrics::Create(""));
  {
    Database::Options options;
    options.data_dir = fresh;
    RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<Database> database, Database::Open(options, metrics.get()));
    RocksdbRowStore store(database.get());
    RWKV_RETURN_IF_ERROR(PutRows(store, rows));
  }
  std::string aside;
  for (int n = 0; aside.empty() || fs::exists(aside); ++n) aside = absl::StrCat(data_dir, "/damaged-", n);
  RWKV_RETURN_IF_ERROR(MoveFiles(data_dir, aside, {"records", ".repaired", "LOCK"}));
  RWKV_RETURN_IF_ERROR(MoveFiles(fresh, data_dir, {"LOCK"}));
  fs::remove_all(fresh, ignored);
  say(absl::StrCat(survey.sessions.size() - survey.damaged.size(), " sessions saved, ", survey.damaged.size(),
                   " lost; the damaged files are in ", aside));
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
