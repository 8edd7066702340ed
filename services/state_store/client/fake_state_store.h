// A whole state store inside a test: the real services and the real client over gRPC's in-process transport, on RocksDB
// in memory. What it answers is what the process answers, except that nothing outlives it.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "rwkv/v1/state_store.pb.h"
#include "services/common/clock.h"
#include "services/state_store/client/state_store_client.h"

namespace rwkv::state_store {

// Thread-safe.
class FakeStateStore final : public CatalogClient, public RecordsClient {
 public:
  // `clock` decides when leases expire; it outlives the fake.
  static absl::StatusOr<std::unique_ptr<FakeStateStore>> Create(common::Clock* clock);
  ~FakeStateStore() override;

  // From now on every call fails with `status` and does nothing, as when the store is away (kUnavailable) or its disk
  // is full (kResourceExhausted). OkStatus ends it.
  void FailWith(absl::Status status) ABSL_LOCKS_EXCLUDED(mu_);

  // The same, but the call has happened: only its answer is lost. The nastier half of kUnavailable.
  void LoseAnswersWith(absl::Status status) ABSL_LOCKS_EXCLUDED(mu_);

  // The same for ImportSession alone.
  void LoseImportAnswersWith(absl::Status status) ABSL_LOCKS_EXCLUDED(mu_);

  // FailWith() for AppendTokens alone, or DropSnapshot, or PutPrefix.
  void FailAppendsWith(absl::Status status) ABSL_LOCKS_EXCLUDED(mu_);
  void FailDropsWith(absl::Status status) ABSL_LOCKS_EXCLUDED(mu_);
  void FailPrefixPutsWith(absl::Status status) ABSL_LOCKS_EXCLUDED(mu_);
  // The next `count` calls of DropPrefix fail with `status`.
  void FailPrefixDrops(int count, absl::Status status) ABSL_LOCKS_EXCLUDED(mu_);
  // Calls of FindPrefix come, and are answered when it is false again.
  void HoldPrefixLookups(bool held) ABSL_LOCKS_EXCLUDED(mu_);
  int held_prefix_lookups() ABSL_LOCKS_EXCLUDED(mu_);
  int prefix_lookups() ABSL_LOCKS_EXCLUDED(mu_);                  // All that came.
  absl::Duration prefix_lookup_limit() ABSL_LOCKS_EXCLUDED(mu_);  // How long the last one would have waited.
  // The same of CommitSnapshot.
  void HoldCommits(bool held) ABSL_LOCKS_EXCLUDED(mu_);
  int held_commits() ABSL_LOCKS_EXCLUDED(mu_);

  // The next `count` reads of records fail with `status`.
  void FailGetRecords(int count, absl::Status status) ABSL_LOCKS_EXCLUDED(mu_);

  // The next `count` calls of FindTurn fail with `status`.
  void FailFindTurns(int count, absl::Status status) ABSL_LOCKS_EXCLUDED(mu_);

  // FailWith() for ImportSession alone.
  void FailImportsWith(absl::Status status) ABSL_LOCKS_EXCLUDED(mu_);

  // Of all records that are stored.
  int64_t record_bytes() const;

  // To hand to code that makes its own client.
  std::shared_ptr<grpc::Channel> channel() const;

  // CatalogClient.
  absl::StatusOr<v1::StateCatalogDescribeResponse> Describe(const v1::StateCatalogDescribeRequest& request,
                                                            absl::Time deadline) override;
  absl::StatusOr<v1::CreateSessionResponse> CreateSession(const v1::CreateSessionRequest& request,
                                                          absl::Time deadline) override;
  absl::StatusOr<v1::ImportSessionResponse> ImportSession(const v1::ImportSessionRequest& request,
                                                          absl::Time deadline) override;
  absl::StatusOr<v1::GetSessionResponse> GetSession(const v1::GetSessionRequest& request, absl::Time deadline) override;
  absl::StatusOr<v1::ListSessionsResponse> ListSessions(const v1::ListSessionsRequest& request,
                                                        absl::Time deadline) override;
  absl::StatusOr<v1::ForkSessionResponse> ForkSession(const v1::ForkSessionRequest& request,
                                                      absl::Time deadline) override;
  absl::StatusOr<v1::RewindSessionResponse> RewindSession(const v1::RewindSessionRequest& request,
                                                          absl::Time deadline) override;
  absl::StatusOr<v1::DeleteSessionResponse> DeleteSession(const v1::DeleteSessionRequest& request,
                                                          absl::Time deadline) override;
  absl::StatusOr<v1::AcquireLeaseResponse> AcquireLease(const v1::AcquireLeaseRequest& request,
                                                        absl::Time deadline) override;
  absl::StatusOr<v1::RenewLeasesResponse> RenewLeases(const v1::RenewLeasesRequest& request,
                                                      absl::Time deadline) override;
  absl::StatusOr<v1::ReleaseLeaseResponse> ReleaseLease(const v1::ReleaseLeaseRequest& request,
                                                        absl::Time deadline) override;
  absl::StatusOr<v1::BeginTurnResponse> BeginTurn(const v1::BeginTurnRequest& request, absl::Time deadline) override;
  absl::StatusOr<v1::AppendTokensResponse> AppendTokens(const v1::AppendTokensRequest& request,
                                                        absl::Time deadline) override;
  absl::StatusOr<v1::FindTurnResponse> FindTurn(const v1::FindTurnRequest& request, absl::Time deadline) override;
  absl::StatusOr<std::vector<uint32_t>> ReadTokens(const v1::ReadTokensRequest& request, absl::Time deadline) override;
  absl::StatusOr<v1::CommitSnapshotResponse> CommitSnapshot(const v1::CommitSnapshotRequest& request,
                                                            absl::Time deadline) override;
  absl::StatusOr<v1::FindSnapshotResponse> FindSnapshot(const v1::FindSnapshotRequest& request,
                                                        absl::Time deadline) override;
  absl::StatusOr<v1::DropSnapshotResponse> DropSnapshot(const v1::DropSnapshotRequest& request,
                                                        absl::Time deadline) override;
  absl::StatusOr<v1::FindPrefixResponse> FindPrefix(const v1::FindPrefixRequest& request, absl::Time deadline) override;
  absl::StatusOr<v1::PutPrefixResponse> PutPrefix(const v1::PutPrefixRequest& request, absl::Time deadline) override;
  absl::StatusOr<v1::DropPrefixResponse> DropPrefix(const v1::DropPrefixRequest& request, absl::Time deadline) override;
  absl::StatusOr<v1::GetUsageResponse> GetUsage(const v1::GetUsageRequest& request, absl::Time deadline) override;
  absl::StatusOr<v1::PutUsageResponse> PutUsage(const v1::PutUsageRequest& request, absl::Time deadline) override;

  // RecordsClient.
  absl::Status PutRecords(absl::Span<const v1::RecordInfo> infos, absl::Span<const absl::Span<const char>> data,
                          size_t in_all, const std::shared_ptr<const void>& owner, absl::Time deadline) override;
  absl::Status ReadRecords(absl::Span<const v1::RecordInfo> infos, absl::Span<const absl::Span<char>> to,
                           absl::Time deadline) override;

 private:
  struct Server;

  explicit FakeStateStore(std::unique_ptr<Server> server);

  template <typename Result, typename Call>
  Result Run(Call call) ABSL_LOCKS_EXCLUDED(mu_);

  const std::unique_ptr<Server> server_;
  const std::unique_ptr<CatalogClient> catalog_;
  const std::unique_ptr<RecordsClient> records_;
  absl::Mutex mu_;
  absl::Status fail_with_ ABSL_GUARDED_BY(mu_);
  absl::Status lose_answers_with_ ABSL_GUARDED_BY(mu_);
  absl::Status fail_imports_with_ ABSL_GUARDED_BY(mu_);
  absl::Status lose_import_answers_with_ ABSL_GUARDED_BY(mu_);
  absl::Status fail_appends_with_ ABSL_GUARDED_BY(mu_);
  absl::Status fail_drops_with_ ABSL_GUARDED_BY(mu_);
  absl::Status fail_prefix_puts_with_ ABSL_GUARDED_BY(mu_);
  int failing_prefix_drops_ ABSL_GUARDED_BY(mu_) = 0;
  absl::Status fail_prefix_drops_with_ ABSL_GUARDED_BY(mu_);
  bool answers_prefix_lookups_ ABSL_GUARDED_BY(mu_) = true;
  int prefix_lookups_ ABSL_GUARDED_BY(mu_) = 0;
  absl::Duration prefix_lookup_limit_ ABSL_GUARDED_BY(mu_);
  int held_prefix_lookups_ ABSL_GUARDED_BY(mu_) = 0;
  bool answers_commits_ ABSL_GUARDED_BY(mu_) = true;
  int held_commits_ ABSL_GUARDED_BY(mu_) = 0;
  int failing_find_turns_ ABSL_GUARDED_BY(mu_) = 0;
  absl::Status fail_find_turns_with_ ABSL_GUARDED_BY(mu_);
  int failing_get_records_ ABSL_GUARDED_BY(mu_) = 0;
  absl::Status fail_get_records_with_ ABSL_GUARDED_BY(mu_);
};

}  // namespace rwkv::state_store
