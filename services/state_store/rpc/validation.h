// The form of every request: grammar of ids, sizes, enums. What depends on what is stored is the catalog's to say.
// Each function returns OK or kInvalidArgument that names the field and the value (google.rpc.BadRequest).
#pragma once

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "google/protobuf/duration.pb.h"
#include "rwkv/v1/state_store.pb.h"

namespace rwkv::state_store {

inline constexpr size_t kMaxIdBytes = 128;
inline constexpr size_t kMaxInitialStateBytes = 128;
inline constexpr int kMaxPageSize = 1000;
inline constexpr int kDefaultPageSize = 100;
inline constexpr int kMaxAppendItems = 1024;
inline constexpr int kMaxRenewals = 16384;
inline constexpr int kMaxPromptTokens = 1 << 20;
inline constexpr int kMaxImportedTokens = 1 << 19;
inline constexpr int kMaxPrefixTokens = 1 << 19;
inline constexpr uint64_t kMaxImportedPosition = uint64_t{1} << 31;  // Half of what a log may have.
inline constexpr size_t kMaxSpecBytes = 256 << 10;
inline constexpr size_t kMaxTextBytes = 4 << 10;  // Stop strings, reasons.
inline constexpr int kMaxLayers = 1024;
inline constexpr uint64_t kMaxRecordBytes = uint64_t{256} << 20;
inline constexpr size_t kMaxPieceBytes = size_t{1} << 20;  // Of a record, in one message.
inline constexpr absl::Duration kMaxLeaseTtl = absl::Hours(1);

// 1 to 128 of A-Z a-z 0-9 . _ - :
absl::Status ValidateId(absl::string_view field, absl::string_view id);
// The same, or TENANT@ID (services/common/tenant_ids.h).
absl::Status ValidateSessionId(absl::string_view field, absl::string_view id);
absl::Status ValidateLease(absl::string_view field, const v1::Lease& lease);
// In (0, kMaxLeaseTtl].
absl::StatusOr<absl::Duration> ValidateTtl(absl::string_view field, bool is_set, const google::protobuf::Duration& ttl);
absl::Status ValidateRecordInfo(absl::string_view field, const v1::RecordInfo& info);
absl::Status ValidateRecordInfos(const v1::RecordInfos& infos);

absl::Status Validate(const v1::CreateSessionRequest& request);
absl::Status Validate(const v1::ImportSessionRequest& request);
absl::Status Validate(const v1::GetSessionRequest& request);
absl::Status Validate(const v1::ListSessionsRequest& request);
absl::Status Validate(const v1::ForkSessionRequest& request);
absl::Status Validate(const v1::RewindSessionRequest& request);
absl::Status Validate(const v1::DeleteSessionRequest& request);
absl::Status Validate(const v1::AcquireLeaseRequest& request);  // ttl: by ValidateTtl.
absl::Status Validate(const v1::RenewLeasesRequest& request);   // Likewise.
absl::Status Validate(const v1::ReleaseLeaseRequest& request);
absl::Status Validate(const v1::BeginTurnRequest& request);
// The request as a whole: number of items, no session twice. An item by itself: ValidateItem.
absl::Status Validate(const v1::AppendTokensRequest& request);
absl::Status ValidateItem(const v1::AppendItem& item);
absl::Status Validate(const v1::FindTurnRequest& request);
absl::Status Validate(const v1::ReadTokensRequest& request);
absl::Status Validate(const v1::CommitSnapshotRequest& request);
absl::Status Validate(const v1::FindSnapshotRequest& request);
absl::Status Validate(const v1::DropSnapshotRequest& request);
absl::Status Validate(const v1::FindPrefixRequest& request);
absl::Status Validate(const v1::PutPrefixRequest& request);
absl::Status Validate(const v1::DropPrefixRequest& request);
absl::Status Validate(const v1::GetUsageRequest& request);
absl::Status Validate(const v1::PutUsageRequest& request);

}  // namespace rwkv::state_store
