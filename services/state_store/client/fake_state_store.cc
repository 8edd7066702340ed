#include "services/state_store/client/fake_state_store.h"

#include <algorithm>
#include <utility>

#include "absl/time/clock.h"
#include "grpcpp/server.h"
#include "grpcpp/server_builder.h"
#include "grpcpp/support/channel_arguments.h"
#include "kernels/base/status_macros.h"
#include "rocksdb/env.h"
#include "services/common/metrics.h"
#include "services/state_store/embedded_state_store.h"
#include "services/state_store/rpc/state_catalog_service.h"
#include "services/state_store/rpc/state_records_service.h"

namespace rwkv::state_store {

// In the order of making; destroyed in reverse.
struct FakeStateStore::Server {
  std::unique_ptr<common::Metrics> metrics;
  std::unique_ptr<rocksdb::Env> env;
  std::unique_ptr<EmbeddedStateStore> embedded;
  std::unique_ptr<StateCatalogService> catalog;
  std::unique_ptr<StateRecordsService> records;
  std::unique_ptr<grpc::Server> server;
  std::shared_ptr<grpc::Channel> channel;
};

FakeStateStore::FakeStateStore(std::unique_ptr<Server> server)
    : server_(std::move(server)),
      catalog_(NewCatalogClient(server_->channel)),
      records_(NewRecordsClient(server_->channel)) {}

FakeStateStore::~FakeStateStore() { server_->server->Shutdown(absl::ToChronoTime(absl::UnixEpoch())); }

absl::StatusOr<std::unique_ptr<FakeStateStore>> FakeStateStore::Create(common::Clock* clock) {
  auto server = std::make_unique<Server>();
  RWKV_ASSIGN_OR_RETURN(server->metrics, common::Metrics::Create(""));
  server->env.reset(rocksdb::NewMemEnv(rocksdb::Env::Default()));
  EmbeddedStateStore::Options options;
  options.database.data_dir = "/fake_state_store";
  options.database.env = server->env.get();
  options.store.prefix_cache_bytes = 64 << 20;
  options.sweep_interval = absl::ZeroDuration();
  options.session_sweep_interval = absl::ZeroDuration();
  options.reclaim_interval = absl::ZeroDuration();
  options.resume_check_interval = absl::ZeroDuration();
  RWKV_ASSIGN_OR_RETURN(server->embedded, EmbeddedStateStore::Create(options, clock, server->metrics.get()));
  server->catalog = std::make_unique<StateCatalogService>(StateCatalogService::Identity{"fake-state-store", 0, ""},
                                                          &server->embedded->store(), server->metrics.get());
  server->records = std::make_unique<StateRecordsService>(StateRecordsService::Options(),
                                                          &server->embedded->store().records(), server->metrics.get());
  grpc::ServerBuilder builder;
  builder.RegisterService(server->catalog.get());
  builder.RegisterService(server->records.get());
  server->server = builder.BuildAndStart();
  if (server->server == nullptr) return absl::InternalError("the fake's server did not start");
  server->channel = server->server->InProcessChannel(grpc::ChannelArguments());
  return std::unique_ptr<FakeStateStore>(new FakeStateStore(std::move(server)));
}

void FakeStateStore::FailWith(absl::Status status) {
  absl::MutexLock lock(&mu_);
  fail_with_ = std::move(status);
}

void FakeStateStore::LoseAnswersWith(absl::Status status) {
  absl::MutexLock lock(&mu_);
  lose_answers_with_ = std::move(status);
}

void FakeStateStore::FailImportsWith(absl::Status status) {
  absl::MutexLock lock(&mu_);
  fail_imports_with_ = std::move(status);
}

int64_t FakeStateStore::record_bytes() const { return server_->embedded->store().records().bytes(); }

void FakeStateStore::LoseImportAnswersWith(absl::Status status) {
  absl::MutexLock lock(&mu_);
  lose_import_answers_with_ = std::move(status);
}

void FakeStateStore::FailAppendsWith(absl::Status status) {
  absl::MutexLock lock(&mu_);
  fail_appends_with_ = std::move(status);
}

void FakeStateStore::FailDropsWith(absl::Status status) {
  absl::MutexLock lock(&mu_);
  fail_drops_with_ = std::move(status);
}

void FakeStateStore::FailPrefixPutsWith(absl::Status status) {
  absl::MutexLock lock(&mu_);
  fail_prefix_puts_with_ = std::move(status);
}

void FakeStateStore::FailPrefixDrops(int count, absl::Status status) {
  absl::MutexLock lock(&mu_);
  failing_prefix_drops_ = count;
  fail_prefix_drops_with_ = std::move(status);
}

void FakeStateStore::HoldPrefixLookups(bool held) {
  absl::MutexLock lock(&mu_);
  answers_prefix_lookups_ = !held;
}

void FakeStateStore::HoldCommits(bool held) {
  absl::MutexLock lock(&mu_);
  answers_commits_ = !held;
}

int FakeStateStore::held_commits() {
  absl::MutexLock lock(&mu_);
  return held_commits_;
}

int FakeStateStore::prefix_lookups() {
  absl::MutexLock lock(&mu_);
  return prefix_lookups_;
}

absl::Duration FakeStateStore::prefix_lookup_limit() {
  absl::MutexLock lock(&mu_);
  return prefix_lookup_limit_;
}

int FakeStateStore::held_prefix_lookups() {
  absl::MutexLock lock(&mu_);
  return held_prefix_lookups_;
}

void FakeStateStore::FailGetRecords(int count, absl::Status status) {
  absl::MutexLock lock(&mu_);
  failing_get_records_ = count;
  fail_get_records_with_ = std::move(status);
}

void FakeStateStore::FailFindTurns(int count, absl::Status status) {
  absl::MutexLock lock(&mu_);
  failing_find_turns_ = count;
  fail_find_turns_with_ = std::move(status);
}

std::shared_ptr<grpc::Channel> FakeStateStore::channel() const { return server_->channel; }

template <typename Result, typename Call>
Result FakeStateStore::Run(Call call) {
  {
    absl::MutexLock lock(&mu_);
    if (!fail_with_.ok()) return fail_with_;
  }
  Result result = call();
  absl::MutexLock lock(&mu_);
  if (!lose_answers_with_.ok()) return lose_answers_with_;
  return result;
}

absl::StatusOr<v1::StateCatalogDescribeResponse> FakeStateStore::Describe(
    const v1::StateCatalogDescribeRequest& request, absl::Time deadline) {
  return Run<absl::StatusOr<v1::StateCatalogDescribeResponse>>([&] { return catalog_->Describe(request, deadline); });
}

absl::StatusOr<v1::CreateSessionResponse> FakeStateStore::CreateSession(const v1::CreateSessionRequest& request,
                                                                        absl::Time deadline) {
  return Run<absl::StatusOr<v1::CreateSessionResponse>>([&] { return catalog_->CreateSession(request, deadline); });
}

absl::StatusOr<v1::ImportSessionResponse> FakeStateStore::ImportSession(const v1::ImportSessionRequest& request,
                                                                        absl::Time deadline) {
  {
    absl::MutexLock lock(&mu_);
    if (!fail_imports_with_.ok()) return fail_imports_with_;
  }
  const auto answer =
      Run<absl::StatusOr<v1::ImportSessionResponse>>([&] { return catalog_->ImportSession(request, deadline); });
  absl::MutexLock lock(&mu_);
  if (!lose_import_answers_with_.ok()) return lose_import_answers_with_;
  return answer;
}

absl::StatusOr<v1::GetSessionResponse> FakeStateStore::GetSession(const v1::GetSessionRequest& request,
                                                                  absl::Time deadline) {
  return Run<absl::StatusOr<v1::GetSessionResponse>>([&] { return catalog_->GetSession(request, deadline); });
}

absl::StatusOr<v1::ListSessionsResponse> FakeStateStore::ListSessions(const v1::ListSessionsRequest& request,
                                                                      absl::Time deadline) {
  return Run<absl::StatusOr<v1::ListSessionsResponse>>([&] { return catalog_->ListSessions(request, deadline); });
}

absl::StatusOr<v1::ForkSessionResponse> FakeStateStore::ForkSession(const v1::ForkSessionRequest& request,
                                                                    absl::Time deadline) {
  return Run<absl::StatusOr<v1::ForkSessionResponse>>([&] { return catalog_->ForkSession(request, deadline); });
}

absl::StatusOr<v1::RewindSessionResponse> FakeStateStore::RewindSession(const v1::RewindSessionRequest& request,
                                                                        absl::Time deadline) {
  return Run<absl::StatusOr<v1::RewindSessionResponse>>([&] { return catalog_->RewindSession(request, deadline); });
}

absl::StatusOr<v1::DeleteSessionResponse> FakeStateStore::DeleteSession(const v1::DeleteSessionRequest& request,
                                                                        absl::Time deadline) {
  return Run<absl::StatusOr<v1::DeleteSessionResponse>>([&] { return catalog_->DeleteSession(request, deadline); });
}

absl::StatusOr<v1::AcquireLeaseResponse> FakeStateStore::AcquireLease(const v1::AcquireLeaseRequest& request,
                                                                      absl::Time deadline) {
  return Run<absl::StatusOr<v1::AcquireLeaseResponse>>([&] { return catalog_->AcquireLease(request, deadline); });
}

absl::StatusOr<v1::RenewLeasesResponse> FakeStateStore::RenewLeases(const v1::RenewLeasesRequest& request,
                                                                    absl::Time deadline) {
  return Run<absl::StatusOr<v1::RenewLeasesResponse>>([&] { return catalog_->RenewLeases(request, deadline); });
}

absl::StatusOr<v1::ReleaseLeaseResponse> FakeStateStore::ReleaseLease(const v1::ReleaseLeaseRequest& request,
                                                                      absl::Time deadline) {
  return Run<absl::StatusOr<v1::ReleaseLeaseResponse>>([&] { return catalog_->ReleaseLease(request, deadline); });
}

absl::StatusOr<v1::BeginTurnResponse> FakeStateStore::BeginTurn(const v1::BeginTurnRequest& request,
                                                                absl::Time deadline) {
  return Run<absl::StatusOr<v1::BeginTurnResponse>>([&] { return catalog_->BeginTurn(request, deadline); });
}

absl::StatusOr<v1::AppendTokensResponse> FakeStateStore::AppendTokens(const v1::AppendTokensRequest& request,
                                                                      absl::Time deadline) {
  {
    absl::MutexLock lock(&mu_);
    if (!fail_appends_with_.ok()) return fail_appends_with_;
  }
  return Run<absl::StatusOr<v1::AppendTokensResponse>>([&] { return catalog_->AppendTokens(request, deadline); });
}

absl::StatusOr<v1::FindTurnResponse> FakeStateStore::FindTurn(const v1::FindTurnRequest& request, absl::Time deadline) {
  {
    absl::MutexLock lock(&mu_);
    if (failing_find_turns_ > 0) {
      --failing_find_turns_;
      return fail_find_turns_with_;
    }
  }
  return Run<absl::StatusOr<v1::FindTurnResponse>>([&] { return catalog_->FindTurn(request, deadline); });
}

absl::StatusOr<std::vector<uint32_t>> FakeStateStore::ReadTokens(const v1::ReadTokensRequest& request,
                                                                 absl::Time deadline) {
  return Run<absl::StatusOr<std::vector<uint32_t>>>([&] { return catalog_->ReadTokens(request, deadline); });
}

absl::StatusOr<v1::CommitSnapshotResponse> FakeStateStore::CommitSnapshot(const v1::CommitSnapshotRequest& request,
                                                                          absl::Time deadline) {
  {
    absl::MutexLock lock(&mu_);
    ++held_commits_;
    const bool answers = mu_.AwaitWithTimeout(absl::Condition(&answers_commits_), absl::Seconds(60));
    --held_commits_;
    if (!answers) return absl::DeadlineExceededError("a test holds it");
    deadline = std::max(deadline, absl::Now() + absl::Seconds(1));
  }
  return Run<absl::StatusOr<v1::CommitSnapshotResponse>>([&] { return catalog_->CommitSnapshot(request, deadline); });
}

absl::StatusOr<v1::FindSnapshotResponse> FakeStateStore::FindSnapshot(const v1::FindSnapshotRequest& request,
                                                                      absl::Time deadline) {
  return Run<absl::StatusOr<v1::FindSnapshotResponse>>([&] { return catalog_->FindSnapshot(request, deadline); });
}

absl::StatusOr<v1::DropSnapshotResponse> FakeStateStore::DropSnapshot(const v1::DropSnapshotRequest& request,
                                                                      absl::Time deadline) {
  {
    absl::MutexLock lock(&mu_);
    if (!fail_drops_with_.ok()) return fail_drops_with_;
  }
  return Run<absl::StatusOr<v1::DropSnapshotResponse>>([&] { return catalog_->DropSnapshot(request, deadline); });
}

absl::StatusOr<v1::FindPrefixResponse> FakeStateStore::FindPrefix(const v1::FindPrefixRequest& request,
                                                                  absl::Time deadline) {
  {
    absl::MutexLock lock(&mu_);
    ++prefix_lookups_;
    prefix_lookup_limit_ = deadline - absl::Now();
    ++held_prefix_lookups_;
    const bool answers = mu_.AwaitWithTimeout(absl::Condition(&answers_prefix_lookups_), absl::Seconds(60));
    --held_prefix_lookups_;
    if (!answers) return absl::DeadlineExceededError("a test holds it");
    deadline = std::max(deadline, absl::Now() + absl::Seconds(1));  // It was the test that took its time.
  }
  return Run<absl::StatusOr<v1::FindPrefixResponse>>([&] { return catalog_->FindPrefix(request, deadline); });
}

absl::StatusOr<v1::PutPrefixResponse> FakeStateStore::PutPrefix(const v1::PutPrefixRequest& request,
                                                                absl::Time deadline) {
  {
    absl::MutexLock lock(&mu_);
    if (!fail_prefix_puts_with_.ok()) return fail_prefix_puts_with_;
  }
  return Run<absl::StatusOr<v1::PutPrefixResponse>>([&] { return catalog_->PutPrefix(request, deadline); });
}

absl::StatusOr<v1::DropPrefixResponse> FakeStateStore::DropPrefix(const v1::DropPrefixRequest& request,
                                                                  absl::Time deadline) {
  {
    absl::MutexLock lock(&mu_);
    if (failing_prefix_drops_ > 0) {
      --failing_prefix_drops_;
      return fail_prefix_drops_with_;
    }
  }
  return Run<absl::StatusOr<v1::DropPrefixResponse>>([&] { return catalog_->DropPrefix(request, deadline); });
}

absl::StatusOr<v1::GetUsageResponse> FakeStateStore::GetUsage(const v1::GetUsageRequest& request, absl::Time deadline) {
  return Run<absl::StatusOr<v1::GetUsageResponse>>([&] { return catalog_->GetUsage(request, deadline); });
}

absl::StatusOr<v1::PutUsageResponse> FakeStateStore::PutUsage(const v1::PutUsageRequest& request, absl::Time deadline) {
  return Run<absl::StatusOr<v1::PutUsageResponse>>([&] { return catalog_->PutUsage(request, deadline); });
}

absl::Status FakeStateStore::PutRecords(absl::Span<const v1::RecordInfo> infos,
                                        absl::Span<const absl::Span<const char>> data, size_t in_all,
                                        const std::shared_ptr<const void>& owner, absl::Time deadline) {
  return Run<absl::Status>([&] { return records_->PutRecords(infos, data, in_all, owner, deadline); });
}

absl::Status FakeStateStore::ReadRecords(absl::Span<const v1::RecordInfo> infos, absl::Span<const absl::Span<char>> to,
                                         absl::Time deadline) {
  {
    absl::MutexLock lock(&mu_);
    if (failing_get_records_ > 0) {
      --failing_get_records_;
      return fail_get_records_with_;
    }
  }
  return Run<absl::Status>([&] { return records_->ReadRecords(infos, to, deadline); });
}

}  // namespace rwkv::state_store
