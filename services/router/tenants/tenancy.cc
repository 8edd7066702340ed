#include "services/router/tenants/tenancy.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "kernels/base/status_macros.h"
#include "services/common/grpc_status.h"
#include "services/common/logging.h"
#include "services/common/tenant_ids.h"
#include "services/router/core/turn_input.h"

namespace rwkv::router {
namespace {

constexpr size_t kMaxFileBytes = 16 << 20;
constexpr int kThreads = 2;
constexpr size_t kMaxQueued = 1024;
// Routers hear of each other twice a second.
constexpr absl::Duration kHearInterval = absl::Milliseconds(100);

std::unique_ptr<Crowd> MakeCrowd(const Tenancy::Options& options, int capacity, const TenantBook* book,
                                 common::Clock* clock) {
  if (capacity == 0) return nullptr;
  const auto weight = [book](const std::string& tenant) { return book->Weight(tenant); };
  return std::make_unique<Crowd>(Crowd::Options{capacity, weight, options.random, options.refused}, clock);
}

}  // namespace

absl::Status Caller::CheckSessionId(absl::string_view field, absl::string_view id) {
  if (const size_t mark = id.find(common::kTenantMark); mark != absl::string_view::npos) {
    return common::InvalidFieldError(field, absl::StrCat("byte ", mark, " is not one of A-Z a-z 0-9 . _ - :"));
  }
  return router::CheckSessionId(field, id);
}

std::string Caller::In(absl::string_view id) const { return common::ScopedId(tenant_, id); }

std::string Caller::Out(absl::string_view scoped) const {
  return std::string(tenant_.empty() ? scoped : common::SplitScopedId(scoped).id);
}

void Caller::Out(v1::Session* session) const {
  if (tenant_.empty()) return;
  session->set_id(Out(session->id()));
  session->set_forked_from(Out(session->forked_from()));
}

absl::Status Caller::Out(const absl::Status& status) const { return common::WithoutTenant(tenant_, status); }

absl::Status Caller::CheckModel(const v1::ModelInfo& model) const {
  if (!limits_.has_value() || limits_->models.empty()) return absl::OkStatus();
  for (const std::string& name : limits_->models) {
    if (name == model.name() || name == model.fingerprint()) return absl::OkStatus();
  }
  return absl::PermissionDeniedError(absl::StrCat("model: \"", model.name(), "\" is not for tenant ", tenant_));
}

absl::Status Caller::CheckAnswer(v1::GenerateRequest* request) const {
  if (!limits_.has_value() || limits_->max_tokens == 0) return absl::OkStatus();
  if (request->has_max_tokens() && request->max_tokens() > limits_->max_tokens) {
    return common::InvalidFieldError("max_tokens", absl::StrCat(request->max_tokens(), "; tenant ", tenant_,
                                                                " may have at most ", limits_->max_tokens));
  }
  if (!request->has_max_tokens() && limits_->max_tokens < kDefaultMaxTokens) {
    request->set_max_tokens(static_cast<uint32_t>(limits_->max_tokens));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<TenantBook::Ticket>> Caller::Admit(double tokens) const {
  if (!limits_.has_value()) return std::shared_ptr<TenantBook::Ticket>();
  tenancy_->HearOthers();
  return tenancy_->book_.Admit(tenant_, tokens);
}

absl::Status Caller::CheckStorage(absl::Time deadline) const {
  if (!limits_.has_value() || limits_->stored_bytes == 0) return absl::OkStatus();
  {
    absl::MutexLock lock(&tenancy_->mu_);
    const Tenancy::Stored& stored = tenancy_->stored_[tenant_];
    if (stored.bytes.has_value() && tenancy_->clock_->Now() < stored.asked + tenancy_->options_.storage_age) {
      return tenancy_->CheckStored(*limits_, *stored.bytes);
    }
  }
  RWKV_ASSIGN_OR_RETURN(const int64_t bytes, tenancy_->AskStored(tenant_, deadline));
  return tenancy_->CheckStored(*limits_, bytes);
}

absl::Status Caller::CheckStorageWithoutWaiting() const {
  if (!limits_.has_value() || limits_->stored_bytes == 0) return absl::OkStatus();
  absl::optional<int64_t> bytes;
  bool ask = false;
  {
    absl::MutexLock lock(&tenancy_->mu_);
    Tenancy::Stored& stored = tenancy_->stored_[tenant_];
    const absl::Time now = tenancy_->clock_->Now();
    bytes = stored.bytes;
    ask = now >= stored.asked + tenancy_->options_.storage_age;
    if (ask) stored.asked = now;
  }
  if (ask) {
    (void)tenancy_->executor_->TryRun([tenancy = tenancy_, tenant = tenant_] {
      (void)tenancy->AskStored(tenant, absl::Now() + tenancy->options_.store_timeout);
    });
  }
  return bytes.has_value() ? tenancy_->CheckStored(*limits_, *bytes) : absl::OkStatus();
}

Tenancy::Tenancy(const Options& options, state_store::CatalogClient* catalog, common::Clock* clock,
                 common::Metrics* metrics)
    : options_(options),
      catalog_(catalog),
      clock_(clock),
      book_(clock, metrics),
      crowd_(MakeCrowd(options, options.max_calls, &book_, clock)),
      store_crowd_(MakeCrowd(options, options.max_store_calls, &book_, clock)),
      executor_(std::make_unique<common::Executor>(kThreads, kMaxQueued)) {}

Tenancy::~Tenancy() { executor_ = nullptr; }

absl::StatusOr<std::unique_ptr<Tenancy>> Tenancy::Create(const Options& options, state_store::CatalogClient* catalog,
                                                         common::Clock* clock, common::Metrics* metrics) {
  std::unique_ptr<Tenancy> tenancy(new Tenancy(options, catalog, clock, metrics));
  if (options.tenants_file.empty()) return tenancy;
  if (options.identify == nullptr) {
    return absl::InvalidArgumentError("tenants want TLS: without it nobody says who calls");
  }
  const auto use = [book = &tenancy->book_](const std::string& text) {
    const absl::StatusOr<std::vector<TenantLimits>> tenants = ParseTenants(text);
    if (!tenants.ok()) return tenants.status();
    book->SetTenants(*tenants);
    return absl::OkStatus();
  };
  absl::MutexLock lock(&tenancy->mu_);
  RWKV_ASSIGN_OR_RETURN(tenancy->file_, common::ReloadedFile::Open(options.tenants_file, "tenants", kMaxFileBytes,
                                                                   options.reload_interval, use, metrics));
  return tenancy;
}

absl::StatusOr<Caller> Tenancy::CallerOf(const grpc::ServerContextBase& context) {
  Caller caller;
  if (options_.identify == nullptr) return caller;
  RWKV_ASSIGN_OR_RETURN(const common::Identity identity, options_.identify(context));
  caller.tenant_ = identity.tenant;
  caller.is_operator_ = identity.roles.Has(common::Role::kOperator);
  {
    absl::MutexLock lock(&mu_);
    if (file_ == nullptr) return caller;
    file_->Look(absl::Now());
  }
  if (caller.is_operator_ && caller.tenant_.empty()) return caller;
  RWKV_ASSIGN_OR_RETURN(caller.limits_, book_.Limits(caller.tenant_));
  caller.tenancy_ = this;
  return caller;
}

absl::StatusOr<Caller> Tenancy::CallerOfRequest(const grpc::ServerContextBase& context) {
  RWKV_ASSIGN_OR_RETURN(Caller caller, CallerOf(context));
  if (!caller.limits_.has_value()) return caller;
  HearOthers();
  RWKV_RETURN_IF_ERROR(book_.AdmitRequest(caller.tenant_));
  return caller;
}

void Tenancy::HearOthers() {
  if (options_.others == nullptr) return;
  {
    absl::MutexLock lock(&mu_);
    const absl::Time now = clock_->Now();
    if (now - heard_at_ < kHearInterval && now >= heard_at_) return;
    heard_at_ = now;
  }
  book_.Heard(options_.others());
}

void Tenancy::Announce(v1::RouterAnnouncement* router) {
  {
    absl::MutexLock lock(&mu_);
    if (file_ != nullptr) file_->Look(absl::Now());
  }
  HearOthers();
  book_.Tell(router);
}

absl::StatusOr<std::shared_ptr<Crowd::Place>> Tenancy::Enter(const Caller& caller, bool comes_back) {
  if (crowd_ == nullptr) return std::shared_ptr<Crowd::Place>();
  if (comes_back) return crowd_->EnterAgain(caller.tenant());
  return crowd_->Enter(caller.tenant());
}

absl::StatusOr<std::shared_ptr<Crowd::Place>> Tenancy::EnterStore(const Caller& caller) {
  if (store_crowd_ == nullptr) return std::shared_ptr<Crowd::Place>();
  return store_crowd_->Enter(caller.tenant());
}

void Tenancy::Record(const std::shared_ptr<TenantBook::Ticket>& ticket, std::function<void()> then) {
  if (ticket == nullptr) return then();
  v1::PutUsageRequest put;
  const UsageTotals totals = ticket->Count();
  put.set_tenant(ticket->tenant());
  put.set_source(options_.source);
  put.mutable_total()->set_turns(totals.turns);
  put.mutable_total()->set_prompt_tokens(totals.prompt_tokens);
  put.mutable_total()->set_generated_tokens(totals.generated_tokens);
  const bool runs = executor_->TryRun([this, put, then] {
    const absl::Status status = catalog_->PutUsage(put, absl::Now() + options_.store_timeout).status();
    if (!status.ok()) common::LogWarning("usage_not_recorded", {{"tenant", put.tenant()}, {"status", status}});
    then();
  });
  if (!runs) then();
}

double Tenancy::WeightOf(const std::string& tenant) const { return book_.Weight(tenant); }

absl::StatusOr<std::string> Tenancy::WhoseUsage(const Caller& caller, const std::string& tenant) const {
  const std::string whose = tenant.empty() ? caller.tenant() : tenant;
  if (!common::IsTenantName(whose)) {
    return common::InvalidFieldError("tenant", "wants the name of a tenant: the caller is of none");
  }
  if (whose != caller.tenant() && !caller.is_operator()) {
    return absl::PermissionDeniedError("the usage of another tenant is for operators");
  }
  return whose;
}

absl::StatusOr<v1::GetUsageResponse> Tenancy::GetUsage(const std::string& tenant, absl::Time deadline) {
  v1::GetUsageRequest get;
  get.set_tenant(tenant);
  return catalog_->GetUsage(get, deadline);
}

absl::StatusOr<int64_t> Tenancy::AskStored(const std::string& tenant, absl::Time deadline) {
  RWKV_ASSIGN_OR_RETURN(const v1::GetUsageResponse usage, GetUsage(tenant, deadline));
  absl::MutexLock lock(&mu_);
  Stored& stored = stored_[tenant];
  stored.asked = clock_->Now();
  stored.bytes = static_cast<int64_t>(usage.stored_bytes());
  return *stored.bytes;
}

absl::Status Tenancy::CheckStored(const TenantLimits& limits, int64_t bytes) {
  if (bytes < limits.stored_bytes) return absl::OkStatus();
  book_.CountRefusal(limits.name, "stored_bytes");
  return common::WithRetryInfo(
      common::WithErrorInfo(absl::ResourceExhaustedError(absl::StrCat("tenant ", limits.name, " keeps ", bytes,
                                                                      " bytes and is at its stored_bytes, ",
                                                                      limits.stored_bytes, ": delete sessions")),
                            "TENANT_LIMIT"),
      std::max(options_.storage_age, absl::Seconds(1)));
}

}  // namespace rwkv::router
