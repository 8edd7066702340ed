// What each tenant may do now, and what it does: limits from the file, buckets, running calls, counts. Nothing here
// waits; the clock is passed in.
//
// A call is let in while its tenant's buckets hold a request and the tokens of its input; tokens of the answer are
// taken as they go out. So a tenant may run into debt by its concurrent answers, and waits until that is filled. What a
// call did not feed or draw after all is given back. A tenant's limits may change under its calls.
//
// Limits are the cluster's: each router tells the others what it took (through the workers, within a second), and takes
// what others took from its own buckets, too. So a tenant has its whole limit whichever routers it uses; what it gets
// beyond, while routers do not know of each other's calls yet, is a debt at all of them.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "rwkv/v1/worker.pb.h"
#include "services/common/clock.h"
#include "services/common/metrics.h"
#include "services/router/tenants/tenants_file.h"
#include "services/router/tenants/token_bucket.h"

namespace rwkv::router {

// Of a tenant, since this process began, beside turns of sessions: the store counts those.
struct UsageTotals {
  uint64_t turns = 0;
  uint64_t prompt_tokens = 0;
  uint64_t generated_tokens = 0;
};

// Thread-safe. Outlives its tickets.
class TenantBook {
 public:
  // Both borrowed.
  TenantBook(common::Clock* clock, common::Metrics* metrics) : clock_(clock), metrics_(metrics) {}

  // From now on these are the tenants. One that is missing keeps its running calls and its counts.
  void SetTenants(const std::vector<TenantLimits>& tenants) ABSL_LOCKS_EXCLUDED(mu_);

  // kPermissionDenied: not in the file.
  absl::StatusOr<TenantLimits> Limits(const std::string& tenant) const ABSL_LOCKS_EXCLUDED(mu_);

  // 1 of one that is not in the file.
  double Weight(const std::string& tenant) const ABSL_LOCKS_EXCLUDED(mu_);

  // One call. It runs until the ticket goes.
  class Ticket {
   public:
    ~Ticket();
    Ticket(const Ticket&) = delete;
    Ticket& operator=(const Ticket&) = delete;

    const std::string& tenant() const { return tenant_; }
    // The input had so many tokens, whatever was thought.
    void Fed(uint64_t prompt_tokens);
    // So many more tokens went out.
    void Drawn(uint64_t tokens);
    // The call failed before anything came of it: as if it had not been.
    void Refund();
    // Counts what was fed and drawn, of a call without session; returns the tenant's totals with it.
    UsageTotals Count();

   private:
    friend class TenantBook;
    Ticket(TenantBook* book, std::string tenant, double taken)
        : book_(book), tenant_(std::move(tenant)), taken_(taken) {}

    TenantBook* const book_;
    const std::string tenant_;
    double taken_;  // For the input. Guarded by the book's lock, as are these:
    uint64_t prompt_tokens_ = 0;
    uint64_t generated_tokens_ = 0;
  };

  // `tokens`: of the input, as far as is known. kResourceExhausted with RetryInfo names the limit and its value.
  // kPermissionDenied: not in the file.
  absl::StatusOr<std::shared_ptr<Ticket>> Admit(const std::string& tenant, double tokens) ABSL_LOCKS_EXCLUDED(mu_);

  // One that feeds nothing (of a session, of texts): taken from the requests alone, whatever comes of it. Errors as
  // above.
  absl::Status AdmitRequest(const std::string& tenant) ABSL_LOCKS_EXCLUDED(mu_);

  // What was taken here, for other routers. At most kMaxTold tenants.
  static constexpr int kMaxTold = 1024;
  void Tell(v1::RouterAnnouncement* router) ABSL_LOCKS_EXCLUDED(mu_);
  // What other routers said last: all of those that are there. Often, whether or not anybody calls. Of one that was not
  // heard before, or not lately, at most a minute's worth is counted.
  void Heard(const std::vector<v1::RouterAnnouncement>& others) ABSL_LOCKS_EXCLUDED(mu_);

  // Counts a refusal by another limit of the file.
  void CountRefusal(const std::string& tenant, const std::string& limit) ABSL_LOCKS_EXCLUDED(mu_);

 private:
  struct Account {
    TenantLimits limits;
    bool known = true;  // In the file.
    TokenBucket requests;
    TokenBucket tokens;
    double requests_taken = 0;  // Here, all in all.
    double tokens_taken = 0;
    int64_t running = 0;
    int64_t running_elsewhere = 0;
    UsageTotals totals;
    prometheus::Gauge* running_gauge = nullptr;
    prometheus::Counter* requests_total = nullptr;
    prometheus::Counter* prompt_tokens_total = nullptr;
    prometheus::Counter* generated_tokens_total = nullptr;
  };

  // What another router took, as far as it is counted here.
  struct Elsewhere {
    absl::Time heard;
    std::map<std::string, std::pair<double, double>> taken;  // Requests and tokens, by tenant.
  };

  static void TakeRequests(Account& account, double requests, absl::Time now);
  static void TakeTokens(Account& account, double tokens, absl::Time now);
  const Account* Find(const std::string& tenant) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status Refuse(const Account& account, const std::string& limit, int64_t value, absl::Duration wait)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  common::Clock* const clock_;
  common::Metrics* const metrics_;
  mutable absl::Mutex mu_;
  std::map<std::string, Account> accounts_ ABSL_GUARDED_BY(mu_);
  std::map<std::string, Elsewhere> elsewhere_ ABSL_GUARDED_BY(mu_);  // By incarnation.
  v1::RouterAnnouncement told_ ABSL_GUARDED_BY(mu_);
  absl::Time told_at_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
};

}  // namespace rwkv::router
