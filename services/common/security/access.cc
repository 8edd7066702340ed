#include "services/common/security/access.h"

#include "absl/container/flat_hash_map.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "absl/types/optional.h"
#include "services/common/tenant_ids.h"

namespace rwkv::common {
namespace {

constexpr Role kRoles[] = {Role::kRouter, Role::kWorker, Role::kStore, Role::kGateway, Role::kOperator, Role::kClient};

constexpr RoleSet kEverybody = {Role::kRouter,  Role::kWorker,   Role::kStore,
                                Role::kGateway, Role::kOperator, Role::kClient};
constexpr RoleSet kPublic = {Role::kClient, Role::kGateway, Role::kOperator};

const absl::flat_hash_map<absl::string_view, RoleSet>& Table() {
  static const auto* const table = new absl::flat_hash_map<absl::string_view, RoleSet>{
      {"/grpc.health.v1.Health/Check", kEverybody},
      {"/grpc.health.v1.Health/Watch", kEverybody},
      {"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", {Role::kOperator}},

      {"/rwkv.v1.Generation/Generate", kPublic},
      {"/rwkv.v1.Generation/Score", kPublic},
      {"/rwkv.v1.Generation/ScoreDocument", kPublic},
      {"/rwkv.v1.Generation/Logits", {Role::kOperator}},
      {"/rwkv.v1.Generation/Embed", kPublic},
      {"/rwkv.v1.Generation/Tokenize", kPublic},
      {"/rwkv.v1.Generation/TokenizeDocument", kPublic},
      {"/rwkv.v1.Generation/Detokenize", kPublic},
      {"/rwkv.v1.Generation/ListModels", kPublic},
      {"/rwkv.v1.Sessions/Create", kPublic},
      {"/rwkv.v1.Sessions/Get", kPublic},
      {"/rwkv.v1.Sessions/List", kPublic},
      {"/rwkv.v1.Sessions/Fork", kPublic},
      {"/rwkv.v1.Sessions/Rewind", kPublic},
      {"/rwkv.v1.Sessions/Delete", kPublic},
      {"/rwkv.v1.Sessions/ExportState", kPublic},
      {"/rwkv.v1.Sessions/Import", kPublic},
      // Addresses and process ids of the whole cluster.
      {"/rwkv.v1.Cluster/GetStatus", {Role::kOperator, Role::kGateway}},
      // Its own, and an operator any.
      {"/rwkv.v1.Cluster/GetTenantUsage", kPublic},

      {"/rwkv.v1.Worker/Describe", {Role::kRouter, Role::kOperator}},
      {"/rwkv.v1.Worker/Execute", {Role::kRouter}},
      {"/rwkv.v1.Link/Transfer", {Role::kWorker}},

      {"/rwkv.v1.StateCatalog/Describe", {Role::kRouter, Role::kOperator}},
      {"/rwkv.v1.StateCatalog/CreateSession", {Role::kRouter}},
      {"/rwkv.v1.StateCatalog/ImportSession", {Role::kRouter}},
      {"/rwkv.v1.StateCatalog/GetSession", {Role::kRouter}},
      {"/rwkv.v1.StateCatalog/ListSessions", {Role::kRouter}},
      {"/rwkv.v1.StateCatalog/ForkSession", {Role::kRouter}},
      {"/rwkv.v1.StateCatalog/RewindSession", {Role::kRouter}},
      {"/rwkv.v1.StateCatalog/DeleteSession", {Role::kRouter}},
      {"/rwkv.v1.StateCatalog/AcquireLease", {Role::kRouter}},
      {"/rwkv.v1.StateCatalog/RenewLeases", {Role::kRouter}},
      {"/rwkv.v1.StateCatalog/ReleaseLease", {Role::kRouter}},
      {"/rwkv.v1.StateCatalog/BeginTurn", {Role::kRouter}},
      {"/rwkv.v1.StateCatalog/AppendTokens", {Role::kRouter}},
      {"/rwkv.v1.StateCatalog/FindTurn", {Role::kRouter}},
      {"/rwkv.v1.StateCatalog/ReadTokens", {Role::kRouter}},
      {"/rwkv.v1.StateCatalog/CommitSnapshot", {Role::kRouter}},
      {"/rwkv.v1.StateCatalog/FindSnapshot", {Role::kRouter}},
      {"/rwkv.v1.StateCatalog/DropSnapshot", {Role::kRouter}},
      {"/rwkv.v1.StateCatalog/FindPrefix", {Role::kRouter}},
      {"/rwkv.v1.StateCatalog/PutPrefix", {Role::kRouter}},
      {"/rwkv.v1.StateCatalog/DropPrefix", {Role::kRouter}},
      {"/rwkv.v1.StateCatalog/GetUsage", {Role::kRouter}},
      {"/rwkv.v1.StateCatalog/PutUsage", {Role::kRouter}},
      {"/rwkv.v1.StateRecords/PutRecord", {Role::kRouter, Role::kWorker}},
      {"/rwkv.v1.StateRecords/GetRecord", {Role::kRouter, Role::kWorker}},
      {"/rwkv.v1.StateRecords/PutRecords", {Role::kRouter, Role::kWorker}},
      {"/rwkv.v1.StateRecords/GetRecords", {Role::kRouter, Role::kWorker}},
  };
  return *table;
}

struct UriIdentity {
  Role role = Role::kClient;
  absl::string_view tenant;
};

absl::optional<UriIdentity> ReadUri(absl::string_view uri) {
  if (!absl::ConsumePrefix(&uri, "spiffe://")) return absl::nullopt;
  const size_t slash = uri.find('/');
  if (slash == 0 || slash == absl::string_view::npos) return absl::nullopt;
  uri.remove_prefix(slash);
  if (!absl::ConsumePrefix(&uri, "/rwkv/")) return absl::nullopt;
  UriIdentity identity;
  const size_t end_of_role = uri.find('/');
  const absl::StatusOr<Role> role = ParseRole(uri.substr(0, end_of_role));
  if (!role.ok()) return absl::nullopt;
  identity.role = *role;
  if (end_of_role == absl::string_view::npos) return identity;
  identity.tenant = uri.substr(end_of_role + 1);
  // The cluster's own processes are of no tenant.
  if (!RoleSet({Role::kClient, Role::kGateway}).Has(*role) || !IsTenantName(identity.tenant)) return absl::nullopt;
  return identity;
}

}  // namespace

std::string RoleSet::ToString() const {
  std::string text;
  for (const Role role : kRoles) {
    if (Has(role)) absl::StrAppend(&text, text.empty() ? "" : ", ", RoleName(role));
  }
  return text.empty() ? "none" : text;
}

absl::string_view RoleName(Role role) {
  switch (role) {
    case Role::kRouter:
      return "router";
    case Role::kWorker:
      return "worker";
    case Role::kStore:
      return "store";
    case Role::kGateway:
      return "gateway";
    case Role::kOperator:
      return "operator";
    case Role::kClient:
      return "client";
  }
  return "";
}

absl::StatusOr<Role> ParseRole(absl::string_view name) {
  std::string names;
  for (const Role role : kRoles) {
    if (RoleName(role) == name) return role;
    absl::StrAppend(&names, names.empty() ? "" : ", ", RoleName(role));
  }
  return absl::InvalidArgumentError(absl::StrCat("no role \"", name, "\"; there are ", names));
}

std::vector<Role> AllRoles() { return std::vector<Role>(std::begin(kRoles), std::end(kRoles)); }

void AddRoleOfUri(absl::string_view uri, RoleSet* roles) {
  if (const absl::optional<UriIdentity> identity = ReadUri(uri); identity.has_value()) roles->Add(identity->role);
}

std::string TenantOfUri(absl::string_view uri) {
  const absl::optional<UriIdentity> identity = ReadUri(uri);
  return identity.has_value() ? std::string(identity->tenant) : std::string();
}

void AddRoleOfDnsName(absl::string_view name, RoleSet* roles) {
  if (!absl::ConsumeSuffix(&name, ".rwkv.internal")) return;
  if (const absl::StatusOr<Role> role = ParseRole(name); role.ok()) roles->Add(*role);
}

RoleSet AllowedRoles(absl::string_view method) {
  const auto found = Table().find(method);
  return found == Table().end() ? RoleSet() : found->second;
}

absl::Status CheckAccess(RoleSet roles, absl::string_view method) {
  if (roles.empty()) {
    return absl::UnauthenticatedError("neither a certificate with a role nor a known API key came with the call");
  }
  if (!AllowedRoles(method).HasAnyOf(roles)) {
    return absl::PermissionDeniedError(absl::StrCat("the role ", roles.ToString(), " may not call ", method));
  }
  return absl::OkStatus();
}

}  // namespace rwkv::common
