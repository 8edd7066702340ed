// What needs both halves of the state store: the order in which a snapshot becomes visible and is freed (law S2), and
// the collection of records that belong to none.
//
//   workers: PutRecords, layers ──► router: CommitSnapshot ──► records checked and made durable, then the manifest
//   session ended (by a client, or by the limits) ──► its branches and manifests freed, as far as no fork shares them
//   manifest freed (rewind, delete, retention, drop) ──► its records deleted; after a crash between, by SweepOrphans
#pragma once

#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "absl/types/span.h"
#include "rwkv/v1/state_store.pb.h"
#include "services/common/clock.h"
#include "services/common/metrics.h"
#include "services/state_store/catalog/catalog.h"
#include "services/state_store/key_locks.h"
#include "services/state_store/records/record_store.h"
#include "services/state_store/session_limits.h"

namespace rwkv::state_store {

// Thread-safe. What it does not mention is done on catalog() and records() themselves.
class StateStore {
 public:
  struct Options {
    // Records without a manifest are kept for so long after the last of them came: an upload and its commit take
    // seconds, and a router that comes back may still commit.
    absl::Duration orphan_age = absl::Hours(1);
    // Of the prefix cache's records and tokens: the longest unused go. They count to no other bound. 0: there is no
    // such cache.
    int64_t prefix_cache_bytes = 0;
    SessionLimits::Options limits;
  };
  // All outlive the store.
  StateStore(const Options& options, Catalog* catalog, RecordStore* records, common::Clock* clock,
             common::Metrics* metrics);

  Catalog& catalog() { return *catalog_; }
  RecordStore& records() { return *records_; }

  // As Catalog has them, within the limits: kResourceExhausted, the store is full. A turn that is known goes on.
  absl::StatusOr<v1::Session> CreateSession(const std::string& session_id, const std::string& initial_state);
  absl::StatusOr<v1::Session> ForkSession(const std::string& session_id, absl::optional<uint64_t> position,
                                          const std::string& new_session_id);
  absl::StatusOr<TurnStart> BeginTurn(const v1::Lease& lease, const NewTurn& turn);

  // As Catalog has them, and the records of what they free are deleted too.
  absl::StatusOr<v1::Session> RewindSession(const v1::Lease& lease, uint64_t position,
                                            const std::string& log_branch = "");
  absl::Status DeleteSession(const v1::Lease& lease);
  // False: there was none of that id.
  absl::StatusOr<bool> DropSnapshot(const std::string& session_id, const std::string& snapshot_id,
                                    const std::string& reason);
  // Deletes the records of a snapshot that nobody has committed, and whose owner does not need it any more. For
  // orphan_age from then on no store commits it. kFailedPrecondition: it is committed.
  absl::Status DropUncommitted(const std::string& snapshot_id);

  // kDataLoss: a record is not there or differs; nothing is committed. Else as Catalog::CommitSnapshot.
  absl::Status CommitSnapshot(const v1::Lease& lease, const std::string& log_branch,
                              const v1::SnapshotManifest& manifest);

  // The same for Catalog::ImportSession.
  absl::StatusOr<v1::Session> ImportSession(const std::string& session_id, const NewImport& import);

  // As Catalog has them. Put: kDataLoss as above; kResourceExhausted: it is larger than the cache may be. Find and Put:
  // kFailedPrecondition: there is no cache.
  absl::StatusOr<absl::optional<v1::SnapshotManifest>> FindPrefix(const v1::PrefixScope& scope,
                                                                  absl::Span<const uint32_t> token_ids);
  absl::StatusOr<bool> PutPrefix(const NewPrefix& prefix);
  absl::Status DropPrefix(const std::string& snapshot_id, const std::string& reason);

  // Deletes the records of snapshots that have no manifest and are older than orphan_age. Safe at any time.
  absl::Status SweepOrphans();
  // Ends the sessions that are due, see session_limits.h.
  absl::Status SweepSessions();

 private:
  absl::Status CheckHasPrefixes() const;
  // The state that these tokens have already, if a record of it is not there: nobody can begin with it. False: none.
  absl::StatusOr<bool> DropLostPrefix(const NewPrefix& prefix);
  // Counts anew, so that what other processes put is seen.
  absl::Status EvictPrefixes();
  // What BaseSnapshots() says, once one was about to be deleted.
  using Bases = absl::optional<absl::StatusOr<std::set<std::string>>>;
  absl::Status SweepOrphan(const RecordStore::Stored& stored, Bases* bases);
  // Under the snapshot's lock.
  absl::Status MakeRecordsDurable(const v1::SnapshotManifest& manifest);
  // Their manifests are gone for good, so what cannot be deleted now is left to the next sweep.
  void DeleteRecords(const std::vector<std::string>& snapshot_ids);

  const Options options_;
  Catalog* const catalog_;
  RecordStore* const records_;
  common::Clock* const clock_;
  KeyLocks snapshot_locks_;  // Between a commit and a sweep of one snapshot.
  prometheus::Counter& committed_total_;
  prometheus::Counter& freed_total_;
  prometheus::Counter& dropped_total_;
  prometheus::Counter& orphans_total_;
  prometheus::Counter& deleted_total_;
  prometheus::Counter& prefix_hits_total_;
  prometheus::Counter& prefix_misses_total_;
  prometheus::Counter& prefixes_evicted_total_;
  SessionLimits limits_;
};

}  // namespace rwkv::state_store
