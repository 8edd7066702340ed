// The rules of sessions, leases, logs and snapshots, once, over any RowStore. Rows: keys.h. Laws: catalog/catalog.h.
//
// Locking. A change of a session holds the session's lock; a change of the branch tree (fork, rewind, delete, commit or
// drop of a snapshot) then also the lock of the session's family: the sessions that came from one by forking, which are
// all that can share a branch. Appending needs no family lock, since only the one session on a branch adds to it. No
// lock is shared by strangers, so writes of different sessions meet in the engine, which makes them durable together.
// Reading holds no lock: it looks at the rows of one moment.
#pragma once

#include <atomic>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "absl/types/span.h"
#include "services/common/clock.h"
#include "services/common/metrics.h"
#include "services/state_store/catalog/catalog.h"
#include "services/state_store/catalog/view.h"
#include "services/state_store/rows/row_store.h"

namespace rwkv::state_store {

class RowCatalog final : public Catalog {
 public:
  struct Options {
    int snapshots_per_branch = 8;  // >= 1
    // Said of a session that is not there: how sessions end here. Empty: only by those who use them.
    std::string how_sessions_end;
  };
  // Counts what is there, which reads the rows of every session, branch and snapshot id. All three outlive the catalog.
  static absl::StatusOr<std::unique_ptr<RowCatalog>> Create(const Options& options, RowStore* rows,
                                                            common::Clock* clock, common::Metrics* metrics);

  // The committed snapshot of that id, a base or of the prefix cache too. Unset: there is none.
  absl::StatusOr<absl::optional<v1::SnapshotManifest>> FindManifest(const std::string& snapshot_id);

  // Counts anew what other processes may have changed, which reads as much as Create() does.
  absl::Status Recount() { return Load(); }

  absl::StatusOr<v1::Session> CreateSession(const std::string& session_id, const std::string& initial_state) override;
  absl::StatusOr<v1::Session> ImportSession(const std::string& session_id, const NewImport& import) override;
  absl::StatusOr<v1::Session> GetSession(const std::string& session_id) override;
  absl::StatusOr<SessionPage> ListSessions(int page_size, const std::string& page_token) override;
  absl::StatusOr<v1::Session> ForkSession(const std::string& session_id, absl::optional<uint64_t> position,
                                          const std::string& new_session_id) override;
  absl::StatusOr<v1::Session> RewindSession(const v1::Lease& lease, uint64_t position, const std::string& log_branch,
                                            std::vector<std::string>* freed) override;
  absl::Status DeleteSession(const v1::Lease& lease, std::vector<std::string>* freed) override;
  absl::StatusOr<LeaseGrant> AcquireLease(const std::string& session_id, const std::string& holder,
                                          const std::string& incarnation, absl::Duration ttl) override;
  absl::StatusOr<std::vector<v1::Lease>> RenewLeases(absl::Span<const v1::Lease> leases, absl::Duration ttl) override;
  absl::Status ReleaseLease(const v1::Lease& lease) override;
  absl::StatusOr<TurnStart> BeginTurn(const v1::Lease& lease, const NewTurn& turn) override;
  absl::StatusOr<absl::optional<v1::Turn>> FindTurn(const std::string& session_id,
                                                    absl::string_view request_id) override;
  std::vector<absl::Status> AppendTokens(absl::Span<const v1::AppendItem* const> items) override;
  absl::StatusOr<TokenPage> ReadTokens(const std::string& session_id, uint64_t begin, uint64_t end) override;
  absl::Status CommitSnapshot(const v1::Lease& lease, const std::string& log_branch,
                              const v1::SnapshotManifest& manifest, std::vector<std::string>* freed) override;
  absl::StatusOr<absl::optional<v1::SnapshotManifest>> FindSnapshot(const std::string& session_id,
                                                                    uint64_t at_or_before,
                                                                    const std::string& model_fingerprint) override;
  absl::StatusOr<bool> DropSnapshot(const std::string& session_id, const std::string& snapshot_id,
                                    std::vector<std::string>* freed) override;
  absl::StatusOr<absl::optional<v1::SnapshotManifest>> FindPrefix(const v1::PrefixScope& scope,
                                                                  absl::Span<const uint32_t> token_ids) override;
  absl::StatusOr<bool> PutPrefix(const NewPrefix& prefix, std::vector<std::string>* freed) override;
  absl::StatusOr<bool> DropPrefix(const std::string& snapshot_id, std::vector<std::string>* freed) override;
  absl::Status EvictPrefixes(int64_t max_bytes, std::vector<std::string>* freed) override;
  absl::StatusOr<bool> HasSnapshot(const std::string& snapshot_id) override;
  absl::StatusOr<std::set<std::string>> BaseSnapshots() override;
  absl::StatusOr<bool> CondemnSnapshot(const std::string& snapshot_id) override;
  absl::Status ForgetCondemned(absl::Time before) override;
  absl::StatusOr<std::vector<IdleSession>> OldestSessions(absl::Time idle_before, int limit) override;
  absl::StatusOr<bool> EndIdleSession(const std::string& session_id, absl::Time idle_before,
                                      std::vector<std::string>* freed) override;
  absl::StatusOr<bool> EndIdleTurn(const std::string& session_id, absl::Time idle_before) override;
  absl::StatusOr<TenantUsage> GetUsage(const std::string& tenant) override;
  absl::Status PutUsage(const std::string& tenant, const std::string& source, const TenantUsage& total) override;
  CatalogCounts counts() const override;

 private:
  RowCatalog(const Options& options, RowStore* rows, common::Clock* clock, common::Metrics* metrics);

  // Counts what is there, and puts the sessions of an older build among the idle ones.
  absl::Status Load();
  absl::Status LoadSessions(CatalogCounts* counts);
  absl::StatusOr<int64_t> LoadBranches();
  // Of a row that cannot be counted. One that others share keeps nobody from serving the rest: there is no folder to
  // repair, and each answer notices on its own what is damaged.
  absl::Status AcceptDamage(const absl::Status& status) const;
  // A change of these sessions.
  absl::StatusOr<std::unique_ptr<RowTransaction>> Begin(const std::vector<std::string>& session_ids);
  // View::Session(), and if it is not there why that may be.
  absl::StatusOr<SessionRow> Find(const View& view, const std::string& session_id) const;
  // Deletes a session whose lock is held, whatever leases say.
  absl::Status Erase(RowTransaction& rows, const std::string& session_id, const SessionRow& row,
                     std::vector<std::string>* freed);
  void Count(int sessions, int snapshots, int leases, int64_t tokens);
  // Notes a use of the state under this x-key.
  absl::Status TouchPrefix(const std::string& key);
  // Deletes what is under this x-key, if it is that snapshot.
  absl::StatusOr<bool> ErasePrefix(const std::string& key, const std::string& snapshot_id);
  // Those there are, by x-key, the longest unused first. kDataLoss: rows are damaged.
  absl::Status ListPrefixes(std::vector<std::pair<std::string, PrefixUseRow>>* kept) const;
  // Every row of the cache, when one of them cannot be read.
  absl::Status ForgetPrefixes();
  void CountPrefixes(int64_t prefixes, int64_t record_bytes, int64_t tokens);

  const Options options_;
  RowStore* const rows_;
  common::Clock* const clock_;

  std::atomic<int64_t> sessions_{0};
  std::atomic<int64_t> snapshots_{0};
  std::atomic<int64_t> leases_{0};
  std::atomic<int64_t> tokens_{0};
  std::atomic<int64_t> prefixes_{0};
  std::atomic<int64_t> prefix_record_bytes_{0};
  std::atomic<int64_t> prefix_tokens_{0};
  prometheus::Gauge& sessions_gauge_;
  prometheus::Gauge& snapshots_gauge_;
  prometheus::Gauge& leases_gauge_;
  prometheus::Gauge& tokens_gauge_;
  prometheus::Counter& tokens_total_;
  prometheus::Counter& fenced_total_;
  prometheus::Gauge& prefixes_gauge_;
  prometheus::Gauge& prefix_bytes_gauge_;
};

}  // namespace rwkv::state_store
