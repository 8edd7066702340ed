// Snapshots on their way, from the command to the manifest.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "rwkv/v1/state_store.pb.h"
#include "rwkv/v1/worker.pb.h"
#include "services/router/core/core_context.h"
#include "services/router/core/placement.h"
#include "services/router/core/prefixes.h"
#include "services/router/core/session_table.h"
#include "services/router/core/turn.h"

namespace rwkv::router {

// Part of the core: one thread at a time, no clock of its own. Law S1: a session's manifest is committed behind the log
// that it stands for, and under the lease.
class Saves {
 public:
  // It is over and not on its way any more. `is_whole`: its records are there, whatever `status` says of its manifest.
  using Ended = std::function<void(const PendingSave& save, bool is_whole, const absl::Status& status)>;

  // All borrowed.
  Saves(const CoreContext& context, const Placement& placement, SessionTable* sessions, Prefixes* prefixes,
        Ended ended);

  bool empty() const { return saves_.empty(); }
  // How many more may be on their way: beyond it running turns are not saved in between. < 0: more are than should.
  int room() const;
  bool has_room() const { return room() > 0; }
  // A snapshot of the turn would not be one too many.
  bool MayBegin(const Turn& turn) const { return turn.HasLog() && turn.saves == 0 && has_room(); }
  // Null: it is not on its way.
  const PendingSave* Find(const std::string& snapshot_id) const;
  // Some of a lane's workers have yet to answer.
  bool UseLane(uint64_t epoch) const;

  // Of the turn's state; null: it is not attached.
  const PendingSave* Begin(Turn& turn);
  // The same of the beginning of its input for the prefix cache, unless too many are on their way.
  void BeginPrefix(Turn& turn);

  void OnSaved(const v1::SnapshotSaved& saved);
  // More of the session's log is durable.
  void LogGrew(const Session& session);
  // Takes those that are whole to the store, and ends those that are over. Looks at those that something happened to.
  void Sweep();
  // The next sweep looks at all.
  void Touch();

  // Its workers answer no more.
  void EndOfLane(uint64_t epoch, const absl::Status& why);
  // Of tokens that did not come into the log.
  void EndBeyond(const Session& session, const absl::Status& why);

  static v1::SnapshotManifest ManifestOf(const PendingSave& save);

 private:
  PendingSave* Add(Turn& turn);
  // Nobody else can have written to the session since, nor has it been rewound.
  static bool IsOf(const Session& session, const PendingSave& save);
  // One that all stages have answered.
  void Commit(const std::string& id, PendingSave& save);
  void TouchOf(const std::string& session_id);
  void End(const std::string& snapshot_id, bool is_whole, const absl::Status& status);

  const CoreContext& context_;
  const Placement& placement_;
  SessionTable* const sessions_;
  Prefixes* const prefixes_;
  const Ended ended_;
  std::map<std::string, PendingSave> saves_;                 // By snapshot.
  std::map<std::string, std::set<std::string>> of_session_;  // Snapshots; none is empty.
  std::set<std::pair<absl::Time, std::string>> deadlines_;   // Of them all.
  std::set<std::string> touched_;
};

}  // namespace rwkv::router
