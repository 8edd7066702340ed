// Who may come in while the house is full. The turn manager would refuse the same calls, but only after its one thread,
// which those who decode wait for, has looked at them. So a flood is answered here, by the thread that read the call.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "services/common/clock.h"

namespace rwkv::router {

// Thread-safe. Outlives its places.
class Crowd {
 public:
  struct Options {
    int capacity = 0;                                  // Required, > 0. Calls that run or wait.
    std::function<double(const std::string&)> weight;  // A tenant's share; empty: alike.
    std::function<uint64_t()> random;                  // Required.
    std::function<void(const absl::Status&)> refused;  // Counts; may be empty.
  };
  // How long who is refused is told to stay away, on average. It grows while more of a tenant's calls are refused than
  // get in: so a flood keeps two calls for each free place coming, however large it is, and the line stays full.
  static constexpr absl::Duration kMinPause = absl::Seconds(1), kMaxPause = absl::Seconds(16);

  // A call that is in.
  class Place {
   public:
    ~Place() { Leave(); }
    Place(const Place&) = delete;
    Place& operator=(const Place&) = delete;
    // Once is enough.
    void Leave();

   private:
    friend class Crowd;
    Place(Crowd* crowd, std::string tenant) : crowd_(crowd), tenant_(std::move(tenant)) {}
    Crowd* const crowd_;
    const std::string tenant_;
    std::atomic<bool> left_{false};
  };

  // `clock` is borrowed.
  Crowd(Options options, common::Clock* clock) : options_(std::move(options)), clock_(clock) {}

  // kResourceExhausted with RetryInfo: full, and no other tenant has more for its weight than this one would. One with
  // less comes in all the same: the turn manager sends somebody else's call away for it.
  absl::StatusOr<std::shared_ptr<Place>> Enter(const std::string& tenant) ABSL_LOCKS_EXCLUDED(mu_);
  // A call that may come back to its turn, which has a place: it is counted, and let in.
  std::shared_ptr<Place> EnterAgain(const std::string& tenant) ABSL_LOCKS_EXCLUDED(mu_);

 private:
  struct Party {
    int in = 0;
    absl::Time since = absl::InfinitePast();  // What follows is counted since then.
    int entered = 0;
    int refused = 0;
    absl::Duration pause = kMinPause;
  };

  void Leave(const std::string& tenant) ABSL_LOCKS_EXCLUDED(mu_);
  bool HasItsShare(const std::string& tenant, int in) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  std::shared_ptr<Place> LetIn(const std::string& tenant) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // How long this one is to stay away.
  absl::Duration Pause(Party& party) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const Options options_;
  common::Clock* const clock_;
  mutable absl::Mutex mu_;
  int in_ ABSL_GUARDED_BY(mu_) = 0;
  std::map<std::string, Party> parties_ ABSL_GUARDED_BY(mu_);  // Those with calls that are in.
};

}  // namespace rwkv::router
