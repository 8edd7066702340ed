#include "services/rwkvctl/signal_interrupts.h"

#include <pthread.h>
#include <unistd.h>

#include <thread>
#include <utility>

namespace rwkv::rwkvctl {

SignalInterrupts& SignalInterrupts::Start() {
  static SignalInterrupts& interrupts = *new SignalInterrupts;
  return interrupts;
}

SignalInterrupts::SignalInterrupts() {
  sigemptyset(&signals_);
  sigaddset(&signals_, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals_, nullptr);
  std::thread([this] { Wait(); }).detach();
}

void SignalInterrupts::SetHandler(std::function<void()> handler) {
  absl::MutexLock lock(&mutex_);
  handler_ = std::move(handler);
}

void SignalInterrupts::Wait() {
  for (;;) {
    int signal = 0;
    sigwait(&signals_, &signal);
    absl::MutexLock lock(&mutex_);
    if (!handler_) _exit(128 + SIGINT);
    handler_();
  }
}

}  // namespace rwkv::rwkvctl
