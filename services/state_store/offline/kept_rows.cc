#include "services/state_store/offline/kept_rows.h"

#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/optional.h"
#include "kernels/base/status_macros.h"
#include "rocksdb/db.h"
#include "services/common/logging.h"
#include "services/state_store/offline/scratch.h"
#include "services/state_store/rocksdb/database.h"
#include "services/state_store/rocksdb/rocksdb_status.h"
#include "services/state_store/rows/sealed_value.h"

namespace rwkv::state_store {
namespace {

using Rows = std::map<std::string, absl::optional<std::string>>;  // By key, as they are stored; unset: deleted.

// What the tables have of rows that are not as acknowledged, and of those that were deleted with a range. Empty: not
// all of it is as acknowledged.
absl::StatusOr<Rows> FindKeptRows(Database& tables, const AcknowledgedRows& acknowledged,
                                  const std::vector<std::string>& lost, const Survey& survey) {
  RWKV_ASSIGN_OR_RETURN(const Database::Access access, tables.Read());
  Rows rows;
  const auto read = [&](const std::string& key) -> absl::StatusOr<absl::optional<std::string>> {
    std::string value;
    const rocksdb::Status status =
        access.db().Get(rocksdb::ReadOptions(), access.family(Family::kCatalog), key, &value);
    if (status.IsNotFound()) return absl::optional<std::string>();
    RWKV_RETURN_IF_ERROR(FromRocksdbStatus(status, tables.name()));
    return absl::make_optional(value);
  };
  for (const std::string& key : lost) {
    RWKV_ASSIGN_OR_RETURN(const absl::optional<std::string> row, read(key));
    absl::optional<uint32_t> seal;
    if (row.has_value()) seal = SealOf(*row);
    if ((row.has_value() && !OpenValue(key, *row).has_value()) || !acknowledged.Agrees(key, seal)) return Rows();
    rows[key] = row;
  }
  for (const auto& [begin, end] : acknowledged.deleted) {
    for (auto row = survey.rows.lower_bound(begin); row != survey.rows.end() && row->first < end; ++row) {
      if (acknowledged.rows.count(row->first) > 0) continue;
      RWKV_ASSIGN_OR_RETURN(const absl::optional<std::string> kept, read(row->first));
      if (!kept.has_value()) rows[row->first] = absl::nullopt;
    }
  }
  return rows;
}

}  // namespace

void TakeKeptRows(const std::string& scratch, const AcknowledgedRows& acknowledged, common::Metrics* metrics,
                  Survey& survey, std::map<std::string, uint32_t>& seals) {
  std::vector<std::string> lost;
  for (const auto& [key, row] : acknowledged.rows) {
    const auto seal = seals.find(key);
    const absl::optional<uint32_t> stored = seal == seals.end() ? absl::nullopt : absl::make_optional(seal->second);
    if (!acknowledged.Agrees(key, stored)) lost.push_back(key);
  }
  if (lost.empty() || !HasKeptTables(scratch)) return;
  const absl::StatusOr<std::unique_ptr<Database>> tables = OpenAllTables(scratch, metrics);
  const absl::StatusOr<Rows> rows =
      tables.ok() ? FindKeptRows(**tables, acknowledged, lost, survey) : absl::StatusOr<Rows>(tables.status());
  if (!rows.ok()) {
    common::LogWarning("kept_tables_not_read", {{"error", rows.status()}});
    return;
  }
  for (const auto& [key, row] : *rows) {
    survey.rows.erase(key);
    seals.erase(key);
    if (!row.has_value()) continue;
    survey.rows[key] = std::string(*OpenValue(key, *row));
    seals[key] = SealOf(*row);
  }
  survey.kept_rows = static_cast<int64_t>(rows->size());
}

}  // namespace rwkv::state_store
