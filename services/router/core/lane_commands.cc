#include "services/router/core/lane_commands.h"

#include <algorithm>
#include <memory>
#include <utility>
#include <variant>
#include <vector>

#include "services/common/sampling/sampling_params.h"
#include "services/router/core/turn_trace.h"
#include "services/router/core/world.h"

namespace rwkv::router {

void LaneCommands::Send(TurnLane& lane) const {
  for (const Command& planned : lane.scheduler.Plan()) {
    auto command = std::make_shared<v1::ExecuteRequest>();
    if (const auto* attach = std::get_if<AttachCommand>(&planned)) {
      FillAttach(*attach, command->mutable_attach());
    } else if (const auto* step = std::get_if<StepCommand>(&planned)) {
      FillStep(*step, command->mutable_step());
    } else if (const auto* save = std::get_if<SaveCommand>(&planned)) {
      if (!FillSave(*save, lane, command->mutable_save())) continue;
    } else if (const auto* release = std::get_if<ReleaseCommand>(&planned)) {
      command->mutable_release()->set_slot(release->slot);
      command->mutable_release()->set_sequence(release->sequence);
    } else if (const auto* go_on = std::get_if<GoOnCommand>(&planned)) {
      FillGoOn(*go_on, command->mutable_go_on());
    }
    // Not sent: the epoch is over, and the event that says so is on its way.
    if (!context_.world->Send(lane.epoch, std::move(command))) return;
  }
}

void LaneCommands::FillAttach(const AttachCommand& command, v1::AttachSequence* attach) const {
  attach->set_slot(command.slot);
  attach->set_sequence(command.sequence);
  attach->set_position(command.position);
  if (command.warm_sequence.has_value()) attach->set_warm_sequence(*command.warm_sequence);
  const TurnPtr of_sequence = turns_.FindSequence(command.sequence);
  if (of_sequence == nullptr) {  // Cancelled before it was sent; its release follows.
    *attach->mutable_sampling() = common::CompleteSampling(v1::Sampling(), 0);
    if (!command.warm_sequence.has_value()) attach->set_fresh(true);
    return;
  }
  Turn& turn = *of_sequence;
  turn.attach_since = context_.Now();
  if (turn.trace != nullptr) {
    attach->set_trace_parent(turn.trace->trace_parent());
    attach->set_trace_state(turn.trace->trace_state());
  }
  turn.patience.AttachBegan(turn.attach_since);
  if (command.warm_sequence.has_value()) {
    // Said above.
  } else if (!turn.snapshot.snapshot_id().empty()) {
    *attach->mutable_snapshot() = turn.snapshot;
    attach->set_keep(turn.prefix.attached);
  } else {
    attach->set_fresh(true);
    attach->set_initial_state(turn.initial_state);
  }
  attach->mutable_banned_token_ids()->Add(turn.model->banned_token_ids.begin(), turn.model->banned_token_ids.end());
  if (!turn.answer.has_value()) {
    *attach->mutable_sampling() = common::CompleteSampling(v1::Sampling(), 0);
    return;
  }
  *attach->mutable_sampling() = turn.spec.sampling();
  attach->mutable_turn_token_ids()->Add(turn.counted.begin(), turn.counted.end());
  if (turn.spec.sampling().penalize_prompt()) {
    attach->mutable_turn_token_ids()->Add(turn.prompt.begin(), turn.prompt.end());
  }
  attach->mutable_turn_token_ids()->Add(turn.answer->ids().begin(), turn.answer->ids().end());
  const std::vector<uint32_t>& stops = turn.answer->stop_token_ids();
  attach->mutable_stop_token_ids()->Add(stops.begin(), stops.end());
  if (turn.HasLog() && turn.pause_token_ids.has_value()) {
    attach->mutable_pause_token_ids()->Add(turn.pause_token_ids->begin(), turn.pause_token_ids->end());
  }
}

void LaneCommands::FillStep(const StepCommand& command, v1::Step* step) const {
  step->set_step_id(command.step_id);
  int rows = 0;
  for (const StepCommand::Entry& planned : command.entries) {
    FillEntry(planned, step->add_entries());
    rows += planned.tokens;
  }
  context_.metrics->batch_rows.Observe(rows);
}

void LaneCommands::FillEntry(const StepCommand::Entry& planned, v1::StepEntry* entry) const {
  Turn& turn = *turns_.FindSequence(planned.sequence);
  entry->set_slot(planned.slot);
  entry->set_sequence(planned.sequence);
  entry->set_expected_position(planned.position);
  const uint64_t end = planned.position + planned.tokens;
  for (uint64_t position = planned.position; position < end; ++position) entry->add_token_ids(turn.TokenAt(position));
  turn.kind->Ask(turn, planned.position, end, entry);
  entry->set_sample(turn.WantsToken() && end == turn.KnownEnd());
  turn.planned_end = end;
  if (entry->sample() && GoingOn::MayBegin(turn)) going_on_.Begin(turn, entry);
  if (end >= turn.begin && !turn.tail.empty()) std::vector<uint32_t>().swap(turn.tail);
  if (turn.first_rows.has_value()) return;
  turn.first_rows = context_.Now();
  context_.metrics->queue_seconds.Observe(std::max(0.0, absl::ToDoubleSeconds(*turn.first_rows - turn.arrival)));
}

bool LaneCommands::FillSave(const SaveCommand& command, TurnLane& lane, v1::SaveSnapshot* save) const {
  const std::pair<SequenceId, uint64_t> key = {command.sequence, command.position};
  const auto id = lane.save_ids.lower_bound(key);
  if (id == lane.save_ids.end() || id->first != key) return false;
  const PendingSave* const pending = saves_.Find(id->second);
  save->set_keep(pending != nullptr && pending->prefix != nullptr);
  save->set_slot(command.slot);
  save->set_sequence(command.sequence);
  save->set_expected_position(command.position);
  save->set_snapshot_id(id->second);
  lane.save_ids.erase(id);
  return true;
}

void LaneCommands::FillGoOn(const GoOnCommand& command, v1::GoOn* go_on) const {
  go_on->set_slot(command.slot);
  go_on->set_sequence(command.sequence);
  go_on->set_until(command.until);
  if (const TurnPtr turn = turns_.FindSequence(command.sequence); turn != nullptr) go_on->set_known(turn->done_end);
}

}  // namespace rwkv::router
