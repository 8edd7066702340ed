// Parts of the core by themselves, for their tests, and turns in any state.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "rwkv/v1/generation.pb.h"
#include "services/common/metrics.h"
#include "services/router/core/call_kinds.h"
#include "services/router/core/client_streams.h"
#include "services/router/core/core_context.h"
#include "services/router/core/placement.h"
#include "services/router/core/prefixes.h"
#include "services/router/core/response_stream.h"
#include "services/router/core/router_metrics.h"
#include "services/router/core/saves.h"
#include "services/router/core/scripted_world.h"
#include "services/router/core/serving_model.h"
#include "services/router/core/session_table.h"
#include "services/router/core/turn.h"
#include "services/router/core/turn_ends.h"
#include "services/router/core/turn_lane.h"
#include "services/router/core/turn_options.h"
#include "services/router/core/turn_slots.h"
#include "services/router/core/turn_table.h"
#include "services/router/core/waiting_line.h"
#include "services/router/pipeline/stage_plan.h"

namespace rwkv::router {

// Keeps what was sent; its client takes nothing until it is told to.
class HeldStream final : public ResponseStream<v1::GenerateResponse> {
 public:
  void Send(v1::GenerateResponse response) override { sent.push_back(std::move(response)); }
  size_t queued() const override { return sent.size() - taken; }
  void OnRoom(std::function<void()> on_room) override { waits_for_room.push_back(std::move(on_room)); }
  void Close(absl::Status status) override { closed.push_back(std::move(status)); }

  // The client takes all.
  void Take() {
    taken = sent.size();
    for (const auto& on_room : std::exchange(waits_for_room, {})) on_room();
  }

  std::vector<v1::GenerateResponse> sent;
  std::vector<absl::Status> closed;
  std::vector<std::function<void()>> waits_for_room;
  size_t taken = 0;
};

// What the parts that decide stand on, and one lane, of the model "f" in the pool kPool.
struct CoreParts {
  static constexpr char kPool[] = "f/x";
  static constexpr uint64_t kEpoch = 7;

  // `catalog`: borrowed; null: no job for the store is run.
  explicit CoreParts(const TurnOptions& options, int slots = 2, state_store::CatalogClient* catalog = nullptr)
      : context(options, &world, catalog, &metrics) {
    StagePlan plan;
    plan.model.set_fingerprint("f");
    plan.slots = slots;
    plan.max_batch_rows = 8;
    plan.stages.resize(1);
    plan.stages[0].worker.set_numeric_family("x");
    placement.Add(kEpoch, plan, world.now);
    model->info.set_fingerprint("f");
  }

  TurnLane& lane() { return *placement.Find(kEpoch); }

  // A call that generates, and waits; of nobody's session if `session` is empty.
  TurnPtr MakeTurn(const std::string& tenant, const std::string& session = "",
                   std::shared_ptr<HeldStream> stream = std::make_shared<HeldStream>()) {
    auto turn = std::make_shared<Turn>();
    turn->id = turns.NewId();
    turn->call = turn->id;
    turn->kind = std::make_unique<GenerateCall>(std::move(stream));
    turn->arrival = world.now;
    turn->model = model;
    turn->tenant = tenant;
    turn->session_id = session;
    turn->prompt = {1, 2, 3};
    turn->spec.set_max_tokens(10);
    return turn;
  }

  // One that was started, in this phase.
  TurnPtr Start(Turn::Phase phase, const std::string& tenant, const std::string& session = "",
                std::shared_ptr<HeldStream> stream = std::make_shared<HeldStream>()) {
    TurnPtr turn = MakeTurn(tenant, session, std::move(stream));
    turn->set_phase(phase);
    turn->set_pool(kPool);
    turn->answer.emplace(nullptr, turn->spec);
    if (!session.empty()) {
      turn->session = &sessions.Of(session);
      turn->session->turn = turn;
    }
    turns.Add(turn);
    turns.AddCall(turn);
    return turn;
  }

  // One that runs in a slot of the lane, whose input has come back.
  TurnPtr Seat(const std::string& tenant, const std::string& session = "") {
    TurnPtr turn = Start(Turn::Phase::kRunning, tenant, session);
    turns.Seat(turn);
    turn->lane = &lane();
    lane().scheduler.Admit(turn->sequence, 0, tenant);
    lane().scheduler.Plan();
    lane().scheduler.OnAttached(turn->sequence);
    lane().scheduler.MoveTo(turn->sequence, turn->prompt.size());
    turn->fed_end = turn->planned_end = turn->done_end = turn->prompt.size();
    turn->saved_position = turn->planned_end;
    return turn;
  }

  ScriptedWorld world;
  std::unique_ptr<common::Metrics> registry = *common::Metrics::Create("");
  RouterMetrics metrics{registry.get()};
  CoreContext context;
  std::shared_ptr<ServingModel> model = std::make_shared<ServingModel>();
  TurnTable turns;
  Placement placement{64};
  SessionTable sessions{context, [](Session&) {}};
  WaitingLine line{context, turns, placement, sessions};
  ClientStreams streams{context, &turns};
  Prefixes prefixes{context, placement};
  Saves saves{context, placement, &sessions, &prefixes, [](const PendingSave&, bool, const absl::Status&) {}};
  TurnSlots slots{context, placement, &turns, &line, &saves};
  TurnEnds ends{&streams, &slots, &line, &sessions};
};

}  // namespace rwkv::router
