// Which routers were heard of lately. Each announces itself to every worker it knows and is told of all others: so
// routers share out the pipelines without a service that knows them all.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "rwkv/v1/worker.pb.h"
#include "services/common/clock.h"

namespace rwkv::worker {

// Thread-safe.
class RouterRegistry {
 public:
  static constexpr size_t kMaxRouters = 256;                   // More are not remembered.
  static constexpr size_t kMaxTextBytes = 256;                 // Of each name and address; longer ones are cut.
  static constexpr int kMaxTenants = 1024;                     // Of each; more are dropped.
  static constexpr absl::Duration kLately = absl::Seconds(3);  // Routers announce themselves twice a second.
  static constexpr absl::Duration kSilence = absl::Seconds(5);

  explicit RouterRegistry(common::Clock* clock) : clock_(clock) {}  // Borrowed.

  void Heard(const v1::RouterAnnouncement& router) ABSL_LOCKS_EXCLUDED(mu_);

  // Those heard of within kLately, by name.
  std::vector<v1::RouterAnnouncement> Lately() const ABSL_LOCKS_EXCLUDED(mu_);

  // Whether `name` did announce itself and has not for kSilence. Of one that never did nothing is known: false.
  bool IsSilent(const std::string& name) const ABSL_LOCKS_EXCLUDED(mu_);

 private:
  struct Known {
    v1::RouterAnnouncement router;
    absl::Time heard;
  };

  common::Clock* const clock_;
  mutable absl::Mutex mu_;
  std::map<std::string, Known> known_ ABSL_GUARDED_BY(mu_);
};

}  // namespace rwkv::worker
