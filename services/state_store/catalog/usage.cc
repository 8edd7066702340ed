// What RowCatalog knows of the use that tenants make.
#include <algorithm>
#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "services/common/tenant_ids.h"
#include "services/state_store/catalog/catalog_rows.h"
#include "services/state_store/catalog/keys.h"
#include "services/state_store/catalog/row_catalog.h"
#include "services/state_store/catalog/view.h"

namespace rwkv::state_store {
namespace {

// Extended by, after families and snapshots.
std::string UsageLock(absl::string_view tenant) { return absl::StrCat("usage ", tenant); }

void Add(const UsageRow& row, TenantUsage* usage) {
  usage->turns += row.turns();
  usage->prompt_tokens += row.prompt_tokens();
  usage->generated_tokens += row.generated_tokens();
}

int64_t BytesOf(const v1::SnapshotManifest& manifest) {
  int64_t bytes = 0;
  for (const v1::RecordInfo& info : manifest.records()) bytes += static_cast<int64_t>(info.bytes());
  return bytes;
}

}  // namespace

absl::Status KeepUsage(RowTransaction& rows, Edit& edit, absl::string_view session_id, const SessionRow& row) {
  const absl::string_view tenant = common::SplitScopedId(session_id).tenant;
  if (tenant.empty() || row.usage().turns() == 0) return absl::OkStatus();
  RWKV_RETURN_IF_ERROR(rows.Extend({UsageLock(tenant)}));
  const View view(&rows);
  UsageRow kept;
  RWKV_RETURN_IF_ERROR(view.Get(UsageKey(tenant), &kept).status());
  kept.set_turns(kept.turns() + row.usage().turns());
  kept.set_prompt_tokens(kept.prompt_tokens() + row.usage().prompt_tokens());
  kept.set_generated_tokens(kept.generated_tokens() + row.usage().generated_tokens());
  edit.Put(UsageKey(tenant), kept);
  return absl::OkStatus();
}

absl::Status RowCatalog::PutUsage(const std::string& tenant, const std::string& source, const TenantUsage& total) {
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<RowTransaction> rows, rows_->Begin({UsageLock(tenant)}));
  const View view(rows.get());
  UsageRow row;
  RWKV_RETURN_IF_ERROR(view.Get(UsageKey(tenant, source), &row).status());
  row.set_turns(std::max(row.turns(), total.turns));
  row.set_prompt_tokens(std::max(row.prompt_tokens(), total.prompt_tokens));
  row.set_generated_tokens(std::max(row.generated_tokens(), total.generated_tokens));
  Edit edit(rows.get());
  edit.Put(UsageKey(tenant, source), row);
  return rows->Commit();
}

absl::StatusOr<TenantUsage> RowCatalog::GetUsage(const std::string& tenant) {
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<RowReader> rows, rows_->Read());
  const View view(rows.get());
  TenantUsage usage;
  const auto add = [&usage](absl::string_view key, absl::string_view value) -> absl::StatusOr<bool> {
    UsageRow row;
    if (!row.ParseFromArray(value.data(), static_cast<int>(value.size()))) {
      return absl::DataLossError("catalog: a row of usage is corrupt");
    }
    Add(row, &usage);
    return true;
  };
  const std::string first = UsageKey(tenant);
  RWKV_RETURN_IF_ERROR(view.Scan(first, first + '\x01', add));  // No tenant's name goes on with so small a byte.

  std::map<uint64_t, Link> links;  // By branch; as far as any session uses it.
  std::map<std::string, int64_t> bases;
  const std::string begin = SessionKey(common::ScopedId(tenant, ""));
  std::string end = begin;
  ++end.back();
  RWKV_RETURN_IF_ERROR(view.Scan(begin, end, [&](absl::string_view key, absl::string_view value) -> absl::StatusOr<bool> {
    SessionRow row;
    if (!row.ParseFromArray(value.data(), static_cast<int>(value.size()))) {
      return absl::DataLossError(absl::StrCat("catalog: the row of session ", key.substr(1), " is corrupt"));
    }
    ++usage.sessions;
    Add(row.usage(), &usage);
    RWKV_ASSIGN_OR_RETURN(const std::vector<Link> chain, view.Chain(row));
    for (const Link& link : chain) {
      Link& known = links.emplace(link.branch, link).first->second;
      known.end = std::max(known.end, link.end);
    }
    if (row.has_base_position()) {
      RWKV_ASSIGN_OR_RETURN(const v1::SnapshotManifest base, view.Base(chain));
      bases[base.snapshot_id()] = BytesOf(base);
    }
    return true;
  }));
  for (const auto& [branch, link] : links) {
    usage.log_tokens += static_cast<int64_t>(link.end - link.begin);
    RWKV_ASSIGN_OR_RETURN(const std::vector<SnapshotAt> snapshots, view.Snapshots(branch, link.begin, link.end));
    for (const SnapshotAt& snapshot : snapshots) usage.snapshot_bytes += BytesOf(snapshot.manifest);
  }
  for (const auto& [id, bytes] : bases) usage.snapshot_bytes += bytes;
  return usage;
}

}  // namespace rwkv::state_store
