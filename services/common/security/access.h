// Who may call what when TLS is on: an identity's roles against the method's. A method that the table does not know is
// nobody's.
//
// A role comes from a certificate that our authority signed, by a subject alternative name that is exactly
//   URI:spiffe://TRUST_DOMAIN/rwkv/ROLE      any trust domain: the authority is trusted, not the name
//   URI:spiffe://TRUST_DOMAIN/rwkv/ROLE/TENANT   the same, for a tenant (client and gateway)
//   DNS:ROLE.rwkv.internal                   for authorities that sign no URIs
// or from an API key's line (api_keys.h). A certificate may carry several.
#pragma once

#include <initializer_list>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace rwkv::common {

enum class Role {
  kRouter,
  kWorker,
  kStore,
  kGateway,   // Acts for clients.
  kOperator,  // A person or a tool: everything public, and the calls that look inside.
  kClient,    // Generates, and keeps sessions.
};

class RoleSet {
 public:
  constexpr RoleSet() = default;
  constexpr RoleSet(std::initializer_list<Role> roles) {
    for (const Role role : roles) bits_ |= Bit(role);
  }
  constexpr bool Has(Role role) const { return (bits_ & Bit(role)) != 0; }
  constexpr bool HasAnyOf(RoleSet other) const { return (bits_ & other.bits_) != 0; }
  constexpr bool empty() const { return bits_ == 0; }
  constexpr void Add(Role role) { bits_ |= Bit(role); }
  std::string ToString() const;  // "router, worker"; "none".

 private:
  static constexpr unsigned Bit(Role role) { return 1u << static_cast<unsigned>(role); }
  unsigned bits_ = 0;
};

absl::string_view RoleName(Role role);                   // "router"; the store's is "store".
absl::StatusOr<Role> ParseRole(absl::string_view name);  // kInvalidArgument names the roles there are.
std::vector<Role> AllRoles();

// The roles of a certificate's subject alternative names.
void AddRoleOfUri(absl::string_view uri, RoleSet* roles);
// The tenant that a URI names besides a role; empty: none.
std::string TenantOfUri(absl::string_view uri);
void AddRoleOfDnsName(absl::string_view name, RoleSet* roles);

// Who may call `method`, "/rwkv.v1.Generation/Generate". Unknown: nobody.
RoleSet AllowedRoles(absl::string_view method);

// OK: one of `roles` may call `method`. kUnauthenticated: there are none. kPermissionDenied: none of them may.
absl::Status CheckAccess(RoleSet roles, absl::string_view method);

}  // namespace rwkv::common
