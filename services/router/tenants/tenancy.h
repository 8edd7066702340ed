// The door of the router's services: who calls, which sessions are its own, and what it may still have.
//
//   context ──► CallerOf(): tenant of the API key or certificate ──► Admit(): limits of the tenants file ──► the call
//   session ids: In() on the way in, Out() on everything that goes back
//   at the end of a call without a session: Record(), durable in the store before the client has its last message
//
// Turns of sessions are counted by the store, with their tokens (GetUsage in proto/rwkv/v1/state_store.proto).
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "grpcpp/server_context.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/sessions.pb.h"
#include "rwkv/v1/state_store.pb.h"
#include "rwkv/v1/worker.pb.h"
#include "services/common/clock.h"
#include "services/common/executor.h"
#include "services/common/metrics.h"
#include "services/common/reloaded_file.h"
#include "services/common/security/security.h"
#include "services/router/tenants/crowd.h"
#include "services/router/tenants/tenant_book.h"
#include "services/router/tenants/tenants_file.h"
#include "services/state_store/client/state_store_client.h"

namespace rwkv::router {

class Tenancy;

// Whose call it is. May be copied; not used after its Tenancy.
class Caller {
 public:
  const std::string& tenant() const { return tenant_; }  // Empty: of none.
  bool is_operator() const { return is_operator_; }

  // kInvalidArgument: not an id that a client may send.
  static absl::Status CheckSessionId(absl::string_view field, absl::string_view id);
  // A session's id as the rest of the cluster knows it, and as the caller does.
  std::string In(absl::string_view id) const;
  std::string Out(absl::string_view scoped) const;
  void Out(v1::Session* session) const;
  absl::Status Out(const absl::Status& status) const;

  // Whether only some models are for the tenant.
  bool has_models() const { return limits_.has_value() && !limits_->models.empty(); }
  // kPermissionDenied: not one of the tenant's models.
  absl::Status CheckModel(const v1::ModelInfo& model) const;
  // kInvalidArgument: longer than the tenant's answers may be. One that does not say how long is made to fit.
  absl::Status CheckAnswer(v1::GenerateRequest* request) const;
  // Null: nothing is counted. Else as TenantBook::Admit.
  absl::StatusOr<std::shared_ptr<TenantBook::Ticket>> Admit(double tokens) const;
  // kResourceExhausted: the tenant keeps as much as it may, as the store said some seconds ago. The first asks the
  // store; the other never waits, and lets pass while nothing is known.
  absl::Status CheckStorage(absl::Time deadline) const;
  absl::Status CheckStorageWithoutWaiting() const;

 private:
  friend class Tenancy;
  Tenancy* tenancy_ = nullptr;  // Null: there are no limits.
  std::string tenant_;
  bool is_operator_ = false;
  absl::optional<TenantLimits> limits_;
};

// Thread-safe.
class Tenancy {
 public:
  using Identify = std::function<absl::StatusOr<common::Identity>(const grpc::ServerContextBase&)>;
  struct Options {
    Identify identify;         // Empty: everybody is the same, of no tenant.
    std::string tenants_file;  // Empty: no limits, and any tenant that a key names.
    absl::Duration reload_interval = absl::Seconds(1);
    std::string source;                                           // Unique per start of this router.
    absl::Duration storage_age = absl::Seconds(5);                // What a tenant keeps is asked for anew after it.
    absl::Duration store_timeout = absl::Seconds(5);              // Of those questions, and of a record.
    std::function<std::vector<v1::RouterAnnouncement>()> others;  // Routers of this cluster; empty: none.
    // Calls of Generation that run or wait; who would be one more is refused at the door. 0: no bound here.
    int max_calls = 0;
    int max_store_calls = 0;                           // Of Sessions, likewise: a flood of them fills no queue.
    std::function<uint64_t()> random;                  // Required with either.
    std::function<void(const absl::Status&)> refused;  // Counts those; may be empty.
  };

  // Pointers are borrowed. kInvalidArgument: the tenants file, or one without a way to know tenants.
  static absl::StatusOr<std::unique_ptr<Tenancy>> Create(const Options& options, state_store::CatalogClient* catalog,
                                                         common::Clock* clock, common::Metrics* metrics);
  ~Tenancy();

  // kPermissionDenied: with a tenants file, a caller that is neither of a tenant in it nor an operator.
  absl::StatusOr<Caller> CallerOf(const grpc::ServerContextBase& context) ABSL_LOCKS_EXCLUDED(mu_);

  // The same of a call that feeds nothing: it counts as a request. Errors also as TenantBook::AdmitRequest().
  absl::StatusOr<Caller> CallerOfRequest(const grpc::ServerContextBase& context) ABSL_LOCKS_EXCLUDED(mu_);

  // A place for the call, for as long as it runs or waits; null without `max_calls`. As Crowd::Enter(), or if it
  // `comes_back` to a turn, Crowd::EnterAgain().
  absl::StatusOr<std::shared_ptr<Crowd::Place>> Enter(const Caller& caller, bool comes_back);

  // A place for a call that a thread answers by asking the store; null without `max_store_calls`. As Crowd::Enter().
  absl::StatusOr<std::shared_ptr<Crowd::Place>> EnterStore(const Caller& caller);

  // Counts the ticket's call and calls `then`, from another thread, once the store knows; at once if it is away: then
  // it learns with the next call. `ticket` may be null: nothing is counted.
  void Record(const std::shared_ptr<TenantBook::Ticket>& ticket, std::function<void()> then);

  // What is said to other routers of what tenants took here; and hears what they said, and looks at the tenants file.
  // Any thread. Twice a second, also while nobody calls: what others took is to leave the buckets when they took it,
  // not with the next call, and an operator wants to know what the new file is worth.
  void Announce(v1::RouterAnnouncement* router) ABSL_LOCKS_EXCLUDED(mu_);

  // A tenant's weight; 1 of one that is not in the file. Any thread.
  double WeightOf(const std::string& tenant) const;

  // Whose usage `caller` asks for: its own, or as an operator that of `tenant`. kPermissionDenied, kInvalidArgument.
  absl::StatusOr<std::string> WhoseUsage(const Caller& caller, const std::string& tenant) const;
  // What it is, from the store. Waits for it.
  absl::StatusOr<v1::GetUsageResponse> GetUsage(const std::string& tenant, absl::Time deadline);

 private:
  friend class Caller;
  struct Stored {
    absl::optional<int64_t> bytes;  // As last known.
    absl::Time asked = absl::InfinitePast();
  };

  Tenancy(const Options& options, state_store::CatalogClient* catalog, common::Clock* clock, common::Metrics* metrics);
  absl::StatusOr<int64_t> AskStored(const std::string& tenant, absl::Time deadline) ABSL_LOCKS_EXCLUDED(mu_);
  absl::Status CheckStored(const TenantLimits& limits, int64_t bytes);
  void HearOthers() ABSL_LOCKS_EXCLUDED(mu_);

  const Options options_;
  state_store::CatalogClient* const catalog_;
  common::Clock* const clock_;
  TenantBook book_;
  const std::unique_ptr<Crowd> crowd_;  // Null: none. So is the other.
  const std::unique_ptr<Crowd> store_crowd_;
  absl::Mutex mu_;
  std::unique_ptr<common::ReloadedFile> file_ ABSL_GUARDED_BY(mu_);
  std::map<std::string, Stored> stored_ ABSL_GUARDED_BY(mu_);
  absl::Time heard_at_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
  std::unique_ptr<common::Executor> executor_;  // Last: its work uses the rest.
};

}  // namespace rwkv::router
