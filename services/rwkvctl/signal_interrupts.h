// Ctrl-C as a call.
#pragma once

#include <signal.h>

#include <functional>
#include <memory>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "services/rwkvctl/command.h"

namespace rwkv::rwkvctl {

// Waits for SIGINT in a thread of its own, so that a handler may take locks. Without a handler the process ends as a
// shell expects it of one that SIGINT killed (130).
class SignalInterrupts : public Interrupts {
 public:
  // Blocks SIGINT in the calling thread and those it starts: call before the first one. Never destroyed, since its
  // thread never ends. One a process.
  static SignalInterrupts& Start();

  void SetHandler(std::function<void()> handler) override ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  SignalInterrupts();
  [[noreturn]] void Wait() ABSL_LOCKS_EXCLUDED(mutex_);

  sigset_t signals_;
  absl::Mutex mutex_;
  std::function<void()> handler_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace rwkv::rwkvctl
