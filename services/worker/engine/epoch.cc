#include "services/worker/engine/epoch.h"

#include <utility>

namespace rwkv::worker {

Epoch::Epoch(v1::OpenEpoch open, std::shared_ptr<EpochSink> sink, std::unique_ptr<LinkReceiver> receiver,
             std::unique_ptr<LinkSender> sender, std::shared_ptr<state_store::RecordsClient> store)
    : open_(std::move(open)),
      sink_(std::move(sink)),
      receiver_(std::move(receiver)),
      sender_(std::move(sender)),
      store_(std::move(store)) {}

bool Epoch::TryPush(v1::ExecuteRequest& command) {
  absl::MutexLock lock(&mu_);
  if (!end_.ok()) return true;
  if (commands_.size() >= kMaxCommands) {
    wants_room_ = true;
    return false;
  }
  commands_.push_back(std::move(command));
  return true;
}

void Epoch::End(const absl::Status& why) {
  {
    absl::MutexLock lock(&mu_);
    if (!end_.ok()) return;
    end_ = why;
    commands_.clear();
    loaded_.clear();
  }
  if (receiver_ != nullptr) receiver_->Abort();
  if (sender_ != nullptr) sender_->Abort();
  sink_->End(why);
}

bool Epoch::ended() const {
  absl::MutexLock lock(&mu_);
  return !end_.ok();
}

bool Epoch::WaitUntilEnded(absl::Time deadline) const {
  absl::MutexLock lock(&mu_);
  const auto is_over = [this]() ABSL_NO_THREAD_SAFETY_ANALYSIS { return !end_.ok(); };
  return mu_.AwaitWithDeadline(absl::Condition(&is_over), deadline);
}

bool Epoch::Pop(bool wait, Work* work) {
  bool room = false;
  {
    absl::MutexLock lock(&mu_);
    if (wait) mu_.Await(absl::Condition(this, &Epoch::HasWork));
    if (!end_.ok() || !HasWork()) return false;
    work->is_loaded = !loaded_.empty();
    if (work->is_loaded) {
      work->loaded = std::move(loaded_.front());
      loaded_.pop_front();
    } else {
      work->command = std::move(commands_.front());
      commands_.pop_front();
      room = std::exchange(wants_room_, false);
    }
  }
  if (room) sink_->OnRoom();
  return true;
}

void Epoch::PushLoaded(Loaded loaded) {
  absl::MutexLock lock(&mu_);
  if (!end_.ok()) return;
  loaded_.push_back(std::move(loaded));
  const auto taken = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return !end_.ok() || loaded_.empty(); };
  mu_.Await(absl::Condition(&taken));
}

}  // namespace rwkv::worker
