// How ids of tenants stay apart: inside the cluster, from the router's door to the rows of the store, a tenant's session
// is TENANT@ID. No id that a client may send has an '@', so nobody can name another tenant's; ids of callers without a
// tenant are as they are. Since the whole id is the key of every map, lease and row, nothing further in has to think of
// tenants.
#pragma once

#include <cstddef>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace rwkv::common {

inline constexpr char kTenantMark = '@';
inline constexpr size_t kMaxTenantBytes = 64;

// 1 to 64 of A-Z a-z 0-9 . _ -
bool IsTenantName(absl::string_view name);

// Empty tenant: the id itself.
std::string ScopedId(absl::string_view tenant, absl::string_view id);

struct TenantAndId {
  absl::string_view tenant;  // Empty: of none.
  absl::string_view id;
};
TenantAndId SplitScopedId(absl::string_view scoped);

// For who asked: "TENANT@" is taken out of the message, its details stay.
absl::Status WithoutTenant(absl::string_view tenant, const absl::Status& status);

}  // namespace rwkv::common
