// When the requests of an open loop come, whatever became of those before.
#pragma once

#include <cstdint>

#include "absl/time/time.h"
#include "services/rwkvctl/load/random.h"

namespace rwkv::rwkvctl {

struct ArrivalOptions {
  double rate = 0;      // Requests a second, > 0, once the ramp is over.
  bool poisson = true;  // Else evenly spaced.
  absl::Duration ramp;  // The rate rises from 0 in a straight line for so long.
  uint64_t seed = 0;
};

// Arrival times since the beginning, rising. Evenly spaced ones begin at 0; a Poisson process begins with a pause.
class Arrivals {
 public:
  explicit Arrivals(const ArrivalOptions& options);

  absl::Duration Next();

 private:
  const ArrivalOptions options_;
  LoadRandom random_;
  double expected_ = 0;  // Arrivals expected until the next one: the integral of the rate up to it.
};

}  // namespace rwkv::rwkvctl
