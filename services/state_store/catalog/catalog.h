// The small and transactional half of the state store: sessions, leases, token logs, turns and snapshot manifests.
//
// An implementation keeps these laws (row_catalog.h does, over any RowStore):
// - Every change is one transaction: all of it or nothing, and durable when the call returns OK. After an error that is
//   kUnavailable or kDeadlineExceeded a change may have happened; after every other error it has not.
// - A session has one writer. A change under a lease is kAborted unless the lease's token is the session's current one;
//   the message names both. Tokens only grow, over restarts and over a session that is deleted and made again. Expiry
//   only decides whether another holder may take over: until one does, the old token stays good.
// - Token logs form a tree of branches. A branch shares its parent's tokens up to its fork position and adds its own.
//   Fork and rewind add a branch and copy nothing. Tokens and snapshots that no session can reach are freed in the same
//   change that made them unreachable: no tokens beyond what the sessions and forks below a branch use.
// - Snapshots belong to a branch and a position on it, so that all sessions that share those tokens share them. A
//   branch keeps its newest `snapshots_per_branch`, and for each fork the newest one at or before the fork.
// - An imported state without the log it came from is the base of its session: a snapshot that the log begins behind. It
//   is freed with the last session that came from there and not before, and nothing goes back to before it.
// - A session is idle since its last turn, rewind, fork or lease, whichever came last; a lease that nobody gave back
//   counts to its expiry. One with an open turn, or with a lease that lives, is never ended as idle.
// - Manifests that are freed are reported in `freed` (ids appended, only when the call returns OK); the caller deletes
//   their records then. If it dies before, their records are orphans that a sweep finds (records/record_store.h).
//
// Arguments are checked for form (grammar of ids, sizes, enums) by rpc/validation.h before they come here. Errors:
// kNotFound no such session; kAborted as above, or another turn, branch or length than the caller thinks; kOutOfRange
// a position beyond the log, or before its base; kFailedPrecondition another model; kResourceExhausted the disk is full;
// kUnavailable the storage is away. Every implementation is thread-safe.
#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "absl/types/span.h"
#include "rwkv/v1/sessions.pb.h"
#include "rwkv/v1/state_store.pb.h"

namespace rwkv::state_store {

// Turns of a session that are remembered, the newest ones. Older request_ids count as new.
inline constexpr int kTurnsKept = 64;
// Of one log. Bounds what a position can be.
inline constexpr uint64_t kMaxLogTokens = uint64_t{1} << 32;

struct LeaseGrant {
  v1::Lease lease;
  v1::Session session;
  std::string log_branch;  // Of the session's log, until it is rewound.
};

struct NewTurn {
  absl::string_view request_id;
  absl::Span<const uint32_t> token_ids;  // The input.
  absl::string_view spec;
  absl::string_view model_fingerprint;
};

struct TurnStart {
  v1::Turn turn;
  bool existed = false;
  uint64_t session_tokens = 0;
};

struct NewImport {
  std::string initial_state;
  v1::SnapshotManifest manifest;
  absl::Span<const uint32_t> token_ids;  // manifest.position() of them, or none, then `base` is set.
  bool base = false;
};

struct SessionPage {
  std::vector<v1::Session> sessions;  // By id; without snapshot_positions.
  std::string next_page_token;        // Empty: that was all.
};

struct TokenPage {
  std::vector<uint32_t> token_ids;
  std::string log_branch;  // Tokens of two pages belong together if this is the same.
};

struct IdleSession {
  std::string session_id;
  absl::Time idle_since;
  bool turn_open = false;
};

// What a tenant has fed and drawn, ever, and what it keeps.
struct TenantUsage {
  uint64_t turns = 0;
  uint64_t prompt_tokens = 0;
  uint64_t generated_tokens = 0;
  int64_t sessions = 0;
  int64_t log_tokens = 0;      // Those that sessions share count once.
  int64_t snapshot_bytes = 0;  // Likewise.
};

// In the catalog, of each token of a prefix.
inline constexpr int64_t kPrefixTokenBytes = 4;

// States that calls share which begin with the same tokens; see v1::StateCatalog.
struct NewPrefix {
  v1::PrefixScope scope;
  absl::Span<const uint32_t> token_ids;
  v1::SnapshotManifest manifest;  // At token_ids.size().
};

// For metrics and limits. A change that failed with kUnavailable and yet happened is missing until the next start.
struct CatalogCounts {
  int64_t sessions = 0;
  int64_t snapshots = 0;
  int64_t leases = 0;  // Granted and not released, be they expired or not.
  int64_t tokens = 0;  // Of all logs; those that sessions share count once.
  int64_t prefixes = 0;
  int64_t prefix_bytes = 0;         // What they take: their records, and their tokens in the catalog.
  int64_t prefix_record_bytes = 0;  // The records of that.
};

class Catalog {
 public:
  virtual ~Catalog() = default;

  // `initial_state` is kept as it is, and by every fork. kAlreadyExists.
  virtual absl::StatusOr<v1::Session> CreateSession(const std::string& session_id,
                                                    const std::string& initial_state) = 0;
  // A session that begins with a snapshot, whose records the caller has seen to be durable. kAlreadyExists: the session,
  // or the snapshot.
  virtual absl::StatusOr<v1::Session> ImportSession(const std::string& session_id, const NewImport& import) = 0;
  virtual absl::StatusOr<v1::Session> GetSession(const std::string& session_id) = 0;
  // At most `page_size` sessions whose ids come after `page_token`, of its tenant (services/common/tenant_ids.h) alone;
  // "TENANT@" comes before all of that one's, and "" before all that are of none.
  virtual absl::StatusOr<SessionPage> ListSessions(int page_size, const std::string& page_token) = 0;
  // A new session with the first `position` tokens (unset: all). Turns are not shared. kAlreadyExists, kOutOfRange.
  virtual absl::StatusOr<v1::Session> ForkSession(const std::string& session_id, absl::optional<uint64_t> position,
                                                  const std::string& new_session_id) = 0;
  // Turns that end beyond `position` are forgotten, an open one too. To the log's end it changes nothing. kAborted: the
  // session is on another branch than `log_branch` (empty: any is right), and not at the position.
  virtual absl::StatusOr<v1::Session> RewindSession(const v1::Lease& lease, uint64_t position,
                                                    const std::string& log_branch, std::vector<std::string>* freed) = 0;
  virtual absl::Status DeleteSession(const v1::Lease& lease, std::vector<std::string>* freed) = 0;

  // While a lease of the same holder and incarnation lives (granted, not released, not expired), it is extended and the
  // same token comes back, so that an acquisition whose answer was lost can be repeated. Everyone else who may have it
  // gets a new token: the same holder in another incarnation at once, another holder once it has expired or was
  // released. Until then kAborted with RetryInfo.
  virtual absl::StatusOr<LeaseGrant> AcquireLease(const std::string& session_id, const std::string& holder,
                                                  const std::string& incarnation, absl::Duration ttl) = 0;
  // Extends those that are still the session's current one, even if expired meanwhile; returns the others.
  virtual absl::StatusOr<std::vector<v1::Lease>> RenewLeases(absl::Span<const v1::Lease> leases,
                                                             absl::Duration ttl) = 0;
  // Again is fine, as long as nobody else has acquired since.
  virtual absl::Status ReleaseLease(const v1::Lease& lease) = 0;

  // Appends the input and opens a turn; another that is open ends as CANCELLED. If one of the last kTurnsKept turns has
  // this request_id it comes back, with the logprobs of its generated tokens, and nothing changes.
  virtual absl::StatusOr<TurnStart> BeginTurn(const v1::Lease& lease, const NewTurn& turn) = 0;
  // One change for all the items that can be done, one status for each. No session twice.
  virtual std::vector<absl::Status> AppendTokens(absl::Span<const v1::AppendItem* const> items) = 0;
  // The turn of that request_id among the last kTurnsKept (empty: the newest), with its logprobs. Unset: there is none.
  virtual absl::StatusOr<absl::optional<v1::Turn>> FindTurn(const std::string& session_id,
                                                            absl::string_view request_id) = 0;
  // Tokens [begin, end) of the log, begin <= end; the caller bounds their number.
  virtual absl::StatusOr<TokenPage> ReadTokens(const std::string& session_id, uint64_t begin, uint64_t end) = 0;

  // The caller has seen to it that the records are durable. A snapshot of the same branch and position is replaced.
  // An equal manifest again changes nothing; another one under the same id is kAlreadyExists.
  virtual absl::Status CommitSnapshot(const v1::Lease& lease, const std::string& log_branch,
                                      const v1::SnapshotManifest& manifest, std::vector<std::string>* freed) = 0;
  virtual absl::StatusOr<absl::optional<v1::SnapshotManifest>> FindSnapshot(const std::string& session_id,
                                                                            uint64_t at_or_before,
                                                                            const std::string& model_fingerprint) = 0;
  // False: there was none of that id. kNotFound: there is, but not one that this session can reach. kFailedPrecondition:
  // it is the session's base.
  virtual absl::StatusOr<bool> DropSnapshot(const std::string& session_id, const std::string& snapshot_id,
                                            std::vector<std::string>* freed) = 0;
  // The longest prefix of the tokens that has a state of the same scope. Tokens and scope are compared, not only hashes.
  // Noted as used, to the minute. Unset: none, or its rows are damaged: what cannot be read of a cache is not there.
  virtual absl::StatusOr<absl::optional<v1::SnapshotManifest>> FindPrefix(const v1::PrefixScope& scope,
                                                                          absl::Span<const uint32_t> token_ids) = 0;
  // The caller has seen to it that the records are durable. False: those tokens have a state already; the id is freed,
  // unless it is that state's.
  virtual absl::StatusOr<bool> PutPrefix(const NewPrefix& prefix, std::vector<std::string>* freed) = 0;
  // False: there was none of that id.
  virtual absl::StatusOr<bool> DropPrefix(const std::string& snapshot_id, std::vector<std::string>* freed) = 0;
  // Drops the longest unused until no more than `max_bytes` are left, and counts anew what others may have changed.
  virtual absl::Status EvictPrefixes(int64_t max_bytes, std::vector<std::string>* freed) = 0;

  // Whether a manifest of this id is committed, for the sweep of orphans.
  virtual absl::StatusOr<bool> HasSnapshot(const std::string& snapshot_id) = 0;
  // The ids of the states that imported logs stand on, as the logs have them, for the same: such a state is nowhere
  // else, and is not to go because it was the row of its id that was lost. kDataLoss: one of them cannot be read.
  virtual absl::StatusOr<std::set<std::string>> BaseSnapshots() = 0;
  // Before the records of a snapshot that nobody has committed are deleted: from now on nobody can, in whatever process
  // (kDataLoss). False: it is committed.
  virtual absl::StatusOr<bool> CondemnSnapshot(const std::string& snapshot_id) = 0;
  // Lets go of those that were condemned before then: long enough for any commit that began before to have ended.
  virtual absl::Status ForgetCondemned(absl::Time before) = 0;

  // Sessions that are idle since `idle_before` or earlier, the longest idle first. Those with an open turn are among
  // them, those with a lease that lives are not. Looks at no more than `limit` sessions, so that there may be more, and
  // of those that it leaves out none was idle for a minute longer than one that it returns.
  virtual absl::StatusOr<std::vector<IdleSession>> OldestSessions(absl::Time idle_before, int limit) = 0;
  // Deletes the session, if it is idle since `idle_before` or earlier and has no open turn. False: it is not, or is no
  // more.
  virtual absl::StatusOr<bool> EndIdleSession(const std::string& session_id, absl::Time idle_before,
                                              std::vector<std::string>* freed) = 0;
  // Ends the open turn of such a session as CANCELLED, which counts as a use. False: there is none.
  virtual absl::StatusOr<bool> EndIdleTurn(const std::string& session_id, absl::Time idle_before) = 0;

  // Turns of sessions are counted with the change that adds their tokens, so this is exact whatever process died when.
  // Reads the rows of all of the tenant's sessions, branches and snapshots.
  virtual absl::StatusOr<TenantUsage> GetUsage(const std::string& tenant) = 0;
  // What `source` has counted for the tenant since it began, beside sessions. Never less than it has said before: a
  // total that comes late changes nothing.
  virtual absl::Status PutUsage(const std::string& tenant, const std::string& source, const TenantUsage& total) = 0;

  virtual CatalogCounts counts() const = 0;
};

}  // namespace rwkv::state_store
