// What RowCatalog does with the prefix cache. It is one: rows of it that cannot be read are forgotten, never an error.
#include <algorithm>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "kernels/base/status_macros.h"
#include "services/state_store/catalog/catalog_rows.h"
#include "services/state_store/catalog/keys.h"
#include "services/state_store/catalog/prefix_keys.h"
#include "services/state_store/catalog/row_catalog.h"
#include "services/state_store/catalog/session_rows.h"
#include "services/state_store/catalog/view.h"

namespace rwkv::state_store {
namespace {

// Of one scope, looked at for one input: the longest ones.
constexpr int kMaxLookedAt = 4096;

// Clocks of stores may differ by so much. A use that is further ahead was noted before a clock was set back.
constexpr uint64_t kClockDifferenceMinutes = 10;

bool IsAhead(uint64_t minute, uint64_t now) { return minute > now + kClockDifferenceMinutes; }

std::string PrefixLock(uint64_t scope) { return absl::StrCat("prefix ", scope); }

bool SameScope(const PrefixRow& row, const v1::PrefixScope& scope) {
  return row.tenant() == scope.tenant() && row.model_fingerprint() == scope.model_fingerprint() &&
         row.numeric_family() == scope.numeric_family() && row.initial_state() == scope.initial_state();
}

bool SameTokens(const PrefixRow& row, absl::Span<const uint32_t> token_ids) {
  return std::equal(row.token_ids().begin(), row.token_ids().end(), token_ids.begin(), token_ids.end());
}

std::string KeyOf(const v1::PrefixScope& scope, absl::Span<const uint32_t> token_ids) {
  return PrefixIndexKey(PrefixScopeHash(scope, token_ids), token_ids.size(), PrefixHashes(token_ids).back());
}

// Of an x-key.
uint64_t ScopeOf(absl::string_view key) { return FirstNumber(key); }

int64_t RecordBytes(const v1::SnapshotManifest& manifest) {
  int64_t bytes = 0;
  for (const v1::RecordInfo& info : manifest.records()) bytes += static_cast<int64_t>(info.bytes());
  return bytes;
}

}  // namespace

absl::StatusOr<bool> HasPrefix(RowReader& rows, absl::string_view snapshot_id) {
  const absl::StatusOr<absl::optional<std::string>> row = rows.Get(PrefixKey(snapshot_id));
  if (absl::IsDataLoss(row.status())) return false;
  RWKV_RETURN_IF_ERROR(row.status());
  return row->has_value();
}

void RowCatalog::CountPrefixes(int64_t prefixes, int64_t record_bytes, int64_t tokens) {
  prefixes_ += prefixes;
  prefix_record_bytes_ += record_bytes;
  prefix_tokens_ += tokens;
  const CatalogCounts now = counts();
  prefixes_gauge_.Set(static_cast<double>(now.prefixes));
  prefix_bytes_gauge_.Set(static_cast<double>(now.prefix_bytes));
}

absl::StatusOr<absl::optional<v1::SnapshotManifest>> RowCatalog::FindPrefix(const v1::PrefixScope& scope,
                                                                            absl::Span<const uint32_t> token_ids) {
  absl::optional<v1::SnapshotManifest> found;
  if (token_ids.size() < kMinPrefixTokens) return found;
  const uint64_t scope_hash = PrefixScopeHash(scope, token_ids);
  const std::vector<uint64_t> hashes = PrefixHashes(token_ids);
  std::string found_key;
  uint64_t used = 0;
  {
    RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<RowReader> rows, rows_->Read());
    const View view(rows.get());
    int looked_at = 0;
    const auto visit = [&](absl::string_view key, absl::string_view value) -> absl::StatusOr<bool> {
      const uint64_t position = SecondNumber(key);
      if (position >= hashes.size() || hashes[position] != NumberAt(key, 17)) return ++looked_at < kMaxLookedAt;
      PrefixUseRow use;
      PrefixRow row;
      if (!use.ParseFromArray(value.data(), static_cast<int>(value.size()))) return true;
      const absl::StatusOr<bool> there = view.Get(PrefixKey(use.snapshot_id()), &row);
      if (!there.ok() && !absl::IsDataLoss(there.status())) return there.status();
      if (!there.ok() || !*there || !SameScope(row, scope) || !SameTokens(row, token_ids.first(position))) return true;
      if (!found.emplace().ParseFromString(row.manifest())) return true;
      found_key = std::string(key);
      used = use.minute();
      return false;
    };
    const absl::Status status =
        view.ScanBack(NumberKey('x', scope_hash), NumberKey('x', scope_hash, hashes.size()), visit);
    if (!status.ok() && !absl::IsDataLoss(status)) return status;
  }
  if (found_key.empty()) return absl::optional<v1::SnapshotManifest>();
  const uint64_t now = IdleMinute(clock_->Now());
  if (used < now || IsAhead(used, now)) TouchPrefix(found_key).IgnoreError();  // Then it is evicted the sooner.
  return found;
}

absl::Status RowCatalog::TouchPrefix(const std::string& key) {
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<RowTransaction> rows, rows_->Begin({PrefixLock(ScopeOf(key))}));
  PrefixUseRow use;
  RWKV_ASSIGN_OR_RETURN(const bool there, View(rows.get()).Get(key, &use));
  const uint64_t now = IdleMinute(clock_->Now());
  // Of two stores the one whose clock is behind takes nothing back.
  if (!there || (use.minute() >= now && !IsAhead(use.minute(), now))) return absl::OkStatus();
  rows->Delete(PrefixUseKey(use.minute(), use.snapshot_id()));
  use.set_minute(now);
  rows->Put(PrefixUseKey(use.minute(), use.snapshot_id()), key);
  rows->Put(key, use.SerializeAsString());
  return rows->Commit();
}

absl::StatusOr<bool> RowCatalog::PutPrefix(const NewPrefix& prefix, std::vector<std::string>* freed) {
  const std::string& snapshot_id = prefix.manifest.snapshot_id();
  const std::string key = KeyOf(prefix.scope, prefix.token_ids);
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<RowTransaction> rows, rows_->Begin({PrefixLock(ScopeOf(key))}));
  const View view(rows.get());
  RWKV_RETURN_IF_ERROR(rows->Extend({SnapshotLock(snapshot_id)}));
  RWKV_RETURN_IF_ERROR(CheckNotCondemned(view, snapshot_id));
  PrefixUseRow use;
  PrefixRow row;
  std::string damaged;
  RWKV_ASSIGN_OR_RETURN(const bool has_use, view.Get(key, &use));
  if (has_use) {
    const absl::StatusOr<bool> there = view.Get(PrefixKey(use.snapshot_id()), &row);
    if (!there.ok() && !absl::IsDataLoss(there.status())) return there.status();
    if (there.ok() && *there) {
      if (use.snapshot_id() != snapshot_id) freed->push_back(snapshot_id);
      return false;
    }
    // Another takes its place.
    damaged = use.snapshot_id();
    rows->Delete(PrefixKey(damaged));
    rows->Delete(PrefixUseKey(use.minute(), damaged));
  }
  const PrefixUseRow before = use;
  row.Clear();
  row.set_tenant(prefix.scope.tenant());
  row.set_model_fingerprint(prefix.scope.model_fingerprint());
  row.set_numeric_family(prefix.scope.numeric_family());
  row.set_initial_state(prefix.scope.initial_state());
  row.mutable_token_ids()->Add(prefix.token_ids.begin(), prefix.token_ids.end());
  row.set_manifest(prefix.manifest.SerializeAsString());
  use.set_snapshot_id(snapshot_id);
  use.set_minute(IdleMinute(clock_->Now()));
  use.set_bytes(RecordBytes(prefix.manifest));
  use.set_token_count(prefix.token_ids.size());
  rows->Put(PrefixKey(snapshot_id), row.SerializeAsString());
  rows->Put(key, use.SerializeAsString());
  rows->Put(PrefixUseKey(use.minute(), snapshot_id), key);
  RWKV_RETURN_IF_ERROR(rows->Commit());
  CountPrefixes(has_use ? 0 : 1, use.bytes() - before.bytes(),
                static_cast<int64_t>(use.token_count()) - static_cast<int64_t>(before.token_count()));
  if (has_use && damaged != snapshot_id) freed->push_back(damaged);
  return true;
}

absl::StatusOr<bool> RowCatalog::ErasePrefix(const std::string& key, const std::string& snapshot_id) {
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<RowTransaction> rows, rows_->Begin({PrefixLock(ScopeOf(key))}));
  PrefixUseRow use;
  RWKV_ASSIGN_OR_RETURN(const bool there, View(rows.get()).Get(key, &use));
  if (!there || use.snapshot_id() != snapshot_id) return false;
  rows->Delete(PrefixKey(snapshot_id));
  rows->Delete(PrefixUseKey(use.minute(), snapshot_id));
  rows->Delete(key);
  RWKV_RETURN_IF_ERROR(rows->Commit());
  CountPrefixes(-1, -use.bytes(), -static_cast<int64_t>(use.token_count()));
  return true;
}

absl::StatusOr<bool> RowCatalog::DropPrefix(const std::string& snapshot_id, std::vector<std::string>* freed) {
  PrefixRow row;
  {
    RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<RowReader> rows, rows_->Read());
    RWKV_ASSIGN_OR_RETURN(const bool there, View(rows.get()).Get(PrefixKey(snapshot_id), &row));
    if (!there) return false;
  }
  v1::PrefixScope scope;
  scope.set_tenant(row.tenant());
  scope.set_model_fingerprint(row.model_fingerprint());
  scope.set_numeric_family(row.numeric_family());
  scope.set_initial_state(row.initial_state());
  const std::vector<uint32_t> tokens(row.token_ids().begin(), row.token_ids().end());
  if (tokens.size() < kMinPrefixTokens) return absl::DataLossError("catalog: a row of the prefix cache is corrupt");
  RWKV_ASSIGN_OR_RETURN(const bool erased, ErasePrefix(KeyOf(scope, tokens), snapshot_id));
  if (erased) freed->push_back(snapshot_id);
  return erased;
}

absl::Status RowCatalog::ForgetPrefixes() {
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<RowTransaction> rows, rows_->Begin({}));
  for (const char* const kind : {"c", "x", "y"}) rows->DeleteRange(kind, std::string(1, kind[0] + 1));
  return rows->Commit();  // Their records are orphans now.
}

absl::Status RowCatalog::EvictPrefixes(int64_t max_bytes, std::vector<std::string>* freed) {
  std::vector<std::pair<std::string, PrefixUseRow>> kept;  // By x-key; the longest unused first.
  const absl::Status status = ListPrefixes(&kept);
  if (absl::IsDataLoss(status)) {
    kept.clear();
    RWKV_RETURN_IF_ERROR(ForgetPrefixes());
  } else {
    RWKV_RETURN_IF_ERROR(status);
  }
  int64_t record_bytes = 0;
  int64_t tokens = 0;
  for (const auto& [key, use] : kept) {
    record_bytes += use.bytes();
    tokens += static_cast<int64_t>(use.token_count());
  }
  prefixes_ = static_cast<int64_t>(kept.size());
  prefix_record_bytes_ = record_bytes;
  prefix_tokens_ = tokens;
  CountPrefixes(0, 0, 0);
  // What was used in a time that is still to come would outlast all that is used from now on.
  for (const auto& [key, use] : kept) {
    if (IsAhead(use.minute(), IdleMinute(clock_->Now()))) RWKV_RETURN_IF_ERROR(TouchPrefix(key));
  }
  int64_t bytes = record_bytes + tokens * kPrefixTokenBytes;
  for (const auto& [key, use] : kept) {
    if (bytes <= max_bytes) break;
    RWKV_ASSIGN_OR_RETURN(const bool erased, ErasePrefix(key, use.snapshot_id()));
    bytes -= use.bytes() + static_cast<int64_t>(use.token_count()) * kPrefixTokenBytes;
    if (erased) freed->push_back(use.snapshot_id());
  }
  return absl::OkStatus();
}

absl::Status RowCatalog::ListPrefixes(std::vector<std::pair<std::string, PrefixUseRow>>* kept) const {
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<RowReader> rows, rows_->Read());
  const View view(rows.get());
  absl::flat_hash_map<std::string, PrefixUseRow> uses;
  const auto add = [&](absl::string_view key, absl::string_view value) -> absl::StatusOr<bool> {
    if (uses[key].ParseFromArray(value.data(), static_cast<int>(value.size()))) return true;
    return absl::DataLossError("catalog: a use of a prefix is corrupt");
  };
  RWKV_RETURN_IF_ERROR(view.Scan("x", "y", add));
  // Two scans, and no row by itself: a cache may have many, and a database be far.
  const auto take = [&](absl::string_view key, absl::string_view value) -> absl::StatusOr<bool> {
    const auto use = uses.find(value);
    if (use == uses.end() || key != PrefixUseKey(use->second.minute(), use->second.snapshot_id())) {
      return absl::DataLossError("catalog: the prefix cache contradicts itself");
    }
    kept->emplace_back(value, std::move(use->second));
    uses.erase(use);
    return true;
  };
  RWKV_RETURN_IF_ERROR(view.Scan("y", "z", take));
  return uses.empty() ? absl::OkStatus() : absl::DataLossError("catalog: prefixes that are never evicted");
}

}  // namespace rwkv::state_store
