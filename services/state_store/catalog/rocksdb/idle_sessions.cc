// What RocksdbCatalog does with sessions that nobody uses.
#include <algorithm>
#include <utility>

#include "kernels/base/status_macros.h"
#include "services/state_store/catalog/rocksdb/keys.h"
#include "services/state_store/catalog/rocksdb/rocksdb_catalog.h"
#include "services/state_store/catalog/rocksdb/session_rows.h"

namespace rwkv::state_store {

absl::StatusOr<std::vector<IdleSession>> RocksdbCatalog::OldestSessions(absl::Time idle_before, int limit) {
  RWKV_ASSIGN_OR_RETURN(const View view, View::Open(*database_, View::At::kOnce));
  std::vector<IdleSession> oldest;
  int seen = 0;
  const auto visit = [&](absl::string_view key, absl::string_view) -> absl::StatusOr<bool> {
    if (seen++ == limit) return false;
    IdleSession idle;
    idle.session_id = std::string(IdleSessionId(key));
    SessionRow row;
    RWKV_ASSIGN_OR_RETURN(const bool found, view.Get(SessionKey(idle.session_id), &row));
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

absl::StatusOr<bool> RocksdbCatalog::EndIdleSession(const std::string& session_id, absl::Time idle_before,
                                                    std::vector<std::string>* freed) {
  RWKV_ASSIGN_OR_RETURN(const KeyLocks::Guard guard, LockSession(session_id));
  SessionRow row;
  uint64_t opening;
  {
    RWKV_ASSIGN_OR_RETURN(const View view, View::Open(*database_, View::At::kLatest));
    opening = view.opening();
    RWKV_ASSIGN_OR_RETURN(const bool found, view.Get(SessionKey(session_id), &row));
    if (!found || IdleSince(row) > idle_before || row.has_open_turn()) return false;
  }
  RWKV_RETURN_IF_ERROR(Erase(session_id, row, opening, freed));
  return true;
}

absl::StatusOr<bool> RocksdbCatalog::EndIdleTurn(const std::string& session_id, absl::Time idle_before) {
  RWKV_ASSIGN_OR_RETURN(const KeyLocks::Guard guard, LockSession(session_id));
  RWKV_ASSIGN_OR_RETURN(View view, View::Open(*database_, View::At::kLatest));
  SessionRow row;
  RWKV_ASSIGN_OR_RETURN(const bool found, view.Get(SessionKey(session_id), &row));
  if (!found || IdleSince(row) > idle_before || !row.has_open_turn()) return false;
  Edit edit(view);
  RWKV_RETURN_IF_ERROR(FinishOpenTurn(view, edit, session_id, row, v1::FINISH_REASON_CANCELLED, nullptr));
  row.set_use_unix_nanos(absl::ToUnixNanos(clock_->Now()));
  PutSession(edit, session_id, row);
  RWKV_RETURN_IF_ERROR(database_->Write(std::move(view).Close(), edit.batch(), Durability::kSynced));
  return true;
}

}  // namespace rwkv::state_store
