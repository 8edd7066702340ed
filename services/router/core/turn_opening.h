// Taking a turn's session and its place in the log: what a turn asks of the state store before anything is computed.
// Whatever can be refused is refused here before BeginTurn: a refused call leaves no trace in the session.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "rwkv/v1/common.pb.h"
#include "rwkv/v1/state_store.pb.h"
#include "rwkv/v1/turn_spec.pb.h"
#include "services/state_store/client/state_store_client.h"

namespace rwkv::router {

struct OpeningRequest {
  v1::AcquireLeaseRequest acquire;
  // What is known of the session if its lease is held already. Unset lease: it is acquired, and says.
  absl::optional<v1::Lease> lease;
  uint64_t session_tokens = 0;
  std::string session_state;  // The tuned state it began with.
  absl::optional<uint64_t> session_base;
  uint64_t session_log_begin = 0;

  bool begins = true;          // False: the session is only taken, for an export.
  v1::BeginTurnRequest begin;  // Without lease and spec. No token_ids: it goes on from what the session has.
  v1::TurnSpec spec;
  bool named = false;  // The client gave the request_id, so the turn may be known.
  uint64_t resume_from = 0;
  std::string named_state;  // The tuned state that the request names, in full; empty: none.
  std::string input_field;  // Of the request, for messages.
  v1::ModelInfo model;      // The one that is served.
};

struct Opened {
  absl::Status status;
  absl::optional<v1::AcquireLeaseResponse> lease;  // If it was acquired, also if something failed later.
  v1::BeginTurnResponse begun;
  v1::TurnSpec spec;             // As it is in the log.
  std::vector<uint32_t> logged;  // Of a known turn: its input and what it generated.
  // Tokens of the log before the turn that count as generated in it (TurnSpec.counts_from).
  std::vector<uint32_t> counted;
};

// Unset: the session stands on no imported state.
absl::optional<uint64_t> BasePosition(const v1::Session& session);
// kDataLoss, for whoever needs the state that a session was imported with, which no log stands for.
absl::Status BaseLost(const std::string& session_id, uint64_t position, absl::string_view why);

// Blocks until `deadline` at most. Errors: those of the store, and
//   kOutOfRange: resume_from is beyond a turn's tokens, or of a turn that the session does not know.
//   kInvalidArgument: another tuned state than the session's; nothing to go on from; more tokens than the model takes.
//   kFailedPrecondition: the model does not offer the session's tuned state.  kDataLoss: a spec that cannot be read.
Opened Open(const OpeningRequest& request, absl::Time deadline, state_store::CatalogClient* catalog);

}  // namespace rwkv::router
