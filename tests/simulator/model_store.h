// The rules of the state store, without a store: what a router may rely on, kept in memory, in virtual time.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "rwkv/v1/state_store.pb.h"
#include "services/common/clock.h"
#include "services/state_store/client/state_store_client.h"
#include "tests/simulator/simulation.h"

namespace rwkv::simulator {

// Not thread-safe. Of CatalogClient it has what turns need; the rest is kUnimplemented.
class ModelStore final : public state_store::CatalogClient {
 public:
  enum class Fate {
    kAnswered,
    kNeverCame,   // Nothing changes, and the caller hears kUnavailable.
    kAnswerLost,  // It changes, and the caller hears kUnavailable.
  };

  explicit ModelStore(common::Clock* clock) : clock_(clock) {}  // Borrowed.

  // Asked once for each call. Empty: all are answered.
  void SetFate(std::function<Fate()> fate) { fate_ = std::move(fate); }

  // Called when something is about to be changed under a lease, and may take its time.
  void SetBeforeFence(std::function<void()> before_fence) { before_fence_ = std::move(before_fence); }

  void SetBroken(const Broken& broken) { broken_ = broken; }

  struct SessionRow {
    std::vector<uint32_t> log;
    int branch = 0;  // Of the log: another one after each rewind.
    std::map<std::string, v1::Turn> turns;
    std::string newest_turn;
    std::string model_fingerprint;
    uint64_t fencing_token = 0;
    std::string holder;  // And incarnation; empty: nobody's.
    absl::Time lease_end;
    std::map<uint64_t, v1::SnapshotManifest> snapshots;  // By position.
  };
  void AddSession(const std::string& id) { sessions_[id]; }
  // Leases that a router took over from another, which had not let go of them.
  uint64_t takeovers() const { return takeovers_; }
  const SessionRow& session(const std::string& id) const { return sessions_.at(id); }
  const std::map<std::string, SessionRow>& sessions() const { return sessions_; }
  // A state record's content, as a worker put it: the model's state. Null: there is none.
  const uint64_t* FindState(const std::string& snapshot_id) const;
  // A stage's part of it. Parts that are not of one state make none that anybody expects.
  void PutState(const std::string& snapshot_id, uint64_t state) {
    uint64_t& all = states_.emplace(snapshot_id, state).first->second;
    if (all != state) all = ~state;
  }
  void LoseStates(const std::function<bool()>& chosen);
  // Other bytes than were put, which whoever reads them can see.
  void DamageStates(const std::function<bool()>& chosen);
  bool IsDamaged(const std::string& snapshot_id) const { return damaged_.count(snapshot_id) > 0; }

  // The prefix cache: the longest unused first.
  struct Prefix {
    std::string scope;
    std::vector<uint32_t> tokens;
    v1::SnapshotManifest manifest;
  };
  void SetMostPrefixes(size_t count) { most_prefixes_ = count; }
  const std::vector<Prefix>& prefixes() const { return prefixes_; }

  absl::StatusOr<v1::AcquireLeaseResponse> AcquireLease(const v1::AcquireLeaseRequest& request, absl::Time) override;
  absl::StatusOr<v1::RenewLeasesResponse> RenewLeases(const v1::RenewLeasesRequest& request, absl::Time) override;
  absl::StatusOr<v1::ReleaseLeaseResponse> ReleaseLease(const v1::ReleaseLeaseRequest& request, absl::Time) override;
  absl::StatusOr<v1::BeginTurnResponse> BeginTurn(const v1::BeginTurnRequest& request, absl::Time) override;
  absl::StatusOr<v1::AppendTokensResponse> AppendTokens(const v1::AppendTokensRequest& request, absl::Time) override;
  absl::StatusOr<v1::FindTurnResponse> FindTurn(const v1::FindTurnRequest& request, absl::Time) override;
  absl::StatusOr<std::vector<uint32_t>> ReadTokens(const v1::ReadTokensRequest& request, absl::Time) override;
  absl::StatusOr<v1::CommitSnapshotResponse> CommitSnapshot(const v1::CommitSnapshotRequest& request,
                                                            absl::Time) override;
  absl::StatusOr<v1::FindSnapshotResponse> FindSnapshot(const v1::FindSnapshotRequest& request, absl::Time) override;
  absl::StatusOr<v1::DropSnapshotResponse> DropSnapshot(const v1::DropSnapshotRequest& request, absl::Time) override;

  absl::StatusOr<v1::StateCatalogDescribeResponse> Describe(const v1::StateCatalogDescribeRequest&,
                                                            absl::Time) override;
  absl::StatusOr<v1::CreateSessionResponse> CreateSession(const v1::CreateSessionRequest&, absl::Time) override;
  absl::StatusOr<v1::ImportSessionResponse> ImportSession(const v1::ImportSessionRequest&, absl::Time) override;
  absl::StatusOr<v1::GetSessionResponse> GetSession(const v1::GetSessionRequest&, absl::Time) override;
  absl::StatusOr<v1::ListSessionsResponse> ListSessions(const v1::ListSessionsRequest&, absl::Time) override;
  absl::StatusOr<v1::ForkSessionResponse> ForkSession(const v1::ForkSessionRequest& request, absl::Time) override;
  absl::StatusOr<v1::RewindSessionResponse> RewindSession(const v1::RewindSessionRequest& request, absl::Time) override;
  absl::StatusOr<v1::DeleteSessionResponse> DeleteSession(const v1::DeleteSessionRequest&, absl::Time) override;
  absl::StatusOr<v1::FindPrefixResponse> FindPrefix(const v1::FindPrefixRequest&, absl::Time) override;
  absl::StatusOr<v1::PutPrefixResponse> PutPrefix(const v1::PutPrefixRequest&, absl::Time) override;
  absl::StatusOr<v1::DropPrefixResponse> DropPrefix(const v1::DropPrefixRequest&, absl::Time) override;
  absl::StatusOr<v1::GetUsageResponse> GetUsage(const v1::GetUsageRequest&, absl::Time) override;
  absl::StatusOr<v1::PutUsageResponse> PutUsage(const v1::PutUsageRequest&, absl::Time) override;

 private:
  // Runs `change` unless the call never comes; its answer is lost if fate has it so.
  template <typename Response>
  absl::StatusOr<Response> Call(const std::function<absl::StatusOr<Response>()>& change);
  // kAborted unless it is the session's one lease. kNotFound: no such session.
  absl::StatusOr<SessionRow*> Owned(const v1::Lease& lease);
  // Of none: its end.
  std::vector<Prefix>::iterator FindPrefixOf(const std::string& snapshot_id);
  absl::Status Append(const v1::AppendItem& item);
  // Of what its log does not have.
  void CutSnapshots(SessionRow* session) const;

  common::Clock* const clock_;
  std::function<Fate()> fate_;
  std::function<void()> before_fence_;
  Broken broken_;
  std::map<std::string, SessionRow> sessions_;
  std::map<std::string, uint64_t> states_;
  std::set<std::string> damaged_;
  size_t most_prefixes_ = 0;
  std::vector<Prefix> prefixes_;
  uint64_t takeovers_ = 0;
};

}  // namespace rwkv::simulator
