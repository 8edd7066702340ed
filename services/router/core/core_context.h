// What the parts of the core share: what the router was told, whom it asks, and whether it is going away. Nothing that
// the core decides on is kept here: turns, sessions, lanes and the line have types of their own.
#pragma once

#include <atomic>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "services/router/core/router_metrics.h"
#include "services/router/core/turn_options.h"
#include "services/router/core/world.h"
#include "services/state_store/client/state_store_client.h"

namespace rwkv::router {

// So long a turn waits for the state that it left behind, and an export or a change of a session for one that is on its
// way. Then it goes on without: what is not there is read again.
inline constexpr absl::Duration kSaveWait = absl::Seconds(5);

// Outlives all parts, which borrow it. Its constants and flags: any thread.
struct CoreContext {
  // All borrowed, but the options.
  CoreContext(const TurnOptions& options, World* world, state_store::CatalogClient* catalog, RouterMetrics* metrics);

  const TurnOptions options;
  World* const world;
  state_store::CatalogClient* const catalog;  // Asked by what World::Run() runs, since it waits.
  RouterMetrics* const metrics;
  std::atomic<bool> draining{false};  // No call comes in any more.
  std::atomic<bool> stopping{false};  // All that there is ends.

  absl::Time Now() const { return world->Now(); }
  // Of a call to the store that begins now. Who leaves does not wait for a store that is away. Any thread.
  absl::Time StoreDeadline() const;
  // What a client is told of a store's error.
  absl::Status StoreError(const absl::Status& status) const;
  // Why calls are refused and turns paused once it drains. Any thread.
  absl::Status DrainingStatus() const;
  double WeightOf(absl::string_view tenant) const;
};

}  // namespace rwkv::router
