#include "services/rwkvctl/load/histogram.h"

#include <algorithm>
#include <cmath>

namespace rwkv::rwkvctl {
namespace {

constexpr int kBits = 7;  // Of the place within a power of two.
constexpr int64_t kPerPower = int64_t{1} << kBits;
// Values below 2^kBits have a bucket each; then come the powers from 2^kBits to 2^62.
constexpr int64_t kBuckets = (63 - kBits + 1) * kPerPower;

int HighestBit(int64_t value) { return 63 - __builtin_clzll(static_cast<uint64_t>(value)); }

int64_t BucketOf(int64_t value) {
  if (value < kPerPower) return value;
  const int shift = HighestBit(value) - kBits;
  return shift * kPerPower + (value >> shift);  // value >> shift is in [kPerPower, 2 * kPerPower).
}

// The middle of the bucket.
int64_t ValueOf(int64_t bucket) {
  if (bucket < 2 * kPerPower) return bucket;
  const int64_t shift = bucket / kPerPower - 1;
  const int64_t first = (bucket - shift * kPerPower) << shift;
  return first + (int64_t{1} << shift) / 2;
}

}  // namespace

DurationHistogram::DurationHistogram() : buckets_(kBuckets) {}

void DurationHistogram::Add(absl::Duration duration) {
  const int64_t value = std::max<int64_t>(0, absl::ToInt64Nanoseconds(duration));
  ++buckets_[BucketOf(value)];
  min_ = count_ == 0 ? value : std::min(min_, value);
  max_ = std::max(max_, value);
  sum_ += static_cast<double>(value);
  ++count_;
}

absl::Duration DurationHistogram::mean() const {
  return count_ == 0 ? absl::ZeroDuration() : absl::Nanoseconds(sum_ / static_cast<double>(count_));
}

absl::Duration DurationHistogram::Quantile(double q) const {
  const auto rank = std::max<int64_t>(1, std::llround(std::ceil(q * static_cast<double>(count_))));
  int64_t below = 0;
  for (int64_t bucket = 0; bucket < kBuckets; ++bucket) {
    below += buckets_[bucket];
    if (below >= rank) return absl::Nanoseconds(std::clamp(ValueOf(bucket), min_, max_));
  }
  return max();
}

}  // namespace rwkv::rwkvctl
