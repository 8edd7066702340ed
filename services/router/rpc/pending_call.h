// A call on its way to the turn manager: its client may leave before anybody there knows of it.
#pragma once

#include <atomic>

#include "services/router/driver/turn_manager.h"

namespace rwkv::router {

// Thread-safe. Shared by the call's reactor and by the work that hands the call over.
class PendingCall {
 public:
  explicit PendingCall(TurnManager* turns) : turns_(turns), id_(turns->NewCall()) {}

  CallId id() const { return id_; }
  TurnManager& turns() const { return *turns_; }

  // The client is gone.
  void Cancel() {
    gone_ = true;
    turns_->Cancel(id_);
  }
  // The turn manager has it. An earlier Cancel() found nothing to cancel.
  void HandedOver() {
    if (gone_) turns_->Cancel(id_);
  }

 private:
  TurnManager* const turns_;  // Not owned.
  const CallId id_;
  std::atomic<bool> gone_{false};
};

}  // namespace rwkv::router
