// Times of any number of events in a fixed amount of memory.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/time/time.h"

namespace rwkv::rwkvctl {

// Counts by buckets whose width is at most 1/128 of their value (HdrHistogram's layout: every power of two is cut into
// 128), so that a quantile is off by at most 1/256 of itself. Nanoseconds; what is negative counts as 0, and what is
// beyond 292 years as that. About 58 KiB, however many times are added. Not thread-safe.
class DurationHistogram {
 public:
  static constexpr double kRelativeError = 1.0 / 256;

  DurationHistogram();

  void Add(absl::Duration duration);

  int64_t count() const { return count_; }
  // Exact; 0 when nothing was added.
  absl::Duration min() const { return absl::Nanoseconds(count_ == 0 ? 0 : min_); }
  absl::Duration max() const { return absl::Nanoseconds(max_); }
  absl::Duration mean() const;

  // The smallest time that at least this share of all is not above (nearest rank), to kRelativeError; q in [0, 1], 0 is
  // the smallest. 0 when nothing was added.
  absl::Duration Quantile(double q) const;

 private:
  std::vector<int64_t> buckets_;
  int64_t count_ = 0;
  int64_t min_ = 0;
  int64_t max_ = 0;
  double sum_ = 0;
};

}  // namespace rwkv::rwkvctl
