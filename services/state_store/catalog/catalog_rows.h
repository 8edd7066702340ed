// What the parts of the catalog share: rows as messages, what is refused of a session, and its log.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "proto/rwkv/v1/sessions.pb.h"
#include "proto/rwkv/v1/state_store.pb.h"
#include "services/state_store/catalog/view.h"

namespace rwkv::state_store {

v1::Session ToSession(absl::string_view session_id, const SessionRow& row);
// The positions of the snapshots that a session of this row can reach: those of `chain` up to its length, less `freed`.
// The chain may be that of the session that it is about to share with.
absl::Status AddSnapshotPositions(const View& view, const SessionRow& row, const std::vector<Link>& chain,
                                  const std::vector<std::string>& freed, v1::Session* session);
absl::StatusOr<v1::Session> ToSessionWithSnapshots(const View& view, absl::string_view session_id,
                                                   const SessionRow& row);

// With the log-probabilities of what it generated, as many as a message may have.
absl::StatusOr<v1::Turn> ToTurn(const View& view, const SessionRow& row, const TurnRow& stored);

// Behind its last token; of an open turn the log's end.
uint64_t TurnEnd(const TurnRow& turn, const SessionRow& row);

// The turns of a session, oldest first.
absl::Status ForEachTurn(const View& view, const std::string& session_id,
                         absl::FunctionRef<void(absl::string_view key, const TurnRow& turn)> visit);

// Held, after the session's lock, to change what sessions that came from one by forking share.
std::string FamilyLock(uint64_t family);
// Held with the former, to decide whether a snapshot may be committed.
std::string SnapshotLock(absl::string_view snapshot_id);
// kDataLoss: its records are being deleted.
absl::Status CheckNotCondemned(const View& view, absl::string_view snapshot_id);

// Whether the prefix cache has it. One whose row is damaged it has not.
absl::StatusOr<bool> HasPrefix(RowReader& rows, absl::string_view snapshot_id);

// Adds what a session used, which is about to be deleted, to what its tenant's deleted ones did; takes a lock.
absl::Status KeepUsage(RowTransaction& rows, Edit& edit, absl::string_view session_id, const SessionRow& row);

// The name that clients know the session's branch by.
std::string LogBranch(const SessionRow& row);
// kAborted: the session is not on the branch that a caller thinks.
absl::Status OtherBranch(absl::string_view session_id, const SessionRow& row, absl::string_view log_branch);

// kAborted: the lease is not the session's.
absl::Status CheckLease(const v1::Lease& lease, const SessionRow& row);
// kDataLoss: a repair found the session to be older than what was acknowledged, and nobody has rewound it since.
absl::Status CheckLoss(const std::string& session_id, const SessionRow& row);
// kFailedPrecondition: the session is another model's.
absl::Status CheckModel(const std::string& session_id, const SessionRow& row, absl::string_view model_fingerprint);
// kOutOfRange: the session cannot be forked at, or rewound to, the position; `verb` says which.
absl::Status CheckPosition(const std::string& session_id, const SessionRow& row, uint64_t position,
                           absl::string_view verb);

// Tokens of a branch from position `begin` on; logprobs may be fewer.
void PutTokens(Edit& edit, uint64_t branch, uint64_t begin, absl::Span<const uint32_t> token_ids,
               absl::Span<const float> logprobs);

}  // namespace rwkv::state_store
