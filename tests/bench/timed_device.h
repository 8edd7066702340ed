// A device that notes when each of its operations ran: for the timeline of a step.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/base/device.h"

namespace rwkv::bench {

struct TimedOp {
  std::string kind;    // "products", as in the table of operations, or "copy"
  std::string detail;  // the products' sizes, OUTPUTSxINPUTS
  int64_t bytes = 0;   // of weights and states that it must read or write once
  double begin = 0;    // seconds of the steady clock
  double end = 0;
};

// Seconds of the steady clock.
double SteadySeconds();

// `device`, whose operations must have run when their calls return, as a CPU's have. Appends to `log`, which outlives
// it, from the threads that call its streams: one at a time.
std::unique_ptr<kernels::Device> TimeDevice(std::unique_ptr<kernels::Device> device, std::vector<TimedOp>* log);

}  // namespace rwkv::bench
