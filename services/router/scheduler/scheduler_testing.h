// What tests of the scheduler have in common.
#pragma once

#include <variant>
#include <vector>

#include "services/router/scheduler/scheduler.h"

namespace rwkv::router {

inline Scheduler::Options SchedulerOptions(int stages, int slots, int rows) {
  Scheduler::Options options;
  options.stages = stages;
  options.slots = slots;
  options.max_batch_rows = rows;
  return options;
}

// Those of one kind, in their order.
template <typename T>
std::vector<T> Of(const std::vector<Command>& commands) {
  std::vector<T> found;
  for (const Command& command : commands) {
    if (const T* one = std::get_if<T>(&command)) found.push_back(*one);
  }
  return found;
}

}  // namespace rwkv::router
