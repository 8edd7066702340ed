#include "services/router/tenants/tenant_book.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "services/common/grpc_status.h"

namespace rwkv::router {
namespace {

// When a call of the tenant will end nobody knows.
constexpr absl::Duration kRetryBusy = absl::Seconds(1);
// Every worker is told; it is put together this often.
constexpr absl::Duration kTellInterval = absl::Milliseconds(100);
// What a router took that was not heard of for so long is not known to have been taken just now.
constexpr absl::Duration kRouterForgotten = absl::Seconds(10);

absl::Status NoTenant(const std::string& tenant) {
  return absl::PermissionDeniedError(tenant.empty()
                                         ? std::string("the caller is of no tenant, and only tenants are served")
                                         : absl::StrCat("the tenant \"", tenant, "\" is not served here"));
}

}  // namespace

void TenantBook::SetTenants(const std::vector<TenantLimits>& tenants) {
  absl::MutexLock lock(&mu_);
  const absl::Time now = clock_->Now();
  for (auto& [name, account] : accounts_) account.known = false;
  for (const TenantLimits& limits : tenants) {
    Account& account = accounts_[limits.name];
    account.limits = limits;
    account.known = true;
    account.requests.SetRate(limits.requests_per_minute, now);
    account.tokens.SetRate(limits.tokens_per_minute, now);
    if (account.requests_total != nullptr) continue;
    const auto counter = [&](const char* name, const char* help, common::Metrics::Labels labels) {
      labels["tenant"] = limits.name;
      return &metrics_->Counter(name, help, labels);
    };
    account.running_gauge =
        &metrics_->Gauge("rwkv_router_tenant_running_calls", "Calls let in and not over.", {{"tenant", limits.name}});
    account.requests_total = counter("rwkv_router_tenant_requests_total", "Calls that were let in.", {});
    const char* const tokens_help = "Tokens fed as input, and sent as answers.";
    account.prompt_tokens_total = counter("rwkv_router_tenant_tokens_total", tokens_help, {{"kind", "prompt"}});
    account.generated_tokens_total = counter("rwkv_router_tenant_tokens_total", tokens_help, {{"kind", "generated"}});
    for (const char* limit : {"requests_per_minute", "tokens_per_minute", "concurrent_turns", "stored_bytes"}) {
      counter("rwkv_router_tenant_refused_total", "Calls refused for a limit of the tenants file.", {{"limit", limit}});
    }
  }
}

void TenantBook::TakeRequests(Account& account, double requests, absl::Time now) {
  account.requests.Take(requests, now);
  account.requests_taken += requests;
}

void TenantBook::TakeTokens(Account& account, double tokens, absl::Time now) {
  account.tokens.Take(tokens, now);
  account.tokens_taken += tokens;
}

void TenantBook::Tell(v1::RouterAnnouncement* router) {
  absl::MutexLock lock(&mu_);
  const absl::Time now = clock_->Now();
  if (now - told_at_ >= kTellInterval) {
    told_at_ = now;
    told_.clear_tenants();
    for (auto& [name, account] : accounts_) {
      if (told_.tenants_size() == kMaxTold) break;
      if (account.running == 0 && account.requests.IsFull(now) && account.tokens.IsFull(now)) continue;
      v1::TenantUse& use = *told_.add_tenants();
      use.set_tenant(name);
      use.set_requests(account.requests_taken);
      use.set_tokens(account.tokens_taken);
      use.set_running_calls(static_cast<uint32_t>(account.running));
    }
  }
  *router->mutable_tenants() = told_.tenants();
}

void TenantBook::Heard(const std::vector<v1::RouterAnnouncement>& others) {
  absl::MutexLock lock(&mu_);
  const absl::Time now = clock_->Now();
  for (auto& [name, account] : accounts_) account.running_elsewhere = 0;
  for (auto it = elsewhere_.begin(); it != elsewhere_.end();) {
    it = now - it->second.heard > kRouterForgotten ? elsewhere_.erase(it) : std::next(it);
  }
  for (const v1::RouterAnnouncement& router : others) {
    Elsewhere& elsewhere = elsewhere_[router.incarnation()];
    elsewhere.heard = now;
    for (const v1::TenantUse& use : router.tenants()) {
      const auto found = accounts_.find(use.tenant());
      if (found == accounts_.end()) continue;
      Account& account = found->second;
      account.running_elsewhere += use.running_calls();
      const auto a_minutes_worth_before = [](double taken, const TokenBucket& bucket) {
        return std::max(0.0, taken - static_cast<double>(bucket.per_minute()));
      };
      auto& counted = elsewhere.taken
                          .try_emplace(use.tenant(), a_minutes_worth_before(use.requests(), account.requests),
                                       a_minutes_worth_before(use.tokens(), account.tokens))
                          .first->second;
      account.requests.Take(use.requests() - counted.first, now);
      account.tokens.Take(use.tokens() - counted.second, now);
      counted = {use.requests(), use.tokens()};
    }
  }
}

const TenantBook::Account* TenantBook::Find(const std::string& tenant) const {
  const auto found = accounts_.find(tenant);
  return found == accounts_.end() || !found->second.known ? nullptr : &found->second;
}

absl::StatusOr<TenantLimits> TenantBook::Limits(const std::string& tenant) const {
  absl::MutexLock lock(&mu_);
  const Account* const account = Find(tenant);
  if (account == nullptr) return NoTenant(tenant);
  return account->limits;
}

double TenantBook::Weight(const std::string& tenant) const {
  absl::MutexLock lock(&mu_);
  const Account* const account = Find(tenant);
  return account == nullptr ? 1 : account->limits.weight;
}

absl::Status TenantBook::Refuse(const Account& account, const std::string& limit, int64_t value, absl::Duration wait) {
  metrics_
      ->Counter("rwkv_router_tenant_refused_total", "Calls refused for a limit of the tenants file.",
                {{"limit", limit}, {"tenant", account.limits.name}})
      .Increment();
  return common::WithRetryInfo(
      common::WithErrorInfo(
          absl::ResourceExhaustedError(absl::StrCat("tenant ", account.limits.name, " is at its ", limit, ", ", value)),
          "TENANT_LIMIT"),
      wait);
}

void TenantBook::CountRefusal(const std::string& tenant, const std::string& limit) {
  absl::MutexLock lock(&mu_);
  const Account* const account = Find(tenant);
  if (account != nullptr) (void)Refuse(*account, limit, 0, kRetryBusy);
}

absl::StatusOr<std::shared_ptr<TenantBook::Ticket>> TenantBook::Admit(const std::string& tenant, double tokens) {
  absl::MutexLock lock(&mu_);
  const absl::Time now = clock_->Now();
  if (Find(tenant) == nullptr) return NoTenant(tenant);
  Account& account = accounts_[tenant];
  const TenantLimits& limits = account.limits;
  if (limits.concurrent_turns != 0 && account.running + account.running_elsewhere >= limits.concurrent_turns) {
    return Refuse(account, "concurrent_turns", limits.concurrent_turns, kRetryBusy);
  }
  if (const absl::Duration wait = account.requests.Wait(1, now); wait > absl::ZeroDuration()) {
    return Refuse(account, "requests_per_minute", limits.requests_per_minute, wait);
  }
  // At least one token, so that who is in debt waits.
  tokens = std::max(tokens, 1.0);
  if (const absl::Duration wait = account.tokens.Wait(tokens, now); wait > absl::ZeroDuration()) {
    return Refuse(account, "tokens_per_minute", limits.tokens_per_minute, wait);
  }
  TakeRequests(account, 1, now);
  TakeTokens(account, tokens, now);
  account.requests_total->Increment();
  account.running_gauge->Set(static_cast<double>(++account.running));
  return std::shared_ptr<Ticket>(new Ticket(this, tenant, tokens));
}

absl::Status TenantBook::AdmitRequest(const std::string& tenant) {
  absl::MutexLock lock(&mu_);
  const absl::Time now = clock_->Now();
  if (Find(tenant) == nullptr) return NoTenant(tenant);
  Account& account = accounts_[tenant];
  if (const absl::Duration wait = account.requests.Wait(1, now); wait > absl::ZeroDuration()) {
    return Refuse(account, "requests_per_minute", account.limits.requests_per_minute, wait);
  }
  TakeRequests(account, 1, now);
  account.requests_total->Increment();
  return absl::OkStatus();
}

TenantBook::Ticket::~Ticket() {
  absl::MutexLock lock(&book_->mu_);
  Account& account = book_->accounts_[tenant_];
  account.running_gauge->Set(static_cast<double>(--account.running));
}

void TenantBook::Ticket::Fed(uint64_t prompt_tokens) {
  absl::MutexLock lock(&book_->mu_);
  Account& account = book_->accounts_[tenant_];
  TakeTokens(account, static_cast<double>(prompt_tokens) - taken_, book_->clock_->Now());
  taken_ = static_cast<double>(prompt_tokens);
  if (prompt_tokens > prompt_tokens_) {
    account.prompt_tokens_total->Increment(static_cast<double>(prompt_tokens - prompt_tokens_));
  }
  prompt_tokens_ = prompt_tokens;
}

void TenantBook::Ticket::Drawn(uint64_t tokens) {
  absl::MutexLock lock(&book_->mu_);
  Account& account = book_->accounts_[tenant_];
  TakeTokens(account, static_cast<double>(tokens), book_->clock_->Now());
  account.generated_tokens_total->Increment(static_cast<double>(tokens));
  generated_tokens_ += tokens;
}

void TenantBook::Ticket::Refund() {
  absl::MutexLock lock(&book_->mu_);
  if (generated_tokens_ > 0 || prompt_tokens_ > 0) return;
  Account& account = book_->accounts_[tenant_];
  const absl::Time now = book_->clock_->Now();
  TakeTokens(account, -taken_, now);
  TakeRequests(account, -1, now);
  taken_ = 0;
}

UsageTotals TenantBook::Ticket::Count() {
  absl::MutexLock lock(&book_->mu_);
  UsageTotals& totals = book_->accounts_[tenant_].totals;
  totals.turns += 1;
  totals.prompt_tokens += prompt_tokens_;
  totals.generated_tokens += generated_tokens_;
  return totals;
}

}  // namespace rwkv::router
