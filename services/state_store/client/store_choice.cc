#include "services/state_store/client/store_choice.h"

#include <algorithm>
#include <utility>

#include "absl/time/clock.h"
#include "grpcpp/client_context.h"
#include "rwkv/v1/state_store.grpc.pb.h"

namespace rwkv::state_store {
namespace {

constexpr absl::Duration kConnectLimit = absl::Seconds(1);
constexpr absl::Duration kProbeLimit = absl::Seconds(1);
constexpr absl::Duration kFirstPause = absl::Milliseconds(500);
constexpr absl::Duration kLastPause = absl::Seconds(16);

}  // namespace

struct StoreChoice::Probe {
  explicit Probe(const std::shared_ptr<grpc::Channel>& channel) : stub(channel) {}

  v1::StateCatalog::Stub stub;
  grpc::ClientContext context;
  v1::StateCatalogDescribeRequest request;
  v1::StateCatalogDescribeResponse response;
};

StoreChoice::StoreChoice(std::vector<std::shared_ptr<grpc::Channel>> channels, size_t home)
    : channels_(std::move(channels)), home_(home % channels_.size()), states_(channels_.size()) {}

StoreChoice::~StoreChoice() {
  absl::MutexLock lock(&mu_);
  ending_ = true;
  for (const State& state : states_) {
    if (state.probe != nullptr) state.probe->context.TryCancel();
  }
  const auto over = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) { return probes_ == 0; };
  mu_.Await(absl::Condition(&over));  // Cancelled calls end at once.
}

bool StoreChoice::Connect(size_t store, absl::Time deadline) const {
  grpc::Channel& channel = *channels_[store];
  for (;;) {
    const grpc_connectivity_state state = channel.GetState(/*try_to_connect=*/true);
    if (state == GRPC_CHANNEL_READY) return true;
    if (state == GRPC_CHANNEL_TRANSIENT_FAILURE || state == GRPC_CHANNEL_SHUTDOWN) return false;
    if (!channel.WaitForStateChange(state, absl::ToChronoTime(deadline))) return false;
  }
}

size_t StoreChoice::Choose(absl::Time deadline) {
  if (channels_.size() == 1) return 0;
  for (size_t tries = 0; tries < channels_.size(); ++tries) {
    AskFailed();
    size_t store = home_;
    {
      absl::MutexLock lock(&mu_);
      for (size_t i = 0; i < channels_.size() && states_[store].failed; ++i) store = (home_ + i) % channels_.size();
      if (states_[store].failed) break;
    }
    if (Connect(store, std::min(deadline, absl::Now() + kConnectLimit))) return store;
    Failed(store);
  }
  absl::MutexLock lock(&mu_);
  size_t first = home_;
  for (size_t i = 0; i < states_.size(); ++i) {
    if (states_[i].failed_at < states_[first].failed_at) first = i;
  }
  return first;
}

void StoreChoice::Failed(size_t store) {
  if (channels_.size() == 1) return;
  absl::MutexLock lock(&mu_);
  State& state = states_[store];
  const absl::Time now = absl::Now();
  state.failed_at = now;
  if (state.failed) return;  // One of the calls that were under way when it failed.
  state.failed = true;
  state.ask_at = now + std::min(kLastPause, kFirstPause * (1 << std::min(state.failures, 10)));
  ++state.failures;
}

void StoreChoice::Answered(size_t store) {
  if (channels_.size() == 1) return;
  absl::MutexLock lock(&mu_);
  states_[store].failed = false;
  states_[store].failures = 0;
}

void StoreChoice::AskFailed() {
  const absl::Time now = absl::Now();
  std::vector<std::pair<size_t, Probe*>> probes;
  {
    absl::MutexLock lock(&mu_);
    if (ending_) return;
    for (size_t i = 0; i < states_.size(); ++i) {
      State& state = states_[i];
      if (!state.failed || state.probe != nullptr || now < state.ask_at) continue;
      state.probe = new Probe(channels_[i]);
      ++probes_;
      probes.emplace_back(i, state.probe);
    }
  }
  // Not under the lock: a call that fails at once may call back on this thread.
  for (const auto& [store, probe] : probes) {
    probe->context.set_deadline(absl::ToChronoTime(now + kProbeLimit));
    probe->stub.async()->Describe(
        &probe->context, &probe->request, &probe->response,
        [this, store = store, probe = probe](const grpc::Status& status) { OnProbed(store, probe, status.ok()); });
  }
}

void StoreChoice::OnProbed(size_t store, Probe* probe, bool answered) {
  absl::MutexLock lock(&mu_);
  State& state = states_[store];
  state.probe = nullptr;
  state.ask_at = absl::Now() + kFirstPause;
  if (answered) state.failed = false;
  delete probe;
  --probes_;
}

}  // namespace rwkv::state_store
