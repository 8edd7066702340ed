#include "services/common/periodic.h"

#include <utility>

namespace rwkv::common {

Periodic::Periodic(absl::Duration interval, std::function<void()> chore)
    : interval_(interval), chore_(std::move(chore)), thread_([this] { Loop(); }) {}

Periodic::~Periodic() {
  {
    absl::MutexLock lock(&mu_);
    stop_ = true;
  }
  thread_.join();
}

void Periodic::Loop() {
  for (;;) {
    chore_();
    absl::MutexLock lock(&mu_);
    if (mu_.AwaitWithTimeout(absl::Condition(&stop_), interval_)) return;
  }
}

}  // namespace rwkv::common
