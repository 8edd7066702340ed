#include "services/router/core/turn_opening.h"

#include <algorithm>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "services/common/grpc_status.h"
#include "services/router/core/turn_input.h"

namespace rwkv::router {
namespace {

// Of a session's past, for the penalties of a turn that goes on from it.
constexpr uint64_t kMaxCountedTokens = 1 << 19;

// Whether a turn that named `named` (in full; empty: nothing) may go on with a session that began with `initial_state`.
absl::Status CheckSessionState(const std::string& session_id, const std::string& initial_state,
                               const std::string& named, const v1::ModelInfo& model) {
  if (const absl::Status status = CheckOffered(initial_state, model); !status.ok()) {
    return common::Annotate(status, absl::StrCat("session \"", session_id, "\""));
  }
  if (named.empty() || named == initial_state) return absl::OkStatus();
  return common::InvalidFieldError(
      "initial_state",
      absl::StrCat(named, "; the session began with ", initial_state.empty() ? "the model's own" : initial_state));
}

// What is known of a session before its turn begins.
struct Known {
  uint64_t tokens = 0;
  std::string state;
  absl::optional<uint64_t> base;
  uint64_t log_begin = 0;
};

class Opening {
 public:
  Opening(const OpeningRequest& request, absl::Time deadline, state_store::CatalogClient* catalog)
      : request_(request), deadline_(deadline), catalog_(catalog), begin_(request.begin) {}

  Opened Run() {
    opened_.status = TakeAndBegin(request_.lease.has_value());
    // The lease had run out; nobody else may have it yet.
    if (absl::IsAborted(opened_.status) && request_.lease.has_value()) opened_.status = TakeAndBegin(false);
    if (opened_.status.ok() && request_.begins) opened_.status = Read();
    return std::move(opened_);
  }

 private:
  const std::string& session_id() const { return request_.acquire.session_id(); }

  absl::Status TakeAndBegin(bool held) {
    Known session = {request_.session_tokens, request_.session_state, request_.session_base,
                     request_.session_log_begin};
    if (held) {
      *begin_.mutable_lease() = *request_.lease;
    } else {
      RWKV_ASSIGN_OR_RETURN(v1::AcquireLeaseResponse lease, catalog_->AcquireLease(request_.acquire, deadline_));
      session = {lease.session().token_count(), lease.session().initial_state(), BasePosition(lease.session()),
                 lease.session().log_begin()};
      *begin_.mutable_lease() = lease.lease();
      opened_.lease = std::move(lease);
    }
    if (session.base.has_value() && !request_.named_state.empty()) {
      return common::InvalidFieldError(
          "initial_state", absl::StrCat(request_.named_state, "; the session began with an imported state"));
    }
    RWKV_RETURN_IF_ERROR(CheckSessionState(session_id(), session.state, request_.named_state, request_.model));
    if (!request_.begins) return absl::OkStatus();
    opened_.spec = request_.spec;
    RWKV_RETURN_IF_ERROR(CheckNew(session));
    if (opened_.spec.sampling().penalize_prompt()) opened_.spec.set_counts_from(FirstCounted(session));
    begin_.set_spec(opened_.spec.SerializeAsString());
    RWKV_ASSIGN_OR_RETURN(opened_.begun, catalog_->BeginTurn(begin_, deadline_));
    return absl::OkStatus();
  }

  bool HasInput() const { return begin_.token_ids_size() > 0; }

  // What a turn that would begin at `position` must satisfy. One that the session knows was accepted before.
  absl::Status CheckNew(const Known& session) {
    const uint64_t position = session.tokens;
    if (request_.resume_from == 0 && HasInput() && request_.model.max_context_tokens() == 0) return absl::OkStatus();
    if (request_.named) {
      RWKV_ASSIGN_OR_RETURN(const absl::optional<v1::Turn> known, Find(begin_.request_id()));
      if (known.has_value()) return absl::OkStatus();
    }
    if (request_.resume_from > 0) {
      return absl::OutOfRangeError(absl::StrCat("resume_from ", request_.resume_from, ": session \"", session_id(),
                                                "\" knows no turn with the request_id \"", begin_.request_id(), "\""));
    }
    if (!HasInput() && position == session.base.value_or(0)) {
      return common::InvalidFieldError(
          "input", absl::StrCat("is missing, and session \"", session_id(), "\" has no tokens to go on from",
                                session.base.has_value() ? " after the imported state" : ""));
    }
    RWKV_RETURN_IF_ERROR(CheckContext(request_.input_field, position, begin_.token_ids_size(),
                                      request_.spec.max_tokens(), request_.model));
    return HasInput() ? absl::OkStatus() : GoOnFrom(session);
  }

  // The oldest token that the penalties of a turn may count.
  static uint64_t FirstCounted(const Known& session) {
    return std::max(session.log_begin, session.tokens - std::min(session.tokens, kMaxCountedTokens));
  }

  // A turn without input, right after another, is its continuation: it draws and counts as if it were one with it.
  absl::Status GoOnFrom(const Known& session) {
    const uint64_t position = session.tokens;
    uint64_t counts_from = position;
    RWKV_ASSIGN_OR_RETURN(const absl::optional<v1::Turn> newest, Find(""));
    if (newest.has_value() && newest->begin() + newest->prompt_count() + newest->token_count() == position) {
      v1::TurnSpec spec;
      if (!spec.ParseFromString(newest->spec())) {
        return absl::DataLossError(absl::StrCat("session \"", session_id(), "\": the spec of turn \"",
                                                newest->request_id(), "\" in the log cannot be read"));
      }
      counts_from = spec.has_counts_from() ? spec.counts_from() : newest->begin() + newest->prompt_count();
      if (request_.spec.seed_drawn()) opened_.spec.mutable_sampling()->set_seed(spec.sampling().seed());
    }
    opened_.spec.set_counts_from(std::max(counts_from, FirstCounted(session)));
    return absl::OkStatus();
  }

  absl::StatusOr<absl::optional<v1::Turn>> Find(const std::string& request_id) {
    v1::FindTurnRequest find;
    find.set_session_id(session_id());
    find.set_request_id(request_id);
    RWKV_ASSIGN_OR_RETURN(v1::FindTurnResponse found, catalog_->FindTurn(find, deadline_));
    if (!found.has_turn()) return absl::optional<v1::Turn>();
    return absl::make_optional(std::move(*found.mutable_turn()));
  }

  absl::StatusOr<std::vector<uint32_t>> ReadLog(uint64_t begin, uint64_t end) {
    v1::ReadTokensRequest read;
    read.set_session_id(session_id());
    read.set_begin(begin);
    read.set_end(end);
    return catalog_->ReadTokens(read, deadline_);
  }

  absl::Status Read() {
    const v1::Turn& turn = opened_.begun.turn();
    if (opened_.begun.existed()) {
      if (!opened_.spec.ParseFromString(turn.spec())) {
        return absl::DataLossError(absl::StrCat("session \"", session_id(), "\": the spec of turn \"",
                                                turn.request_id(), "\" in the log cannot be read"));
      }
      // A turn with another number of input tokens is refused without being read.
      if (turn.prompt_count() != begin_.token_ids_size()) return absl::OkStatus();
      RWKV_ASSIGN_OR_RETURN(opened_.logged,
                            ReadLog(turn.begin(), turn.begin() + turn.prompt_count() + turn.token_count()));
    }
    if (opened_.spec.has_counts_from() && opened_.spec.counts_from() < turn.begin()) {
      RWKV_ASSIGN_OR_RETURN(opened_.counted, ReadLog(opened_.spec.counts_from(), turn.begin()));
    }
    return absl::OkStatus();
  }

  const OpeningRequest& request_;
  const absl::Time deadline_;
  state_store::CatalogClient* const catalog_;
  v1::BeginTurnRequest begin_;
  Opened opened_;
};

}  // namespace

absl::optional<uint64_t> BasePosition(const v1::Session& session) {
  return session.has_base_position() ? absl::make_optional(session.base_position()) : absl::nullopt;
}

absl::Status BaseLost(const std::string& session_id, uint64_t position, absl::string_view why) {
  return absl::DataLossError(absl::StrCat("session \"", session_id, "\" was imported with a state at position ",
                                          position, ", which cannot be read any more: ", why));
}

Opened Open(const OpeningRequest& request, absl::Time deadline, state_store::CatalogClient* catalog) {
  return Opening(request, deadline, catalog).Run();
}

}  // namespace rwkv::router
