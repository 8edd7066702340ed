// What runs in the next steps of one pipeline: continuous batching as a pure state machine. Events go in by method
// calls, commands for the workers come out of Plan(), in the order in which every stage must get them. No I/O, no
// threads, no clock, no randomness: the same calls give the same commands.
//
// A *sequence* is a turn while it holds (or waits for) a slot. The owner says how many tokens it has to feed; which
// tokens they are is none of the scheduler's business. A scheduler lives as long as an epoch: when the epoch is lost,
// every slot is, so the owner drops it, makes a new one and admits its sequences again under new ids.
//
// Rules
// - At most stages + 1 microbatches (steps) are in flight, so that no stage waits for another; if one more may start
//   and any sequence has tokens, Plan() starts it.
// - A step takes decode tokens first, the longest waiting first, but at most ceil(decoding sequences / (stages + 1)) of
//   them, so that the sequences spread over all the microbatches; prefill chunks fill the rows that are left. While
//   there is prefill to do, decode leaves it an eighth of the rows (with a single row they take turns).
// - Prefill serves the sequence with the fewest tokens left in one step and the one admitted first in the next: a short
//   prompt does not wait for a long one, and none waits for ever. Chunks of one sequence follow each other through the
//   pipeline without waiting for results; a prompt is cut so that it can fill all stages.
// - Rows are shared fairly between tenants (fair_share.h): whoever has had fewest tokens for its weight is next, and
//   what is said above holds among the sequences of one tenant.
// - A decoding sequence is in at most one microbatch by nature: its next token is known only when the last step is
//   back.
#pragma once

#include <cstdint>
#include <deque>
#include <set>
#include <string>
#include <variant>
#include <vector>

#include "absl/container/btree_map.h"
#include "absl/container/btree_set.h"
#include "absl/strings/string_view.h"
#include "absl/types/optional.h"
#include "services/router/scheduler/fair_share.h"

namespace rwkv::router {

// Unique within the epoch, given by the owner. Doubles as the sequence number that the workers see.
using SequenceId = uint64_t;

// Gives `slot` to `sequence`. With `warm_sequence` the slot still holds that one's state, and must keep it.
struct AttachCommand {
  int slot = 0;
  SequenceId sequence = 0;
  uint64_t position = 0;
  absl::optional<SequenceId> warm_sequence;
};

struct StepCommand {
  struct Entry {
    int slot = 0;
    SequenceId sequence = 0;
    uint64_t position = 0;  // Before the entry.
    int tokens = 0;         // >= 1
    bool last = false;      // Nothing is left of what was fed: the entry to sample after.
  };
  uint64_t step_id = 0;  // 1, 2, 3, ...
  std::vector<Entry> entries;
};

// Copies the state of `slot` aside, which has seen `position` tokens once all steps before this command are done.
struct SaveCommand {
  int slot = 0;
  SequenceId sequence = 0;
  uint64_t position = 0;
};

struct ReleaseCommand {
  int slot = 0;
  SequenceId sequence = 0;
};

// The sequence decodes by itself until its slot has seen `until` tokens; 0: it stops, and says where.
struct GoOnCommand {
  int slot = 0;
  SequenceId sequence = 0;
  uint64_t until = 0;
};

using Command = std::variant<AttachCommand, StepCommand, SaveCommand, ReleaseCommand, GoOnCommand>;

// Not thread-safe. An event for a sequence that is not (or no longer) there is ignored: results of a cancelled sequence
// keep coming for a while.
class Scheduler {
 public:
  struct Options {
    int stages = 1;           // S >= 1
    int slots = 1;            // >= 1, of the worker that has the fewest
    int max_batch_rows = 1;   // >= 1, of the worker that takes the fewest
    int max_sequences = 512;  // Admitted at the same time, with or without a slot.
  };

  enum class FeedKind {
    kPrefill,  // Known tokens: the prompt, the tail of a log.
    kDecode,   // One token that was just drawn.
  };

  // A finished sequence whose slot has not been needed since.
  struct WarmSlot {
    SequenceId sequence = 0;
    uint64_t position = 0;
  };

  explicit Scheduler(const Options& options);
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  // Queues `id` for a slot (first come, first served); `position` tokens are in the state that it will be attached
  // with. False, and nothing happens: max_sequences are there, or the id is. `weight` > 0: the tenant's.
  bool Admit(SequenceId id, uint64_t position, absl::string_view tenant = "", double weight = 1);

  // The warm slot of a session's log branch with the largest position that is at most `max_position`.
  absl::optional<WarmSlot> FindWarm(absl::string_view session_id, absl::string_view log_branch,
                                    uint64_t max_position) const;
  // Takes the warm slot `warm` at once, ahead of all that wait. False, and nothing happens: it is gone, or as Admit().
  bool AdmitWarm(SequenceId id, SequenceId warm, absl::string_view tenant = "", double weight = 1);

  // Every stage has attached it: it may be fed.
  void OnAttached(SequenceId id);

  // `tokens` more (>= 1) follow those fed before. May be called before it is attached.
  void Feed(SequenceId id, int64_t tokens, FeedKind kind);

  // What it has left to feed is dropped; the position that the commands so far lead to stays.
  void Unfeed(SequenceId id);

  // The worker feeds what it draws by itself. GoOn() and Halt() emit the command; MoveTo() says where it will be, or is,
  // without one. Nothing else may be asked for that sequence until it is there.
  void GoOn(SequenceId id, uint64_t until);
  void Halt(SequenceId id);
  void MoveTo(SequenceId id, uint64_t position);

  // Emits a SaveCommand at the position that the commands so far lead to; returns that position. Unset: not attached.
  absl::optional<uint64_t> Save(SequenceId id);

  // The sequence is done; what it had left to feed is dropped. Its slot stays warm under this name at the position that
  // the commands so far lead to (returned), until another sequence needs it. Without a slot, or before it is attached,
  // as Cancel().
  absl::optional<uint64_t> Retire(SequenceId id, absl::string_view session_id, absl::string_view log_branch);

  // Takes the sequence out; its slot is free for the next at once (commands are carried out in order, so steps in
  // flight still find it).
  void Cancel(SequenceId id);

  // Forgets the warm slots of a session: its log is about to change other than by growing.
  void DropWarm(absl::string_view session_id);

  // The step is back from the last stage.
  void OnStepDone(uint64_t step_id);

  // Gives free slots (then warm ones, least recently used first) to those that wait and starts steps. Returns all
  // commands since the last call.
  std::vector<Command> Plan();

  int steps_in_flight() const { return static_cast<int>(in_flight_.size()); }
  int sequences() const { return static_cast<int>(sequences_.size()); }  // With and without a slot.
  int64_t rows_waiting() const { return rows_waiting_; }                 // Fed and not planned yet.
  int slots_in_use() const;                                              // Without warm ones.
  int slots_warm() const { return static_cast<int>(warm_.size()); }

 private:
  struct Sequence {
    int slot = -1;  // -1: waits for one.
    bool attached = false;
    bool decoding = false;
    uint64_t position = 0;  // After all entries planned so far.
    int64_t pending = 0;    // Tokens fed and not yet planned.
    int64_t chunk = 0;      // Rows that an entry of this prefill may have.
    uint64_t order = 0;     // When it was admitted.
    uint64_t ready = 0;     // When its decode token came.
    std::string tenant;
    double weight = 1;
    bool has_work() const { return attached && pending > 0; }
    bool is_decoding() const { return attached && decoding; }
  };
  struct Warm {
    int slot = 0;
    uint64_t position = 0;
    std::string session_id;
    std::string log_branch;
    uint64_t last_used = 0;
  };

  int max_steps_in_flight() const { return options_.stages + 1; }
  void AssignSlots();
  // Every change of what a sequence has to feed: its tenant's share hears of it, and what a step is made of is counted.
  template <typename Edit>
  void Change(SequenceId id, Sequence& sequence, Edit edit);
  void Count(SequenceId id, const Sequence& sequence, int by);
  void Erase(SequenceId id);
  // One more microbatch; false: nothing is ready.
  bool StartStep();
  void TakeDecode(int max_entries, StepCommand* step);
  void TakePrefill(int rows, StepCommand* step);
  void AddEntry(SequenceId id, Sequence& sequence, int tokens, StepCommand* step);
  bool CanAdmit(SequenceId id) const;
  void EvictWarm(SequenceId warm);

  const Options options_;
  // Ordered, so that equal calls give equal plans.
  absl::btree_map<SequenceId, Sequence> sequences_;
  // Of these, so that a plan takes as long as there is to plan, and not as there are sequences.
  absl::btree_set<SequenceId> decode_ready_;   // Have work, a token that was drawn.
  absl::btree_set<SequenceId> prefill_ready_;  // Have work, other tokens.
  int decoding_ = 0;                           // Attached, and decode.
  int64_t prefill_rows_ = 0;                   // Of those in prefill_ready_.
  int64_t rows_waiting_ = 0;
  std::deque<SequenceId> waiting_;  // For a slot, all of them in sequences_.
  std::vector<int> free_slots_;     // Lowest number last.
  absl::btree_map<SequenceId, Warm> warm_;
  std::set<uint64_t> in_flight_;  // Step ids.
  std::vector<Command> commands_;
  FairShare shares_;
  uint64_t next_step_ = 1;
  uint64_t counter_ = 0;  // Of events, in place of a clock.
};

}  // namespace rwkv::router
