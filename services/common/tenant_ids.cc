#include "services/common/tenant_ids.h"

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"

namespace rwkv::common {

bool IsTenantName(absl::string_view name) {
  return !name.empty() && name.size() <= kMaxTenantBytes && std::all_of(name.begin(), name.end(), [](char c) {
    return absl::ascii_isalnum(c) || c == '.' || c == '_' || c == '-';
  });
}

std::string ScopedId(absl::string_view tenant, absl::string_view id) {
  if (tenant.empty()) return std::string(id);
  return absl::StrCat(tenant, absl::string_view(&kTenantMark, 1), id);
}

TenantAndId SplitScopedId(absl::string_view scoped) {
  const size_t mark = scoped.find(kTenantMark);
  if (mark == absl::string_view::npos) return {absl::string_view(), scoped};
  return {scoped.substr(0, mark), scoped.substr(mark + 1)};
}

absl::Status WithoutTenant(absl::string_view tenant, const absl::Status& status) {
  if (status.ok() || tenant.empty()) return status;
  absl::Status said(status.code(), absl::StrReplaceAll(status.message(), {{ScopedId(tenant, ""), ""}}));
  status.ForEachPayload([&said](absl::string_view type, const absl::Cord& payload) { said.SetPayload(type, payload); });
  return said;
}

}  // namespace rwkv::common
