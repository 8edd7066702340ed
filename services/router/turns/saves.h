// Snapshots on their way, from the command to the manifest.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "rwkv/v1/state_store.pb.h"
#include "rwkv/v1/worker.pb.h"
#include "services/router/turns/prefixes.h"
#include "services/router/turns/router_metrics.h"
#include "services/router/turns/session_table.h"
#include "services/router/turns/turn.h"
#include "services/router/turns/turn_options.h"
#include "services/router/turns/world.h"
#include "services/state_store/client/state_store_client.h"

namespace rwkv::router {

// Part of the core: one thread at a time, no clock of its own. Law S1: a session's manifest is committed behind the log
// that it stands for, and under the lease.
class Saves {
 public:
  // It is over and not on its way any more. `is_whole`: its records are there, whatever `status` says of its manifest.
  using Ended = std::function<void(const PendingSave& save, bool is_whole, const absl::Status& status)>;

  // All borrowed. `store_deadline` is asked on any thread.
  Saves(const TurnOptions& options, World* world, state_store::CatalogClient* catalog, SessionTable* sessions,
        Prefixes* prefixes, RouterMetrics* metrics, std::function<absl::Time()> store_deadline, Ended ended);

  bool empty() const { return saves_.empty(); }
  size_t size() const { return saves_.size(); }
  // Null: it is not on its way.
  const PendingSave* Find(const std::string& snapshot_id) const;
  // Some of a lane's workers have yet to answer.
  bool UseLane(uint64_t epoch) const;

  // Of the turn's state; null: it is not attached.
  const PendingSave* Begin(Turn& turn);
  // The same for the prefix cache, in place of the prefix `replaces` if that is not empty.
  void BeginPrefix(Turn& turn, std::shared_ptr<const v1::PutPrefixRequest> prefix, const std::string& replaces);

  void OnSaved(const v1::SnapshotSaved& saved);
  // Takes those that are whole to the store, and ends those that are over.
  void Sweep();

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
  void End(const std::string& snapshot_id, bool is_whole, const absl::Status& status);

  const TurnOptions& options_;
  World* const world_;
  state_store::CatalogClient* const catalog_;
  SessionTable* const sessions_;
  Prefixes* const prefixes_;
  RouterMetrics* const metrics_;
  const std::function<absl::Time()> store_deadline_;
  const Ended ended_;
  std::map<std::string, PendingSave> saves_;  // By snapshot.
};

}  // namespace rwkv::router
