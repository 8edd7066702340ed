// Which of several stores a call goes to. All serve the same sessions (one PostgreSQL, one S3), so any will do: a
// client stays with its own, leaves it when it fails, and comes back when it answers again.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "grpcpp/channel.h"

namespace rwkv::state_store {

// Thread-safe. With one store there is nothing to choose, and nothing is asked or waited for.
class StoreChoice {
 public:
  // `home`: the store to begin with and to come back to; any number.
  StoreChoice(std::vector<std::shared_ptr<grpc::Channel>> channels, size_t home);
  ~StoreChoice();

  StoreChoice(const StoreChoice&) = delete;
  StoreChoice& operator=(const StoreChoice&) = delete;

  size_t size() const { return channels_.size(); }

  // The store for the next call: connected, if one can be within a moment (and `deadline`), so that a call that may not
  // run twice does not meet a store that is known to be gone. If all have failed, the one that did so first.
  size_t Choose(absl::Time deadline) ABSL_LOCKS_EXCLUDED(mu_);

  // A call at it came to nothing (kUnavailable, or no answer in time): it gets no other until it has answered a
  // Describe, while another store has not failed.
  void Failed(size_t store) ABSL_LOCKS_EXCLUDED(mu_);
  // A call at it came back.
  void Answered(size_t store) ABSL_LOCKS_EXCLUDED(mu_);

 private:
  struct Probe;
  struct State {
    bool failed = false;
    int failures = 0;  // Without an answered call between; the pause before it is asked grows.
    absl::Time failed_at = absl::InfinitePast();  // The last time.
    absl::Time ask_at = absl::InfinitePast();     // Not before.
    Probe* probe = nullptr;                       // A Describe that is on its way.
  };

  bool Connect(size_t store, absl::Time deadline) const;
  // Sends a Describe to each that has failed, if it is time to.
  void AskFailed() ABSL_LOCKS_EXCLUDED(mu_);
  void OnProbed(size_t store, Probe* probe, bool answered) ABSL_LOCKS_EXCLUDED(mu_);

  const std::vector<std::shared_ptr<grpc::Channel>> channels_;
  const size_t home_;
  absl::Mutex mu_;
  std::vector<State> states_ ABSL_GUARDED_BY(mu_);
  int probes_ ABSL_GUARDED_BY(mu_) = 0;
  bool ending_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace rwkv::state_store
