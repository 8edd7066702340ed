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

void EventLoop::PostAndRun(Event event) {
  std::vector<Queued> batch;
  {
    absl::MutexLock lock(&mu_);
    if (stopping_) return;
    queue_.push_back({std::move(event), false});
    if (running_) return;
    batch = TakeBatch();
  }
  RunBatch(std::move(batch));
}

std::vector<EventLoop::Queued> EventLoop::TakeBatch() {
  running_ = true;
  last_round_ = absl::Now();
  requests_ = 0;
  return std::exchange(queue_, {});
}

void EventLoop::RunBatch(std::vector<Queued> batch) {
  for (Queued& queued : batch) {
    queued.event();
    queued.event = nullptr;
  }
  after_events_();
  absl::MutexLock lock(&mu_);
  running_ = false;
}

void EventLoop::Stop() {
  {
    absl::MutexLock lock(&mu_);
    stopping_ = true;
  }
  if (thread_.joinable()) thread_.join();
}

void EventLoop::Run() {
  bool stopping = false;
  while (!stopping) {
    std::vector<Queued> batch;
    {
      absl::MutexLock lock(&mu_);
      mu_.AwaitWithTimeout(absl::Condition(this, &EventLoop::HasWork), options_.tick);
      if (running_) continue;
      stopping = stopping_;
      batch = TakeBatch();
    }
    RunBatch(std::move(batch));
  }
}

}  // namespace rwkv::router
