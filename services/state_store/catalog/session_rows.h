// What every change of a session's row has in common.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "rwkv/v1/common.pb.h"
#include "rwkv/v1/state_store.pb.h"
#include "services/state_store/catalog/rows.pb.h"
#include "services/state_store/catalog/view.h"

namespace rwkv::state_store {

// Writes the row, and moves the session to its place among the idle ones.
void PutSession(Edit& edit, absl::string_view session_id, SessionRow& row);
// Takes both away.
void DeleteSession(Edit& edit, absl::string_view session_id, const SessionRow& row);

// Its last turn, rewind, fork or lease; with a lease that nobody gave back, that one's end.
absl::Time IdleSince(const SessionRow& row);
uint64_t IdleMinute(absl::Time time);
// Whether the row says so of itself what its key among the idle ones should be.
bool IsIndexed(const SessionRow& row);

// Ends the open turn at the log's end. `item` may be null.
absl::Status FinishOpenTurn(const View& view, Edit& edit, const std::string& session_id, SessionRow& row,
                            v1::FinishReason reason, const v1::AppendItem* item);

}  // namespace rwkv::state_store
