#include "services/state_store/catalog/catalog_rows.h"

#include <algorithm>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "services/common/grpc_status.h"
#include "services/state_store/catalog/keys.h"

namespace rwkv::state_store {
namespace {

constexpr size_t kMaxChunkTokens = 16384;          // Of one row, so that reading a few tokens stays cheap.
constexpr uint64_t kMaxTurnLogprobs = 768 * 1024;  // 3 MiB of the 4 MiB a message may have.

google::protobuf::Timestamp ToTimestamp(int64_t unix_nanos) {
  google::protobuf::Timestamp timestamp;
  timestamp.set_seconds(unix_nanos / 1000000000);
  timestamp.set_nanos(static_cast<int32_t>(unix_nanos % 1000000000));
  return timestamp;
}

}  // namespace

absl::Status AddSnapshotPositions(const View& view, const SessionRow& row, const std::vector<Link>& chain,
                                  const std::vector<std::string>& freed, v1::Session* session) {
  if (row.has_base_position()) session->add_snapshot_positions(row.base_position());
  for (auto link = chain.rbegin(); link != chain.rend(); ++link) {
    RWKV_ASSIGN_OR_RETURN(const std::vector<SnapshotAt> snapshots,
                          view.Snapshots(link->branch, link->begin, std::min(link->end, row.length())));
    for (const SnapshotAt& snapshot : snapshots) {
      if (std::find(freed.begin(), freed.end(), snapshot.manifest.snapshot_id()) != freed.end()) continue;
      session->add_snapshot_positions(snapshot.position);
    }
  }
  return absl::OkStatus();
}

v1::Session ToSession(absl::string_view session_id, const SessionRow& row) {
  v1::Session session;
  session.set_id(std::string(session_id));
  session.set_model_fingerprint(row.model_fingerprint());
  session.set_token_count(row.length());
  *session.mutable_create_time() = ToTimestamp(row.create_unix_nanos());
  *session.mutable_update_time() = ToTimestamp(row.update_unix_nanos());
  session.set_forked_from(row.forked_from());
  session.set_fork_position(row.fork_position());
  session.set_open_request_id(row.open_turn().request_id());
  session.set_initial_state(row.initial_state());
  if (row.has_base_position()) session.set_base_position(row.base_position());
  session.set_log_begin(row.log_begin());
  return session;
}

absl::StatusOr<v1::Session> ToSessionWithSnapshots(const View& view, absl::string_view session_id,
                                                   const SessionRow& row) {
  v1::Session session = ToSession(session_id, row);
  RWKV_ASSIGN_OR_RETURN(const std::vector<Link> chain, view.Chain(row));
  RWKV_RETURN_IF_ERROR(AddSnapshotPositions(view, row, chain, {}, &session));
  return session;
}

std::string FamilyLock(uint64_t family) { return absl::StrCat("family ", family); }

std::string SnapshotLock(absl::string_view snapshot_id) { return absl::StrCat("snapshot ", snapshot_id); }

absl::Status CheckNotCondemned(const View& view, absl::string_view snapshot_id) {
  RWKV_ASSIGN_OR_RETURN(const absl::optional<std::string> condemned, view.Get(CondemnedKey(snapshot_id)));
  if (!condemned.has_value()) return absl::OkStatus();
  return absl::DataLossError(
      absl::StrCat("snapshot ", snapshot_id, " was not committed for so long that its records are being deleted"));
}

std::string LogBranch(const SessionRow& row) { return absl::StrCat(row.branch()); }

absl::Status OtherBranch(absl::string_view session_id, const SessionRow& row, absl::string_view log_branch) {
  return common::WithErrorInfo(absl::AbortedError(absl::StrCat("session ", session_id, " is on log branch ",
                                                               LogBranch(row), ", not ", log_branch)),
                               "OTHER_BRANCH");
}

absl::Status CheckLease(const v1::Lease& lease, const SessionRow& row) {
  const LeaseRow& current = row.lease();
  if (lease.fencing_token() == current.fencing_token() && !current.holder().empty()) return absl::OkStatus();
  const std::string held = current.holder().empty() ? "which was released" : absl::StrCat("held by ", current.holder());
  return common::WithErrorInfo(
      absl::AbortedError(absl::StrCat("session ", lease.session_id(), ": fencing token ", lease.fencing_token(),
                                      " is not the current one, ", current.fencing_token(), ", ", held)),
      "LEASE_LOST");
}

absl::Status CheckLoss(const std::string& session_id, const SessionRow& row) {
  if (row.loss().empty()) return absl::OkStatus();
  return absl::DataLossError(absl::StrCat("session ", session_id, " was damaged: ", row.loss(), "; it has ",
                                          row.length(), " tokens: rewind it to go on from there, or delete it"));
}

absl::Status CheckModel(const std::string& session_id, const SessionRow& row, absl::string_view model_fingerprint) {
  if (row.model_fingerprint().empty() || row.model_fingerprint() == model_fingerprint) return absl::OkStatus();
  return common::WithErrorInfo(
      absl::FailedPreconditionError(absl::StrCat("session ", session_id, " belongs to model ", row.model_fingerprint(),
                                                 ", not to ", model_fingerprint)),
      "OTHER_MODEL");
}

absl::Status CheckPosition(const std::string& session_id, const SessionRow& row, uint64_t position,
                           absl::string_view verb) {
  if (position > row.length()) {
    return absl::OutOfRangeError(
        absl::StrCat("session ", session_id, " has ", row.length(), " tokens; it cannot be ", verb, " ", position));
  }
  if (!row.has_base_position() || position >= row.base_position()) return absl::OkStatus();
  return absl::OutOfRangeError(absl::StrCat("session ", session_id, " began with an imported state at position ",
                                            row.base_position(), "; it cannot be ", verb, " ", position,
                                            ", which is before it"));
}

void PutTokens(Edit& edit, uint64_t branch, uint64_t begin, absl::Span<const uint32_t> token_ids,
               absl::Span<const float> logprobs) {
  while (!token_ids.empty()) {
    const size_t count = std::min(token_ids.size(), kMaxChunkTokens);
    edit.Put(LogKey(branch, begin),
             EncodeChunk(token_ids.first(count), logprobs.first(std::min(count, logprobs.size()))));
    begin += count;
    token_ids.remove_prefix(count);
    logprobs.remove_prefix(std::min(count, logprobs.size()));
  }
}

uint64_t TurnEnd(const TurnRow& turn, const SessionRow& row) {
  return turn.finished() ? turn.begin() + turn.prompt_count() + turn.token_count() : row.length();
}

absl::StatusOr<v1::Turn> ToTurn(const View& view, const SessionRow& row, const TurnRow& stored) {
  v1::Turn turn;
  turn.set_request_id(stored.request_id());
  turn.set_begin(stored.begin());
  turn.set_prompt_count(stored.prompt_count());
  const uint64_t begin = stored.begin() + stored.prompt_count();
  const uint64_t end = TurnEnd(stored, row);
  turn.set_token_count(end - begin);
  turn.set_state(stored.finished() ? v1::TURN_STATE_FINISHED : v1::TURN_STATE_OPEN);
  turn.set_finish_reason(static_cast<v1::FinishReason>(stored.finish_reason()));
  turn.set_spec(stored.spec());
  if (stored.has_stop_token_id()) turn.set_stop_token_id(stored.stop_token_id());
  turn.set_stop_string(stored.stop_string());
  if (stored.error_code() != 0) {
    turn.mutable_error()->set_code(stored.error_code());
    turn.mutable_error()->set_message(stored.error_message());
  }
  RWKV_ASSIGN_OR_RETURN(const std::vector<Link> chain, view.Chain(row));
  RWKV_ASSIGN_OR_RETURN(const LogChunk log, view.ReadLog(chain, begin, std::min(end, begin + kMaxTurnLogprobs), true));
  turn.mutable_logprobs()->Add(log.logprobs.begin(), log.logprobs.end());
  return turn;
}

absl::Status ForEachTurn(const View& view, const std::string& session_id,
                         absl::FunctionRef<void(absl::string_view key, const TurnRow& turn)> visit) {
  return view.Scan(TurnKey(session_id, 0), TurnKey(session_id, UINT64_MAX),
                   [&](absl::string_view key, absl::string_view value) -> absl::StatusOr<bool> {
                     TurnRow turn;
                     if (!turn.ParseFromArray(value.data(), static_cast<int>(value.size()))) {
                       return absl::DataLossError(absl::StrCat("session ", session_id, ": a turn's row is corrupt"));
                     }
                     visit(key, turn);
                     return true;
                   });
}

}  // namespace rwkv::state_store
