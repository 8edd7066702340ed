#include "services/state_store/catalog/session_rows.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "services/state_store/catalog/keys.h"

namespace rwkv::state_store {
namespace {

int64_t LastUse(const SessionRow& row) { return std::max(row.update_unix_nanos(), row.use_unix_nanos()); }

}  // namespace

uint64_t IdleMinute(absl::Time time) {
  return static_cast<uint64_t>(std::max<int64_t>(1, absl::ToUnixSeconds(time) / 60));
}

bool IsIndexed(const SessionRow& row) { return row.idle_minute() == IdleMinute(absl::FromUnixNanos(LastUse(row))); }

void PutSession(Edit& edit, absl::string_view session_id, SessionRow& row) {
  const uint64_t minute = IdleMinute(absl::FromUnixNanos(LastUse(row)));
  if (minute != row.idle_minute()) {
    if (row.idle_minute() != 0) edit.Delete(IdleKey(row.idle_minute(), session_id));
    edit.Put(IdleKey(minute, session_id), "");
    row.set_idle_minute(minute);
  }
  edit.Put(SessionKey(session_id), row);
}

void DeleteSession(Edit& edit, absl::string_view session_id, const SessionRow& row) {
  edit.Delete(IdleKey(row.idle_minute(), session_id));
  edit.Delete(SessionKey(session_id));
}

absl::Time IdleSince(const SessionRow& row) {
  int64_t since = LastUse(row);
  if (!row.lease().holder().empty()) since = std::max(since, row.lease().expiry_unix_nanos());
  return absl::FromUnixNanos(since);
}

absl::Status FinishOpenTurn(const View& view, Edit& edit, const std::string& session_id, SessionRow& row,
                            v1::FinishReason reason, const v1::AppendItem* item) {
  const std::string key = TurnKey(session_id, row.open_turn().sequence());
  TurnRow turn;
  RWKV_ASSIGN_OR_RETURN(const bool found, view.Get(key, &turn));
  if (!found) return absl::DataLossError(absl::StrCat("session ", session_id, ": its open turn has no row"));
  turn.set_token_count(row.length() - turn.begin() - turn.prompt_count());
  turn.set_finished(true);
  turn.set_finish_reason(reason);
  if (item != nullptr) {
    if (item->has_stop_token_id()) turn.set_stop_token_id(item->stop_token_id());
    turn.set_stop_string(item->stop_string());
    turn.set_error_code(item->error().code());
    turn.set_error_message(item->error().message());
  }
  edit.Put(key, turn);
  row.clear_open_turn();
  return absl::OkStatus();
}

}  // namespace rwkv::state_store
