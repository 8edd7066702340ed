#include "services/rwkvctl/load/arrivals.h"

#include <cmath>

namespace rwkv::rwkvctl {
namespace {

constexpr uint64_t kArrivalStream = 1;

}  // namespace

Arrivals::Arrivals(const ArrivalOptions& options) : options_(options), random_(options.seed, kArrivalStream) {
  if (options_.poisson) expected_ = random_.Exponential();
}

absl::Duration Arrivals::Next() {
  // A process with rate r(t) is one with rate 1 in the time scale of R(t), the integral of r: R(t) = rate * t^2 / (2 *
  // ramp) up to the ramp's end, rate * (t - ramp / 2) from there. This is R's inverse.
  const double ramp = absl::ToDoubleSeconds(options_.ramp);
  const double in_ramp = options_.rate * ramp / 2;
  const double seconds =
      expected_ < in_ramp ? std::sqrt(2 * ramp * expected_ / options_.rate) : expected_ / options_.rate + ramp / 2;
  expected_ += options_.poisson ? random_.Exponential() : 1;
  return absl::Seconds(seconds);
}

}  // namespace rwkv::rwkvctl
