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

Epoch::~Epoch() {
  sender_ = nullptr;  // And with it its thread, before what that works on.
}

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
    drawn_.clear();
    frames_.clear();
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

bool Epoch::Pop(absl::Time until, Work* work) {
  bool room = false;
  {
    absl::MutexLock lock(&mu_);
    if (until > absl::InfinitePast()) mu_.AwaitWithDeadline(absl::Condition(this, &Epoch::HasWork), until);
    if (!end_.ok() || !HasWork()) return false;
    if (!drawn_.empty()) {
      work->kind = Work::Kind::kDrawn;
      work->drawn = std::move(drawn_.front());
      drawn_.pop_front();
    } else if (!loaded_.empty()) {
      work->kind = Work::Kind::kLoaded;
      work->loaded = std::move(loaded_.front());
      loaded_.pop_front();
    } else if (HasOwnFrame()) {
      work->kind = Work::Kind::kOwnFrame;
    } else {
      work->kind = Work::Kind::kCommand;
      work->command = std::move(commands_.front());
      commands_.pop_front();
      ++commands_taken_;
      room = std::exchange(wants_room_, false);
    }
  }
  if (room) sink_->OnRoom();
  return true;
}

uint64_t Epoch::commands_taken() const {
  absl::MutexLock lock(&mu_);
  return commands_taken_;
}

void Epoch::PushDrawn(v1::StepResult drawn) {
  absl::MutexLock lock(&mu_);
  if (end_.ok()) drawn_.push_back(std::move(drawn));
}

void Epoch::PushFrame(absl::optional<uint64_t> own_after) {
  absl::MutexLock lock(&mu_);
  if (end_.ok()) frames_.push_back(own_after);
}

void Epoch::TakeFrame() {
  absl::MutexLock lock(&mu_);
  if (!frames_.empty()) frames_.pop_front();
}

void Epoch::PushLoaded(Loaded loaded) {
  absl::MutexLock lock(&mu_);
  if (!end_.ok()) return;
  loaded_.push_back(std::move(loaded));
  const auto taken = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return !end_.ok() || loaded_.empty(); };
  mu_.Await(absl::Condition(&taken));
}

}  // namespace rwkv::worker
