// The state store as its users see it: the router (catalog, and records for exports) and the workers (records).
//
// Every call blocks until it is answered, fails, or `deadline` passes (kDeadlineExceeded). absl::InfiniteFuture() is
// allowed, yet a caller on a request's path passes the request's own deadline. Thread-safe. Errors are the service's
// own (see proto/rwkv/v1/state_store.proto and rpc/), plus kUnavailable when it cannot be reached.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "absl/types/span.h"
#include "grpcpp/channel.h"
#include "rwkv/v1/state_store.pb.h"

namespace rwkv::state_store {

// rwkv.v1.StateCatalog. Retried: whether kUnavailable is tried again here, within the deadline, a bounded number of
// times. The others are not, since they may have happened: the caller re-reads first.
class CatalogClient {
 public:
  virtual ~CatalogClient() = default;

  // Retried.
  virtual absl::StatusOr<v1::StateCatalogDescribeResponse> Describe(const v1::StateCatalogDescribeRequest& request,
                                                                    absl::Time deadline) = 0;
  // Not retried: a lost answer would come back as kAlreadyExists.
  virtual absl::StatusOr<v1::CreateSessionResponse> CreateSession(const v1::CreateSessionRequest& request,
                                                                  absl::Time deadline) = 0;
  // Not retried, for the same reason. Records first: PutRecord.
  virtual absl::StatusOr<v1::ImportSessionResponse> ImportSession(const v1::ImportSessionRequest& request,
                                                                  absl::Time deadline) = 0;
  // Retried.
  virtual absl::StatusOr<v1::GetSessionResponse> GetSession(const v1::GetSessionRequest& request,
                                                            absl::Time deadline) = 0;
  // Retried.
  virtual absl::StatusOr<v1::ListSessionsResponse> ListSessions(const v1::ListSessionsRequest& request,
                                                                absl::Time deadline) = 0;
  // Not retried.
  virtual absl::StatusOr<v1::ForkSessionResponse> ForkSession(const v1::ForkSessionRequest& request,
                                                              absl::Time deadline) = 0;
  // Retried: a second rewind to the same position under the same lease changes nothing.
  virtual absl::StatusOr<v1::RewindSessionResponse> RewindSession(const v1::RewindSessionRequest& request,
                                                                  absl::Time deadline) = 0;
  // Not retried: a lost answer would come back as kNotFound.
  virtual absl::StatusOr<v1::DeleteSessionResponse> DeleteSession(const v1::DeleteSessionRequest& request,
                                                                  absl::Time deadline) = 0;
  // Retried: while the lease of the same holder and incarnation lives, it is extended and given back.
  virtual absl::StatusOr<v1::AcquireLeaseResponse> AcquireLease(const v1::AcquireLeaseRequest& request,
                                                                absl::Time deadline) = 0;
  // Retried.
  virtual absl::StatusOr<v1::RenewLeasesResponse> RenewLeases(const v1::RenewLeasesRequest& request,
                                                              absl::Time deadline) = 0;
  // Retried.
  virtual absl::StatusOr<v1::ReleaseLeaseResponse> ReleaseLease(const v1::ReleaseLeaseRequest& request,
                                                                absl::Time deadline) = 0;
  // Retried: the request_id makes it run once.
  virtual absl::StatusOr<v1::BeginTurnResponse> BeginTurn(const v1::BeginTurnRequest& request, absl::Time deadline) = 0;
  // Not retried: on kUnavailable or kDeadlineExceeded the tokens may be in the log or not. FindTurn tells.
  virtual absl::StatusOr<v1::AppendTokensResponse> AppendTokens(const v1::AppendTokensRequest& request,
                                                                absl::Time deadline) = 0;
  // Retried.
  virtual absl::StatusOr<v1::FindTurnResponse> FindTurn(const v1::FindTurnRequest& request, absl::Time deadline) = 0;
  // Retried as a whole. All of [begin, end), joined.
  virtual absl::StatusOr<std::vector<uint32_t>> ReadTokens(const v1::ReadTokensRequest& request,
                                                           absl::Time deadline) = 0;
  // Retried: committing an equal manifest again changes nothing.
  virtual absl::StatusOr<v1::CommitSnapshotResponse> CommitSnapshot(const v1::CommitSnapshotRequest& request,
                                                                    absl::Time deadline) = 0;
  // Retried.
  virtual absl::StatusOr<v1::FindSnapshotResponse> FindSnapshot(const v1::FindSnapshotRequest& request,
                                                                absl::Time deadline) = 0;
  // Retried: dropping what is gone is fine.
  virtual absl::StatusOr<v1::DropSnapshotResponse> DropSnapshot(const v1::DropSnapshotRequest& request,
                                                                absl::Time deadline) = 0;
  // Retried.
  virtual absl::StatusOr<v1::FindPrefixResponse> FindPrefix(const v1::FindPrefixRequest& request,
                                                            absl::Time deadline) = 0;
  // Retried: the same snapshot again changes nothing.
  virtual absl::StatusOr<v1::PutPrefixResponse> PutPrefix(const v1::PutPrefixRequest& request, absl::Time deadline) = 0;
  // Retried.
  virtual absl::StatusOr<v1::DropPrefixResponse> DropPrefix(const v1::DropPrefixRequest& request,
                                                            absl::Time deadline) = 0;
  // Retried.
  virtual absl::StatusOr<v1::GetUsageResponse> GetUsage(const v1::GetUsageRequest& request, absl::Time deadline) = 0;
  // Retried: totals only grow.
  virtual absl::StatusOr<v1::PutUsageResponse> PutUsage(const v1::PutUsageRequest& request, absl::Time deadline) = 0;
};

// rwkv.v1.StateRecords.
class RecordsClient {
 public:
  virtual ~RecordsClient() = default;

  // Stores records of one snapshot, layers ascending, in one call. Each of `data` must have the length and the checksum
  // (services/state_store/client/crc32c.h) that its info says, else kDataLoss. kAlreadyExists: a layer of that snapshot
  // is there with another length or checksum. After an error some of them may be there. Durable only once
  // CommitSnapshot has named them. Retried: a record is immutable, the same one again changes nothing. `owner` keeps
  // `data`, which is sent from where it lies, sometimes for a moment longer than the call lasts. Null: it is copied.
  // `in_all`: how many records of the snapshot are put by all calls together, so that the store begins to make them
  // durable before CommitSnapshot asks for it. 0: it is not said.
  virtual absl::Status PutRecords(absl::Span<const v1::RecordInfo> infos, absl::Span<const absl::Span<const char>> data,
                                  size_t in_all, const std::shared_ptr<const void>& owner, absl::Time deadline) = 0;
  // Fills `to`, each as long as its info says, with bytes whose CRC32C is that of the info, checked at both ends (else
  // kDataLoss; the caller drops the snapshot and goes on from an older one). One snapshot, layers ascending. kNotFound:
  // no such record, as one dropped meanwhile. After an error anything may be in `to`. Retried.
  virtual absl::Status ReadRecords(absl::Span<const v1::RecordInfo> infos, absl::Span<const absl::Span<char>> to,
                                   absl::Time deadline) = 0;

  // One of them.
  absl::Status PutRecord(const v1::RecordInfo& info, absl::Span<const char> data,
                         const std::shared_ptr<const void>& owner, absl::Time deadline) {
    return PutRecords({&info, 1}, {&data, 1}, 0, owner, deadline);
  }
  absl::Status ReadRecord(const v1::RecordInfo& info, absl::Span<char> to, absl::Time deadline) {
    return ReadRecords({&info, 1}, {&to, 1}, deadline);
  }
  // The same, in a string.
  absl::StatusOr<std::string> GetRecord(const v1::RecordInfo& info, absl::Time deadline);
};

// Over gRPC. The channel (services/common/channel.h) may be shared; it connects on first use and again by itself.
std::unique_ptr<CatalogClient> NewCatalogClient(std::shared_ptr<grpc::Channel> channel);
// `share_memory`: records go through memory that a store on this machine shares with us (shared_window.h), up to 64 MiB
// of it; whether a store can is found by trying, once.
std::unique_ptr<RecordsClient> NewRecordsClient(std::shared_ptr<grpc::Channel> channel, bool share_memory = false);

// Of several stores that serve the same sessions (at least one). A client begins with `home` (unset: any), goes to
// another when that one cannot be reached or says nothing for 5 s, and comes back when it answers again. What is
// "Retried" above is retried at others within the same deadline, each attempt at most 5 s. What is not is sent once, to
// a store with a connection; when it fails, the caller's next call goes to another store.
using Channels = std::vector<std::shared_ptr<grpc::Channel>>;
std::unique_ptr<CatalogClient> NewCatalogClient(Channels channels, absl::optional<size_t> home = absl::nullopt);
std::unique_ptr<RecordsClient> NewRecordsClient(Channels channels, absl::optional<size_t> home = absl::nullopt,
                                                bool share_memory = false);

// What each says of itself, all asked at once.
std::vector<absl::StatusOr<v1::StateCatalogDescribeResponse>> DescribeStores(const Channels& channels,
                                                                             absl::Time deadline);

}  // namespace rwkv::state_store
