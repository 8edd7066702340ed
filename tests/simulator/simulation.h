// A cluster in virtual time: routers (the real core and assembly), workers, store, network and clients (models), and
// faults, all out of one seed. The same seed is the same run, on any machine.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/time/time.h"

namespace rwkv::simulator {

struct Fault {
  enum class Kind {
    kKillWorker,
    kFreezeWorker,
    kKillRouter,
    kPauseRouter,
    kStoreAway,    // No call comes.
    kLoseAnswers,  // Calls change the store, and some answers are lost.
    kLoseStates,   // Some state records are gone.
    kCancelCall,   // A client hangs up and comes back.
    kTwoCalls,     // A client makes its call at two routers.
    kSlowClient,   // A client takes nothing.
    kJumpClock,    // A router's clock jumps.
    kDrainWorker,
    kStickCall,     // A router's next write to the store comes late; whoever makes it waits, all else goes on.
    kGiveUp,        // A client leaves its turn, and goes on with the next.
    kLoseChunks,    // Lanes say that they computed a part of a prompt, and did not.
    kDamageStates,  // Some state records have other bytes than were put.
    kStrangers,     // Beside good calls come some that are wrong, or no calls at all.
  };
  Kind kind = Kind::kKillWorker;
  int target = 0;
  absl::Duration at;     // From the start.
  absl::Duration lasts;  // Then it is undone.

  std::string ToString() const;
};

// What is wrong on purpose, to see that the check of a law can fail.
struct Broken {
  bool store_forgets_appends = false;    // T1: says durable, and it is not.
  bool store_forgets_requests = false;   // T2: a request id begins again.
  bool store_fences_nobody = false;      // T2: a lease that was lost still writes.
  bool store_keeps_snapshots = false;    // S1: a rewind or a fork leaves those of what is cut away.
  bool store_keeps_branches = false;     // T3: a rewind does not say that the log is another.
  bool worker_keeps_states = false;      // S4: computes on whatever is in the slot.
  bool worker_clears_nothing = false;    // S4: a slot is given out with what was in it.
  bool worker_saves_late = false;        // S1: a snapshot of another position.
  bool worker_stops_in_silence = false;  // T3: a turn stands still until its lane is given up.
  bool worker_feeds_unasked = false;     // S4: what a sequence drew is fed to the next in its slot.
  bool worker_answers_early = false;     // T3: what is asked of a token is said of those before it.
  bool worker_checks_no_sums = false;    // N1: a state that is damaged is begun with.
  bool store_compares_nothing = false;   // N1: a state is found by how its tokens begin.
  bool store_scopes_nothing = false;     // B3: a state is found by whoever asks for its tokens.
  bool door_checks_nothing = false;      // B2: what somebody sent is taken as it is.
  bool core_queues_all = false;          // B1: whoever comes waits.
  bool core_floods_clients = false;      // B1: messages for a client that takes none.
  bool core_refuses_in_silence = false;  // B1: without saying when to come back.
  bool tenants_share_ids = false;        // B3: sessions of one name are one session.
  bool family_is_hidden = false;         // N1: lanes of two families look like one.
  bool worker_has_two_drivers = false;   // A worker takes whoever comes.
};

struct Options {
  uint64_t seed = 0;
  // Of the faults that the seed gives, only these (by number); all: every one.
  bool all_faults = true;
  std::vector<int> faults;
  Broken broken;
  // The core looks at everything after every event, in place of what the event touched: the same run.
  bool looks_at_all = false;
};

struct Result {
  std::string violation;      // Of which law, when and where; empty: of none.
  std::vector<Fault> faults;  // All that the seed gives.
  uint64_t digest = 0;        // Of the whole run.
  uint64_t events = 0;
  uint64_t tokens = 0;
  uint64_t reused_tokens = 0;    // Of the prefix cache, by calls of no session.
  absl::Duration time;           // Virtual.
  absl::Duration longest_pause;  // Of a client that waits for the next message of its turn.
};

Result Simulate(const Options& options);

// Leaves out faults for as long as the run fails: the ones that are needed.
std::vector<int> Shrink(const Options& options);

// The command that runs it again.
std::string ReplayCommand(const Options& options);

}  // namespace rwkv::simulator
