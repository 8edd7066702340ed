#include "services/router/driver/event_loop.h"

#include <utility>

namespace rwkv::router {

EventLoop::EventLoop(const Options& options, Event after_events)
    : options_(options), after_events_(std::move(after_events)), thread_([this] { Run(); }) {}

EventLoop::~EventLoop() { Stop(); }

bool EventLoop::TryPost(Event event) {
  absl::MutexLock lock(&mu_);
  if (stopping_ || requests_ >= options_.max_requests) return false;
  ++requests_;
  queue_.push_back({std::move(event), true});
  return true;
}

void EventLoop::Post(Event event) {
  absl::MutexLock lock(&mu_);
  if (!stopping_) queue_.push_back({std::move(event), false});
}

void EventLoop::Stop() {
  {
    absl::MutexLock lock(&mu_);
    stopping_ = true;
  }
  if (thread_.joinable()) thread_.join();
}

void EventLoop::Run() {
  while (true) {
    std::vector<Queued> batch;
    bool stopping = false;
    {
      absl::MutexLock lock(&mu_);
      mu_.AwaitWithTimeout(absl::Condition(this, &EventLoop::HasWork), options_.tick);
      last_round_ = absl::Now();
      batch.swap(queue_);
      requests_ = 0;
      stopping = stopping_;
    }
    for (Queued& queued : batch) {
      queued.event();
      queued.event = nullptr;
    }
    after_events_();
    if (stopping) return;
  }
}

}  // namespace rwkv::router
