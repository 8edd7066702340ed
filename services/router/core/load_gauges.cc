#include "services/router/core/load_gauges.h"

#include <utility>

namespace rwkv::router {
namespace {

// Over which tokens a second are counted.
constexpr absl::Duration kRateInterval = absl::Seconds(2);

}  // namespace

LoadGauges::LoadGauges(const CoreContext& context, const TurnTable& turns, const WaitingLine& line,
                       const Placement& placement)
    : context_(context), turns_(turns), line_(line), placement_(placement), counted_at_(context.Now()) {}

void LoadGauges::Update() {
  running_ = static_cast<int>(turns_.running().size());
  waiting_ = static_cast<int>(line_.size());
  if (const absl::Duration since = context_.Now() - counted_at_; since >= kRateInterval) {
    tokens_per_second_ = static_cast<double>(tokens_drawn_ - tokens_counted_) / absl::ToDoubleSeconds(since);
    tokens_counted_ = tokens_drawn_;
    counted_at_ += since;
  }
  context_.metrics->running_turns.Set(static_cast<double>(turns_.running().size()));
  context_.metrics->waiting_turns.Set(static_cast<double>(line_.size()));
  UpdateSlots();
}

void LoadGauges::UpdateSlots() {
  int slots = 0, used = 0, warm = 0, steps = 0;
  for (const auto& [epoch, lane] : placement_.lanes()) {
    slots += lane->plan.slots;
    used += lane->scheduler.slots_in_use();
    warm += lane->scheduler.slots_warm();
    steps += lane->scheduler.steps_in_flight();
    if (const LaneLoad load = lane->Load(); std::exchange(lane->told_load, load) != load) {
      context_.world->SetLoad(epoch, load);
    }
  }
  context_.metrics->slots_used.Set(used);
  context_.metrics->slots_warm.Set(warm);
  context_.metrics->slots_free.Set(slots - used - warm);
  context_.metrics->microbatches_in_flight.Set(steps);
}

}  // namespace rwkv::router
