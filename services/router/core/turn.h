// What the core knows of one call and of one session. Data, owned by the core; what the core counts of turns, and which
// it has to look at, follows from it by itself.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "rwkv/v1/common.pb.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/state_store.pb.h"
#include "rwkv/v1/turn_spec.pb.h"
#include "services/router/core/answer.h"
#include "services/router/core/call_kind.h"
#include "services/router/core/patience.h"
#include "services/router/core/serving_model.h"
#include "services/router/core/turn_marks.h"
#include "services/router/core/turn_options.h"
#include "services/router/core/turn_tally.h"
#include "services/router/core/turn_trace.h"
#include "services/router/scheduler/scheduler.h"

namespace rwkv::router {

struct Session;
struct TurnLane;

// One call. One that generates with a session is a turn in the word's narrow sense; the others share its way through
// the pipeline.
struct Turn {
  // Where it stands with the pipeline.
  enum class Phase {
    kWaiting,    // Not started: no slot is free, too many run, or the session is busy closing.
    kOpening,    // The lease, the log: on the executor.
    kParked,     // No pipeline, or not before `not_before`.
    kLocating,   // Which snapshot: on the executor.
    kAttaching,  // In the scheduler, without a slot on every stage.
    kRunning,    // In the scheduler; can be fed.
    kYielded,    // Gave its slot away, or lost it and found none; in the line for the next.
    kComputed,   // Nothing left to compute: commits and messages may be.
  };

  uint64_t id = 0;
  std::unique_ptr<CallKind> kind;  // What it is for, and its client. Never null.
  absl::Time arrival;
  std::shared_ptr<const ServingModel> model;
  std::string tenant;          // Whose call it is; empty: nobody's in particular.
  std::string session_id;      // As the store knows it.
  Session* session = nullptr;  // From its start until it lets the session go.

  // What was asked for.
  std::string request_id;
  bool named = false;            // The client gave the request_id.
  std::vector<uint32_t> prompt;  // What is fed; empty: goes on from the log.
  std::string input_field;       // The field that the prompt came in, for messages.
  v1::TurnSpec spec;
  uint64_t resume_from = 0;
  // The tuned state it begins with, in full; empty: the model's own. With a session: what the request named (empty:
  // none) until the opening, from then on the session's.
  std::string initial_state;
  // With a log: tokens that may complete a stop string. Unset: too many, or any may.
  absl::optional<std::vector<uint32_t>> pause_token_ids = std::vector<uint32_t>();

  std::shared_ptr<TurnTrace> trace;  // Null: not traced.

  CallId call = 0;

  // Positions in the session's log (from 0 without a session): [begin, begin + prompt) is the input, then the answer.
  uint64_t begin = 0;
  absl::optional<Answer> answer;  // Of one that generates, from the opening on.
  std::vector<uint32_t> counted;  // Tokens of the log before it that the penalties count as generated in it; the
                                  // input, too, if sampling.penalize_prompt says so.
  absl::Status error;             // What the answer ended with, if its reason is ERROR.
  bool stopped = false;           // Ends without an end in the log: client gone, or an error.

  // The log.
  uint64_t durable = 0;         // Generated tokens that are committed.
  bool finish_durable = false;  // So is the end.
  bool abandoned = false;       // A commit failed for good: what is not durable is forgotten.
  bool committing = false;      // Part of the commit that is on its way.

  // The stream.
  uint64_t sent = 0;            // Index of the next token to send.
  bool waits_for_room = false;  // The stream is full and will say when it is not.
  absl::Time stalled_since = absl::InfiniteFuture();
  size_t stalled_at = 0;  // Messages in the stream when it was looked at last.

  // The pipeline.
  TurnLane* lane = nullptr;  // While it is in a scheduler.
  SequenceId sequence = 0;   // 0: not in a scheduler.
  absl::optional<SequenceId> warm_source;
  v1::SnapshotManifest snapshot;  // To attach from; snapshot_id empty: none.
  uint64_t attach_position = 0;
  int attach_answers_left = 0;
  absl::Time attach_since = absl::InfiniteFuture();
  Patience patience;
  bool no_warm = false;                              // A warm slot turned out not to be.
  bool no_snapshot = false;                          // None can be used: start fresh.
  uint64_t snapshot_limit = UINT64_MAX;              // Snapshots beyond it turned out unusable.
  absl::Time parked_since = absl::InfiniteFuture();  // Without being attached since.
  absl::Time not_before = absl::InfinitePast();
  absl::Time lost_since = absl::InfiniteFuture();  // Its pipeline; until it has a slot again.
  uint64_t lost_at = 0;                            // How far it had come by then.
  std::vector<uint32_t> tail;                      // The log's tokens [attach_position, begin), until they are fed.
  bool tail_pending = false;                       // Being read.
  uint64_t fed_end = 0;                            // The scheduler was given everything before this position.
  uint64_t planned_end = 0;  // Everything before this position is in commands, or decoded without.
  // Its worker has the token drawn last, and decodes up to planned_end without being asked.
  struct {
    bool on = false;
    bool paused = false;   // The worker waits until it is told that this one knows of the token drawn last.
    bool halting = false;  // It was told to stop, and has not done so yet, as far as is known here.
    absl::optional<uint64_t> stops_at;  // It said where, and results up to there are on their way.
    bool counted = false;               // In TurnLane::going.
  } going_on;
  uint64_t done_end = 0;              // Everything before this position has come back.
  uint64_t saved_position = 0;        // Of the last snapshot asked for, or attached from.
  int saves = 0;                      // Snapshots asked for and not yet there, or failed.
  bool attached_once = false;         // What was reused is known.
  absl::Time slot_since;              // When it got the slot it has.
  uint64_t progress_at_slot = 0;      // How far it had come by then.
  bool yielded = false;               // Has given its slot away, and none since.
  v1::SnapshotManifest own_snapshot;  // Without a session: its last one. No catalog knows of it.

  // The prefix cache.
  struct {
    std::vector<uint64_t> marks;  // As the request has them, in tokens.
    bool planned = false;         // `ends` is known.
    std::vector<uint64_t> ends;   // Where its state is kept, ascending.
    size_t next_end = 0;          // Of these, the first that is still to come.
    bool counted = false;         // What its lookup came to; it may be looked up again after a loss.
    bool attached = false;        // `snapshot` came from there.
    bool off = false;             // It did not work out: the input is read.
    std::string unusable;         // What it found then; goes before what is read takes its place.
  } prefix;

  // Results.
  uint64_t reused_tokens = 0;
  absl::optional<absl::Time> first_rows;
  absl::optional<absl::Time> first_token;
  absl::optional<absl::Time> last_token;

  bool HasLog() const { return kind->generates() && !session_id.empty(); }
  bool decided() const { return answer.has_value() && answer->finished(); }
  // Has a part of the slots: what may start depends on how many these are.
  bool Active() const {
    return phase_ != Phase::kWaiting && phase_ != Phase::kYielded && phase_ != Phase::kComputed && kind->takes_slot();
  }
  // All tokens that are known: those to be fed.
  uint64_t KnownEnd() const { return begin + prompt.size() + (answer.has_value() ? answer->size() : 0); }
  // How far a state may have come that this turn can go on from: a session's last token is fed by whoever needs what
  // comes after it, since a state that has seen everything says nothing any more.
  uint64_t StateEnd() const { return KnownEnd() - (HasLog() || WantsToken() ? 1 : 0); }
  uint32_t TokenAt(uint64_t position) const {
    if (position < begin) return tail[position - attach_position];
    const uint64_t i = position - begin;
    return i < prompt.size() ? prompt[i] : answer->ids()[i - prompt.size()];
  }
  uint64_t FeedEnd() const { return WantsToken() ? KnownEnd() : StateEnd(); }
  // Nothing of it is on its way to the log, or still to come there.
  bool IsCommitted() const {
    if (committing) return false;
    if (!HasLog() || abandoned || !answer.has_value()) return true;
    return durable == answer->size() && (!answer->finished() || finish_durable);
  }
  // Its worker may be at any position from done_end to planned_end.
  bool Going() const { return going_on.on && done_end < planned_end; }
  // The token after the last known one is wanted.
  bool WantsToken() const { return !stopped && answer.has_value() && !answer->finished() && spec.max_tokens() > 0; }

  Phase phase() const { return phase_; }
  void set_phase(Phase phase);
  // Of the lanes it may run on, fixed when it starts or by the log; see Pool.
  const std::string& pool() const { return pool_; }
  void set_pool(const std::string& pool);
  // Gives its slot away as soon as nothing of it is in flight.
  bool yielding() const { return yielding_; }
  void set_yielding(bool yielding);

  // It is one of those that are marked and counted there, or of none (null).
  void Watch(TurnMarks* marks, TurnTally* tally);
  // Something of it changes other than by its own sweep: the next sweep looks at it. TurnTable's Find() says so for
  // whoever asks it, those above for what they change.
  void Touch() const {
    if (marks_ != nullptr) marks_->Mark(id);
  }
  TurnMarks* marks() const { return marks_; }

 private:
  void Count(int by) const;

  Phase phase_ = Phase::kWaiting;
  std::string pool_;
  bool yielding_ = false;
  TurnMarks* marks_ = nullptr;
  TurnTally* tally_ = nullptr;
};

// A session that this router holds, or is about to hold, the lease of.
struct Session {
  std::string id;
  bool leased = false;
  bool stale = false;      // The log may have changed under the lease: read it again.
  bool releasing = false;  // On the executor.
  v1::Lease lease;
  std::string log_branch;
  std::string model_fingerprint;
  std::string initial_state;
  absl::optional<uint64_t> base_position;  // See v1::Session.
  uint64_t log_begin = 0;
  uint64_t durable_length = 0;  // Of the log, as far as this router knows.
  std::shared_ptr<Turn> turn;   // The one that has the session.
  std::shared_ptr<Turn> next;   // One that waits for it to close.
  int saves = 0;                // Snapshots that are not committed yet.
};

// A snapshot between SaveCommand and its manifest.
struct PendingSave {
  std::string snapshot_id;
  std::string session_id;
  v1::Lease lease;         // Its session's when it was asked for,
  std::string log_branch;  // and what it is a state of: both may be others by the time that it is there.
  std::string model_fingerprint;
  uint64_t turn_id = 0;
  uint64_t epoch = 0;  // Of the lane that saves it.
  uint64_t position = 0;
  int answers_left = 0;
  absl::Status status;
  std::vector<v1::RecordInfo> records;
  absl::Time deadline;
  bool committing = false;
  std::shared_ptr<TurnTrace> trace;
  std::shared_ptr<const v1::PutPrefixRequest> prefix;  // Set: for the prefix cache. Without its manifest.
  std::string replaces;                                // Of the prefix cache, too: unusable. Empty: none.
};

}  // namespace rwkv::router
