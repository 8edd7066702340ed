// What the router says of its load: in metrics, to the fleet, and to whoever asks for counts.
#pragma once

#include <atomic>
#include <cstdint>

#include "absl/time/time.h"
#include "services/router/core/core_context.h"
#include "services/router/core/placement.h"
#include "services/router/core/turn_options.h"
#include "services/router/core/turn_table.h"
#include "services/router/core/waiting_line.h"

namespace rwkv::router {

// Part of the core: one thread at a time, but for what says otherwise.
class LoadGauges {
 public:
  // All borrowed.
  LoadGauges(const CoreContext& context, const TurnTable& turns, const WaitingLine& line, const Placement& placement);

  // Any thread. As of the last update.
  TurnCounts counts() const { return {running_.load(), waiting_.load(), tokens_per_second_.load()}; }

  void TokenDrawn() { ++tokens_drawn_; }
  void Update();

 private:
  void UpdateSlots();

  const CoreContext& context_;
  const TurnTable& turns_;
  const WaitingLine& line_;
  const Placement& placement_;
  std::atomic<int> running_{0};
  std::atomic<int> waiting_{0};
  std::atomic<double> tokens_per_second_{0};
  uint64_t tokens_drawn_ = 0;
  uint64_t tokens_counted_ = 0;  // Of these, in tokens_per_second_ when it was set last.
  absl::Time counted_at_;
};

}  // namespace rwkv::router
