// What RowCatalog does with sessions that nobody uses.
#include <algorithm>
#include <utility>

#include "kernels/base/status_macros.h"
#include "services/state_store/catalog/keys.h"
#include "services/state_store/catalog/row_catalog.h"
#include "services/state_store/catalog/session_rows.h"

namespace rwkv::state_store {

absl::StatusOr<std::vector<IdleSession>> RowCatalog::OldestSessions(absl::Time idle_before, int limit) {
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<RowReader> rows, rows_->Read());
  const View view(rows.get());
  std::vector<IdleSession> oldest;
  int seen = 0;
  const auto visit = [&](absl::string_view key, absl::string_view) -> absl::StatusOr<bool> {
    if (seen == limit) return false;
    IdleSession idle;
    idle.session_id = std::string(IdleSessionId(key));
    SessionRow row;
    const absl::StatusOr<bool> read = view.Get(SessionKey(idle.session_id), &row);
    if (absl::IsDataLoss(read.status())) return true;  // It stays, and is in nobody's way.
    RWKV_ASSIGN_OR_RETURN(const bool found, read);
    ++seen;
    idle.idle_since = IdleSince(row);
    idle.turn_open = row.has_open_turn();
    if (found && idle.idle_since <= idle_before) oldest.push_back(std::move(idle));
    return true;
  };
  RWKV_RETURN_IF_ERROR(view.Scan("u", IdleKey(IdleMinute(idle_before) + 1, ""), visit));
  const auto longer = [](const IdleSession& a, const IdleSession& b) { return a.idle_since < b.idle_since; };
  std::stable_sort(oldest.begin(), oldest.end(), longer);
  return oldest;
}

absl::StatusOr<bool> RowCatalog::EndIdleSession(const std::string& session_id, absl::Time idle_before,
                                                std::vector<std::string>* freed) {
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<RowTransaction> rows, Begin({session_id}));
  const View view(rows.get());
  SessionRow row;
  RWKV_ASSIGN_OR_RETURN(const bool found, view.Get(SessionKey(session_id), &row));
  if (!found || IdleSince(row) > idle_before || row.has_open_turn()) return false;
  RWKV_RETURN_IF_ERROR(Erase(*rows, session_id, row, freed));
  return true;
}

absl::StatusOr<bool> RowCatalog::EndIdleTurn(const std::string& session_id, absl::Time idle_before) {
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<RowTransaction> rows, Begin({session_id}));
  const View view(rows.get());
  SessionRow row;
  RWKV_ASSIGN_OR_RETURN(const bool found, view.Get(SessionKey(session_id), &row));
  if (!found || IdleSince(row) > idle_before || !row.has_open_turn()) return false;
  Edit edit(rows.get());
  RWKV_RETURN_IF_ERROR(FinishOpenTurn(view, edit, session_id, row, v1::FINISH_REASON_CANCELLED, nullptr));
  row.set_use_unix_nanos(absl::ToUnixNanos(clock_->Now()));
  PutSession(edit, session_id, row);
  RWKV_RETURN_IF_ERROR(rows->Commit());
  return true;
}

}  // namespace rwkv::state_store
