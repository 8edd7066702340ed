// What RowCatalog does with leases.
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "services/common/grpc_status.h"
#include "services/state_store/catalog/catalog_rows.h"
#include "services/state_store/catalog/keys.h"
#include "services/state_store/catalog/row_catalog.h"
#include "services/state_store/catalog/session_rows.h"
#include "services/state_store/catalog/view.h"

namespace rwkv::state_store {

absl::StatusOr<LeaseGrant> RowCatalog::AcquireLease(const std::string& session_id, const std::string& holder,
                                                    const std::string& incarnation, absl::Duration ttl) {
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<RowTransaction> rows, Begin({session_id}));
  const View view(rows.get());
  SessionRow row;
  RWKV_ASSIGN_OR_RETURN(row, Find(view, session_id));
  LeaseRow& current = *row.mutable_lease();
  const bool was_held = !current.holder().empty();
  const absl::Time now = clock_->Now();
  const absl::Time expiry = absl::FromUnixNanos(current.expiry_unix_nanos());
  const bool alive = was_held && now < expiry;
  if (alive && current.holder() != holder) {
    return common::WithRetryInfo(
        common::WithErrorInfo(absl::AbortedError(absl::StrCat("session ", session_id, " is held by ", current.holder(),
                                                              " for another ", absl::FormatDuration(expiry - now))),
                              "LEASE_HELD", {{"holder", current.holder()}}),
        expiry - now);
  }
  if (!alive || current.incarnation() != incarnation) {
    RWKV_ASSIGN_OR_RETURN(const uint64_t token, rows->NextId());
    current.set_fencing_token(token);
    current.set_holder(holder);
    current.set_incarnation(incarnation);
  }
  current.set_expiry_unix_nanos(absl::ToUnixNanos(now + ttl));
  row.set_use_unix_nanos(absl::ToUnixNanos(now));
  Edit edit(rows.get());
  PutSession(edit, session_id, row);
  LeaseGrant grant;
  RWKV_ASSIGN_OR_RETURN(grant.session, ToSessionWithSnapshots(view, session_id, row));
  RWKV_RETURN_IF_ERROR(rows->Commit());
  Count(0, 0, was_held ? 0 : 1, 0);
  grant.lease.set_session_id(session_id);
  grant.lease.set_fencing_token(current.fencing_token());
  grant.log_branch = LogBranch(row);
  return grant;
}

absl::StatusOr<std::vector<v1::Lease>> RowCatalog::RenewLeases(absl::Span<const v1::Lease> leases, absl::Duration ttl) {
  std::vector<std::string> session_ids;
  for (const v1::Lease& lease : leases) session_ids.push_back(lease.session_id());
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<RowTransaction> rows, Begin(session_ids));
  const View view(rows.get());
  Edit edit(rows.get());
  std::vector<v1::Lease> lost;
  const absl::Time now = clock_->Now();
  for (const v1::Lease& lease : leases) {
    SessionRow row;
    const absl::StatusOr<bool> found = view.Get(SessionKey(lease.session_id()), &row);
    // One that is damaged takes no other's lease with it.
    if (!found.ok() && !absl::IsDataLoss(found.status())) return found.status();
    if (!found.ok() || !*found || !CheckLease(lease, row).ok()) {
      lost.push_back(lease);
      continue;
    }
    row.mutable_lease()->set_expiry_unix_nanos(absl::ToUnixNanos(now + ttl));
    row.set_use_unix_nanos(absl::ToUnixNanos(now));
    PutSession(edit, lease.session_id(), row);
  }
  if (!rows->empty()) RWKV_RETURN_IF_ERROR(rows->Commit());
  return lost;
}

absl::Status RowCatalog::ReleaseLease(const v1::Lease& lease) {
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<RowTransaction> rows, Begin({lease.session_id()}));
  const View view(rows.get());
  RWKV_ASSIGN_OR_RETURN(SessionRow row, Find(view, lease.session_id()));
  if (row.lease().holder().empty() && row.lease().fencing_token() == lease.fencing_token()) return absl::OkStatus();
  if (absl::Status status = CheckLease(lease, row); !status.ok()) {
    fenced_total_.Increment();
    return status;
  }
  row.mutable_lease()->clear_holder();
  row.mutable_lease()->clear_incarnation();
  row.mutable_lease()->clear_expiry_unix_nanos();
  row.set_use_unix_nanos(absl::ToUnixNanos(clock_->Now()));
  Edit edit(rows.get());
  PutSession(edit, lease.session_id(), row);
  RWKV_RETURN_IF_ERROR(rows->Commit());
  Count(0, 0, -1, 0);
  return absl::OkStatus();
}

}  // namespace rwkv::state_store
