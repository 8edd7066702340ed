// What RowCatalog does with turns and their tokens.
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

absl::StatusOr<TurnStart> RowCatalog::BeginTurn(const v1::Lease& lease, const NewTurn& turn) {
  const std::string& session_id = lease.session_id();
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<RowTransaction> rows, Begin({session_id}));
  const View view(rows.get());
  RWKV_ASSIGN_OR_RETURN(SessionRow row, Find(view, session_id));
  if (absl::Status status = CheckLease(lease, row); !status.ok()) {
    fenced_total_.Increment();
    return status;
  }
  RWKV_RETURN_IF_ERROR(CheckLoss(session_id, row));
  RWKV_RETURN_IF_ERROR(CheckModel(session_id, row, turn.model_fingerprint));

  absl::optional<TurnRow> existing;
  std::vector<std::string> turn_keys;
  RWKV_RETURN_IF_ERROR(ForEachTurn(view, session_id, [&](absl::string_view key, const TurnRow& stored) {
    turn_keys.emplace_back(key);
    if (stored.request_id() == turn.request_id) existing = stored;
  }));
  TurnStart start;
  if (existing.has_value()) {
    RWKV_ASSIGN_OR_RETURN(start.turn, ToTurn(view, row, *existing));
    start.existed = true;
    start.session_tokens = row.length();
    return start;
  }
  if (turn.token_ids.size() > kMaxLogTokens - row.length()) {
    return absl::OutOfRangeError(absl::StrCat("session ", session_id, " has ", row.length(), " tokens; ",
                                              turn.token_ids.size(), " more are over the limit of ", kMaxLogTokens));
  }

  Edit edit(rows.get());
  if (row.has_open_turn()) {
    RWKV_RETURN_IF_ERROR(FinishOpenTurn(view, edit, session_id, row, v1::FINISH_REASON_CANCELLED, nullptr));
  }
  for (size_t i = 0; i + kTurnsKept <= turn_keys.size(); ++i) edit.Delete(turn_keys[i]);
  TurnRow stored;
  stored.set_request_id(std::string(turn.request_id));
  stored.set_begin(row.length());
  stored.set_prompt_count(turn.token_ids.size());
  stored.set_spec(std::string(turn.spec));
  OpenTurn& open = *row.mutable_open_turn();
  open.set_sequence(row.next_turn());
  open.set_request_id(stored.request_id());
  open.set_begin(stored.begin());
  open.set_prompt_count(stored.prompt_count());
  row.set_next_turn(row.next_turn() + 1);
  edit.Put(TurnKey(session_id, open.sequence()), stored);
  PutTokens(edit, row.branch(), row.length(), turn.token_ids, {});
  row.set_length(row.length() + turn.token_ids.size());
  row.set_model_fingerprint(std::string(turn.model_fingerprint));
  UsageRow& usage = *row.mutable_usage();
  usage.set_turns(usage.turns() + 1);
  usage.set_prompt_tokens(usage.prompt_tokens() + turn.token_ids.size());
  row.set_update_unix_nanos(absl::ToUnixNanos(clock_->Now()));
  PutSession(edit, session_id, row);
  RWKV_RETURN_IF_ERROR(rows->Commit());
  tokens_total_.Increment(static_cast<double>(turn.token_ids.size()));
  Count(0, 0, 0, static_cast<int64_t>(turn.token_ids.size()));

  start.turn.set_request_id(stored.request_id());
  start.turn.set_begin(stored.begin());
  start.turn.set_prompt_count(stored.prompt_count());
  start.turn.set_state(v1::TURN_STATE_OPEN);
  start.turn.set_spec(stored.spec());
  start.session_tokens = row.length();
  return start;
}

std::vector<absl::Status> RowCatalog::AppendTokens(absl::Span<const v1::AppendItem* const> items) {
  std::vector<absl::Status> statuses(items.size());
  const auto all_fail = [&](const absl::Status& status) {
    for (absl::Status& item_status : statuses) {
      if (item_status.ok()) item_status = status;
    }
    return statuses;
  };
  std::vector<std::string> session_ids;
  for (const v1::AppendItem* item : items) session_ids.push_back(item->lease().session_id());
  const absl::StatusOr<std::unique_ptr<RowTransaction>> rows = Begin(session_ids);
  if (!rows.ok()) return all_fail(rows.status());
  const View view(rows->get());
  Edit edit(rows->get());
  const int64_t now = absl::ToUnixNanos(clock_->Now());
  size_t tokens = 0;
  const auto append = [&](const v1::AppendItem& item) -> absl::Status {
    const std::string& session_id = item.lease().session_id();
    RWKV_ASSIGN_OR_RETURN(SessionRow row, Find(view, session_id));
    if (absl::Status status = CheckLease(item.lease(), row); !status.ok()) {
      fenced_total_.Increment();
      return status;
    }
    RWKV_RETURN_IF_ERROR(CheckLoss(session_id, row));
    if (!row.has_open_turn() || row.open_turn().request_id() != item.request_id()) {
      return common::WithErrorInfo(
          absl::AbortedError(absl::StrCat("session ", session_id, ": turn ", item.request_id(), " is not open",
                                          row.has_open_turn() ? "; open is " : "", row.open_turn().request_id())),
          "TURN_NOT_OPEN");
    }
    if (row.length() != item.expected_length()) {
      return common::WithErrorInfo(absl::AbortedError(absl::StrCat("session ", session_id, " has ", row.length(),
                                                                   " tokens, not ", item.expected_length())),
                                   "WRONG_LENGTH");
    }
    if (item.token_ids_size() > static_cast<int64_t>(kMaxLogTokens - row.length())) {
      return absl::OutOfRangeError(
          absl::StrCat("session ", session_id, " has ", row.length(), " tokens; the limit is ", kMaxLogTokens));
    }
    if (item.token_ids().empty() && item.finish_reason() == v1::FINISH_REASON_UNSPECIFIED) return absl::OkStatus();
    const uint64_t begin = row.length();
    row.set_length(begin + item.token_ids_size());
    UsageRow& usage = *row.mutable_usage();
    usage.set_generated_tokens(usage.generated_tokens() + item.token_ids_size());
    row.set_update_unix_nanos(now);
    if (item.finish_reason() != v1::FINISH_REASON_UNSPECIFIED) {
      RWKV_RETURN_IF_ERROR(FinishOpenTurn(view, edit, session_id, row, item.finish_reason(), &item));
    }
    PutTokens(edit, row.branch(), begin, item.token_ids(), item.logprobs());
    PutSession(edit, session_id, row);
    tokens += item.token_ids_size();
    return absl::OkStatus();
  };
  for (size_t i = 0; i < items.size(); ++i) statuses[i] = append(*items[i]);
  if ((*rows)->empty()) return statuses;
  const absl::Status written = (*rows)->Commit();
  if (!written.ok()) return all_fail(written);
  tokens_total_.Increment(static_cast<double>(tokens));
  Count(0, 0, 0, static_cast<int64_t>(tokens));
  return statuses;
}

absl::StatusOr<absl::optional<v1::Turn>> RowCatalog::FindTurn(const std::string& session_id,
                                                              absl::string_view request_id) {
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<RowReader> rows, rows_->Read());
  const View view(rows.get());
  RWKV_ASSIGN_OR_RETURN(const SessionRow row, Find(view, session_id));
  RWKV_RETURN_IF_ERROR(CheckLoss(session_id, row));
  absl::optional<TurnRow> found;
  RWKV_RETURN_IF_ERROR(ForEachTurn(view, session_id, [&](absl::string_view key, const TurnRow& stored) {
    if (request_id.empty() || stored.request_id() == request_id) found = stored;
  }));
  // Who is told that it never was begins it again.
  const std::string& open = row.open_turn().request_id();
  const bool wants_open = row.has_open_turn() && (request_id.empty() || request_id == open);
  if (wants_open && (!found.has_value() || found->request_id() != open)) {
    return absl::DataLossError(absl::StrCat("session ", session_id, ": its open turn has no row"));
  }
  if (!found.has_value()) return absl::optional<v1::Turn>();
  RWKV_ASSIGN_OR_RETURN(v1::Turn turn, ToTurn(view, row, *found));
  return absl::make_optional(std::move(turn));
}

absl::StatusOr<TokenPage> RowCatalog::ReadTokens(const std::string& session_id, uint64_t begin, uint64_t end) {
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<RowReader> rows, rows_->Read());
  const View view(rows.get());
  RWKV_ASSIGN_OR_RETURN(const SessionRow row, Find(view, session_id));
  if (end > row.length()) {
    return absl::OutOfRangeError(absl::StrCat("session ", session_id, " has ", row.length(), " tokens; [", begin, ", ",
                                              end, ") is beyond them"));
  }
  if (begin < end && begin < row.log_begin()) {
    return absl::OutOfRangeError(absl::StrCat("session ", session_id, " was imported without its first ",
                                              row.log_begin(), " tokens; [", begin, ", ", end, ") has some of them"));
  }
  RWKV_ASSIGN_OR_RETURN(const std::vector<Link> chain, view.Chain(row));
  RWKV_ASSIGN_OR_RETURN(LogChunk log, view.ReadLog(chain, begin, end, false));
  return TokenPage{std::move(log.token_ids), LogBranch(row)};
}

}  // namespace rwkv::state_store
