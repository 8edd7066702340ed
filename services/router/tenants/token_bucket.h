// So much a minute: a bucket that holds a minute's worth and fills steadily. Pure; the clock is passed in.
#pragma once

#include <algorithm>
#include <cstdint>

#include "absl/time/time.h"

namespace rwkv::router {

class TokenBucket {
 public:
  // 0: no bound. Another rate leaves it as full as it was: nobody gets a full bucket by a change of the file.
  void SetRate(int64_t per_minute, absl::Time now) {
    Fill(now);
    const double share = per_minute_ == 0 ? 1 : level_ / static_cast<double>(per_minute_);
    level_ = share * static_cast<double>(per_minute);
    per_minute_ = per_minute;
  }

  // Zero: `amount` may be taken now. Else when to come again. More than a minute's worth wants a full bucket, and
  // leaves a debt that has to be filled first.
  absl::Duration Wait(double amount, absl::Time now) {
    Fill(now);
    if (per_minute_ == 0) return absl::ZeroDuration();
    const double missing = std::min(amount, static_cast<double>(per_minute_)) - level_;
    if (missing <= 0) return absl::ZeroDuration();
    return absl::Seconds(60 * missing / static_cast<double>(per_minute_));
  }
  // Nothing is missing.
  bool IsFull(absl::Time now) {
    Fill(now);
    return level_ >= static_cast<double>(per_minute_);
  }
  int64_t per_minute() const { return per_minute_; }
  // Takes it, whether it is there or not; negative: gives it back.
  void Take(double amount, absl::Time now) {
    Fill(now);
    if (per_minute_ != 0) level_ = std::min(level_ - amount, static_cast<double>(per_minute_));
  }

 private:
  void Fill(absl::Time now) {
    if (now <= filled_) return;  // A clock that was set back fills nothing.
    if (filled_ != absl::InfinitePast()) {
      level_ = std::min(level_ + static_cast<double>(per_minute_) * absl::ToDoubleSeconds(now - filled_) / 60,
                        static_cast<double>(per_minute_));
    }
    filled_ = now;
  }

  int64_t per_minute_ = 0;
  double level_ = 0;
  absl::Time filled_ = absl::InfinitePast();
};

}  // namespace rwkv::router
