#include "services/state_store/rpc/validation.h"

#include <algorithm>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "services/common/grpc_status.h"
#include "services/common/tenant_ids.h"
#include "services/state_store/catalog/prefix_keys.h"

namespace rwkv::state_store {
namespace {

using common::InvalidFieldError;

// A value for an error message.
std::string Quoted(absl::string_view value) {
  constexpr size_t kShown = 64;
  return absl::StrCat("\"", absl::CHexEscape(value.substr(0, kShown)), value.size() > kShown ? "...\"" : "\"");
}

bool IsIdCharacter(char c) { return absl::ascii_isalnum(c) || c == '.' || c == '_' || c == '-' || c == ':'; }

// What has no grammar, only a length.
absl::Status ValidateText(absl::string_view field, absl::string_view text, size_t min_bytes, size_t max_bytes) {
  if (text.size() >= min_bytes && text.size() <= max_bytes) return absl::OkStatus();
  return InvalidFieldError(field, absl::StrCat("has ", text.size(), " bytes, want ", min_bytes, " to ", max_bytes));
}

absl::Status ValidateTenant(absl::string_view tenant) {
  if (common::IsTenantName(tenant)) return absl::OkStatus();
  return InvalidFieldError(
      "tenant", absl::StrCat(Quoted(tenant), " is not 1 to ", common::kMaxTenantBytes, " of A-Z a-z 0-9 . _ -"));
}

absl::Status ValidateManifest(const v1::SnapshotManifest& manifest, absl::string_view session_id) {
  RWKV_RETURN_IF_ERROR(ValidateId("manifest.snapshot_id", manifest.snapshot_id()));
  if (manifest.session_id() != session_id) {
    return InvalidFieldError("manifest.session_id",
                             absl::StrCat(Quoted(manifest.session_id()), " is not the session's, ", session_id));
  }
  RWKV_RETURN_IF_ERROR(ValidateId("manifest.model_fingerprint", manifest.model_fingerprint()));
  if (manifest.records_size() < 1 || manifest.records_size() > kMaxLayers) {
    return InvalidFieldError("manifest.records", absl::StrCat(manifest.records_size(), ", want 1 to ", kMaxLayers));
  }
  for (int i = 0; i < manifest.records_size(); ++i) {
    const std::string field = absl::StrCat("manifest.records[", i, "]");
    const v1::RecordInfo& info = manifest.records(i);
    RWKV_RETURN_IF_ERROR(ValidateRecordInfo(field, info));
    if (info.layer() != i) {
      return InvalidFieldError(field + ".layer",
                               absl::StrCat(info.layer(), ", want ", i, ": every layer, ascending from 0"));
    }
    if (info.snapshot_id() != manifest.snapshot_id()) {
      return InvalidFieldError(
          field + ".snapshot_id",
          absl::StrCat(Quoted(info.snapshot_id()), " is not the manifest's, ", manifest.snapshot_id()));
    }
  }
  return absl::OkStatus();
}

absl::Status ValidateScope(const v1::PrefixScope& scope) {
  if (!scope.tenant().empty()) RWKV_RETURN_IF_ERROR(ValidateTenant(scope.tenant()));
  RWKV_RETURN_IF_ERROR(ValidateId("scope.model_fingerprint", scope.model_fingerprint()));
  RWKV_RETURN_IF_ERROR(ValidateText("scope.numeric_family", scope.numeric_family(), 0, kMaxIdBytes));
  return ValidateText("scope.initial_state", scope.initial_state(), 0, kMaxInitialStateBytes);
}

}  // namespace

absl::Status ValidateId(absl::string_view field, absl::string_view id) {
  if (!id.empty() && id.size() <= kMaxIdBytes && std::all_of(id.begin(), id.end(), IsIdCharacter)) {
    return absl::OkStatus();
  }
  return InvalidFieldError(field, absl::StrCat(Quoted(id), " is not 1 to ", kMaxIdBytes, " of A-Z a-z 0-9 . _ - :"));
}

absl::Status ValidateSessionId(absl::string_view field, absl::string_view id) {
  const common::TenantAndId parts = common::SplitScopedId(id);
  if (parts.id.size() == id.size()) return ValidateId(field, id);
  if (common::IsTenantName(parts.tenant)) return ValidateId(field, parts.id);
  return InvalidFieldError(field, absl::StrCat(Quoted(id), " is not TENANT@ID: 1 to ", common::kMaxTenantBytes,
                                               " of A-Z a-z 0-9 . _ - before the mark"));
}

absl::Status ValidateLease(absl::string_view field, const v1::Lease& lease) {
  RWKV_RETURN_IF_ERROR(ValidateSessionId(absl::StrCat(field, ".session_id"), lease.session_id()));
  if (lease.fencing_token() == 0) {
    return InvalidFieldError(absl::StrCat(field, ".fencing_token"), "0 is not a token that AcquireLease gives");
  }
  return absl::OkStatus();
}

absl::StatusOr<absl::Duration> ValidateTtl(absl::string_view field, bool is_set,
                                           const google::protobuf::Duration& ttl) {
  const absl::Duration duration = absl::Seconds(ttl.seconds()) + absl::Nanoseconds(ttl.nanos());
  if (!is_set || duration <= absl::ZeroDuration() || duration > kMaxLeaseTtl) {
    return InvalidFieldError(field, absl::StrCat(is_set ? absl::FormatDuration(duration) : "unset", ", want over 0 to ",
                                                 absl::FormatDuration(kMaxLeaseTtl)));
  }
  return duration;
}

absl::Status ValidateRecordInfo(absl::string_view field, const v1::RecordInfo& info) {
  RWKV_RETURN_IF_ERROR(ValidateId(absl::StrCat(field, ".snapshot_id"), info.snapshot_id()));
  if (info.layer() < 0 || info.layer() >= kMaxLayers) {
    return InvalidFieldError(absl::StrCat(field, ".layer"), absl::StrCat(info.layer(), ", want 0 to ", kMaxLayers - 1));
  }
  if (info.bytes() < 1 || info.bytes() > kMaxRecordBytes) {
    return InvalidFieldError(absl::StrCat(field, ".bytes"),
                             absl::StrCat(info.bytes(), ", want 1 to ", kMaxRecordBytes));
  }
  return absl::OkStatus();
}

absl::Status ValidateRecordInfos(const v1::RecordInfos& infos) {
  if (infos.records().empty()) return InvalidFieldError("infos", "missing: at least one record");
  for (int i = 0; i < infos.records_size(); ++i) {
    const std::string field = absl::StrCat("infos.records[", i, "]");
    RWKV_RETURN_IF_ERROR(ValidateRecordInfo(field, infos.records(i)));
    if (i == 0) continue;
    if (infos.records(i).snapshot_id() != infos.records(0).snapshot_id()) {
      return InvalidFieldError(field + ".snapshot_id", absl::StrCat(Quoted(infos.records(i).snapshot_id()), " after ",
                                                                    infos.records(0).snapshot_id()));
    }
    if (infos.records(i).layer() <= infos.records(i - 1).layer()) {
      return InvalidFieldError(field + ".layer", absl::StrCat(infos.records(i).layer(), " after ",
                                                              infos.records(i - 1).layer(), ": layers ascend"));
    }
  }
  return absl::OkStatus();
}

absl::Status Validate(const v1::CreateSessionRequest& request) {
  RWKV_RETURN_IF_ERROR(ValidateSessionId("session_id", request.session_id()));
  return ValidateText("initial_state", request.initial_state(), 0, kMaxInitialStateBytes);
}

absl::Status Validate(const v1::ImportSessionRequest& request) {
  RWKV_RETURN_IF_ERROR(ValidateSessionId("session_id", request.session_id()));
  RWKV_RETURN_IF_ERROR(ValidateText("initial_state", request.initial_state(), 0, kMaxInitialStateBytes));
  RWKV_RETURN_IF_ERROR(ValidateManifest(request.manifest(), request.session_id()));
  const uint64_t position = request.manifest().position();
  if (position > kMaxImportedPosition) {
    return InvalidFieldError("manifest.position", absl::StrCat(position, ", want at most ", kMaxImportedPosition));
  }
  const uint64_t tokens = request.token_ids_size();
  if (tokens > kMaxImportedTokens) {
    return InvalidFieldError("token_ids", absl::StrCat(tokens, ", want at most ", kMaxImportedTokens));
  }
  if (tokens != position && (tokens > 0 || !request.base())) {
    return InvalidFieldError("token_ids", absl::StrCat(tokens, " for a state at position ", position));
  }
  if (position > 0 || request.base()) return absl::OkStatus();
  return InvalidFieldError("manifest.position", "0, where a snapshot has to be the base");
}

absl::Status Validate(const v1::GetSessionRequest& request) {
  return ValidateSessionId("session_id", request.session_id());
}

absl::Status Validate(const v1::ListSessionsRequest& request) {
  if (request.page_size() > kMaxPageSize) {
    return InvalidFieldError("page_size", absl::StrCat(request.page_size(), ", want at most ", kMaxPageSize));
  }
  const std::string& token = request.page_token();
  const common::TenantAndId parts = common::SplitScopedId(token);
  // Before a tenant's first session there is no id.
  const bool first = parts.id.empty() && (token.empty() || common::IsTenantName(parts.tenant));
  return first ? absl::OkStatus() : ValidateSessionId("page_token", token);
}

absl::Status Validate(const v1::ForkSessionRequest& request) {
  RWKV_RETURN_IF_ERROR(ValidateSessionId("session_id", request.session_id()));
  return ValidateSessionId("new_session_id", request.new_session_id());
}

absl::Status Validate(const v1::RewindSessionRequest& request) {
  if (!request.log_branch().empty()) RWKV_RETURN_IF_ERROR(ValidateId("log_branch", request.log_branch()));
  return ValidateLease("lease", request.lease());
}

absl::Status Validate(const v1::DeleteSessionRequest& request) { return ValidateLease("lease", request.lease()); }

absl::Status Validate(const v1::AcquireLeaseRequest& request) {
  RWKV_RETURN_IF_ERROR(ValidateSessionId("session_id", request.session_id()));
  RWKV_RETURN_IF_ERROR(ValidateText("holder", request.holder(), 1, kMaxIdBytes));
  return ValidateText("incarnation", request.incarnation(), 1, kMaxIdBytes);
}

absl::Status Validate(const v1::RenewLeasesRequest& request) {
  if (request.leases_size() > kMaxRenewals) {
    return InvalidFieldError("leases", absl::StrCat(request.leases_size(), ", want at most ", kMaxRenewals));
  }
  for (int i = 0; i < request.leases_size(); ++i) {
    RWKV_RETURN_IF_ERROR(ValidateLease(absl::StrCat("leases[", i, "]"), request.leases(i)));
  }
  return absl::OkStatus();
}

absl::Status Validate(const v1::ReleaseLeaseRequest& request) { return ValidateLease("lease", request.lease()); }

absl::Status Validate(const v1::BeginTurnRequest& request) {
  RWKV_RETURN_IF_ERROR(ValidateLease("lease", request.lease()));
  RWKV_RETURN_IF_ERROR(ValidateText("request_id", request.request_id(), 1, kMaxIdBytes));
  RWKV_RETURN_IF_ERROR(ValidateId("model_fingerprint", request.model_fingerprint()));
  RWKV_RETURN_IF_ERROR(ValidateText("spec", request.spec(), 0, kMaxSpecBytes));
  if (request.token_ids_size() > kMaxPromptTokens) {
    return InvalidFieldError("token_ids", absl::StrCat(request.token_ids_size(), ", want at most ", kMaxPromptTokens));
  }
  return absl::OkStatus();
}

absl::Status Validate(const v1::AppendTokensRequest& request) {
  if (request.items_size() > kMaxAppendItems) {
    return InvalidFieldError("items", absl::StrCat(request.items_size(), ", want at most ", kMaxAppendItems));
  }
  absl::flat_hash_set<absl::string_view> sessions;
  for (int i = 0; i < request.items_size(); ++i) {
    const std::string& session_id = request.items(i).lease().session_id();
    if (!sessions.insert(session_id).second) {
      return InvalidFieldError(absl::StrCat("items[", i, "].lease.session_id"),
                               absl::StrCat(Quoted(session_id), " is in two items"));
    }
  }
  return absl::OkStatus();
}

absl::Status ValidateItem(const v1::AppendItem& item) {
  RWKV_RETURN_IF_ERROR(ValidateLease("lease", item.lease()));
  RWKV_RETURN_IF_ERROR(ValidateText("request_id", item.request_id(), 1, kMaxIdBytes));
  if (item.logprobs_size() != item.token_ids_size()) {
    return InvalidFieldError("logprobs",
                             absl::StrCat(item.logprobs_size(), " for ", item.token_ids_size(), " token_ids"));
  }
  if (!v1::FinishReason_IsValid(item.finish_reason())) {
    return InvalidFieldError("finish_reason", absl::StrCat(static_cast<int>(item.finish_reason()), " is unknown"));
  }
  const bool finishes = item.finish_reason() != v1::FINISH_REASON_UNSPECIFIED;
  if (item.has_stop_token_id() && !finishes) {
    return InvalidFieldError("stop_token_id", absl::StrCat(item.stop_token_id(), " without a finish_reason"));
  }
  if (!item.stop_string().empty() && !finishes) {
    return InvalidFieldError("stop_string", "given without a finish_reason");
  }
  const bool fails = item.finish_reason() == v1::FINISH_REASON_ERROR;
  if (fails != (item.error().code() != 0)) {
    return InvalidFieldError("error.code", absl::StrCat(item.error().code(), " with the finish_reason ",
                                                        v1::FinishReason_Name(item.finish_reason())));
  }
  RWKV_RETURN_IF_ERROR(ValidateText("error.message", item.error().message(), 0, kMaxTextBytes));
  return ValidateText("stop_string", item.stop_string(), 0, kMaxTextBytes);
}

absl::Status Validate(const v1::FindTurnRequest& request) {
  RWKV_RETURN_IF_ERROR(ValidateSessionId("session_id", request.session_id()));
  return ValidateText("request_id", request.request_id(), 0, kMaxIdBytes);
}

absl::Status Validate(const v1::ReadTokensRequest& request) {
  RWKV_RETURN_IF_ERROR(ValidateSessionId("session_id", request.session_id()));
  if (request.begin() > request.end()) {
    return InvalidFieldError("begin", absl::StrCat(request.begin(), " is beyond end, ", request.end()));
  }
  return absl::OkStatus();
}

absl::Status Validate(const v1::CommitSnapshotRequest& request) {
  RWKV_RETURN_IF_ERROR(ValidateLease("lease", request.lease()));
  RWKV_RETURN_IF_ERROR(ValidateId("log_branch", request.log_branch()));
  RWKV_RETURN_IF_ERROR(ValidateManifest(request.manifest(), request.lease().session_id()));
  if (request.manifest().position() > 0) return absl::OkStatus();
  return InvalidFieldError("manifest.position", "0, where there is no state to keep");
}

absl::Status Validate(const v1::FindSnapshotRequest& request) {
  RWKV_RETURN_IF_ERROR(ValidateSessionId("session_id", request.session_id()));
  return ValidateId("model_fingerprint", request.model_fingerprint());
}

absl::Status Validate(const v1::DropSnapshotRequest& request) {
  if (!request.session_id().empty()) RWKV_RETURN_IF_ERROR(ValidateSessionId("session_id", request.session_id()));
  RWKV_RETURN_IF_ERROR(ValidateId("snapshot_id", request.snapshot_id()));
  return ValidateText("reason", request.reason(), 0, kMaxTextBytes);
}

absl::Status Validate(const v1::FindPrefixRequest& request) {
  RWKV_RETURN_IF_ERROR(ValidateScope(request.scope()));
  const int tokens = request.token_ids_size();
  if (tokens >= 1 && tokens <= kMaxPrefixTokens) return absl::OkStatus();
  return InvalidFieldError("token_ids", absl::StrCat(tokens, ", want 1 to ", kMaxPrefixTokens));
}

absl::Status Validate(const v1::PutPrefixRequest& request) {
  RWKV_RETURN_IF_ERROR(ValidateScope(request.scope()));
  RWKV_RETURN_IF_ERROR(ValidateManifest(request.manifest(), ""));
  if (request.manifest().model_fingerprint() != request.scope().model_fingerprint()) {
    return InvalidFieldError("manifest.model_fingerprint", "is not the scope's");
  }
  const int tokens = request.token_ids_size();
  if (tokens < static_cast<int>(kMinPrefixTokens) || tokens > kMaxPrefixTokens) {
    return InvalidFieldError("token_ids", absl::StrCat(tokens, ", want ", kMinPrefixTokens, " to ", kMaxPrefixTokens));
  }
  if (request.manifest().position() == static_cast<uint64_t>(tokens)) return absl::OkStatus();
  return InvalidFieldError("manifest.position", absl::StrCat(request.manifest().position(), " of ", tokens, " tokens"));
}

absl::Status Validate(const v1::DropPrefixRequest& request) {
  RWKV_RETURN_IF_ERROR(ValidateId("snapshot_id", request.snapshot_id()));
  return ValidateText("reason", request.reason(), 0, kMaxTextBytes);
}

absl::Status Validate(const v1::GetUsageRequest& request) { return ValidateTenant(request.tenant()); }

absl::Status Validate(const v1::PutUsageRequest& request) {
  RWKV_RETURN_IF_ERROR(ValidateTenant(request.tenant()));
  return ValidateId("source", request.source());
}

}  // namespace rwkv::state_store
