// Feeding, results, and what each kind of call does with them.
#include <algorithm>
#include <utility>
#include <variant>

#include "absl/strings/str_cat.h"
#include "services/common/grpc_status.h"
#include "services/common/logging.h"
#include "services/common/sampling/sampling_params.h"
#include "services/router/turns/turn_core.h"

namespace rwkv::router {
namespace {

// Of a refusal, in the error that ends a turn.
constexpr size_t kMaxErrorBytes = 2048;

}  // namespace

void TurnCore::FeedKnown(Turn& turn) {
  const uint64_t end = std::min(turn.kind->FeedAtOnce(turn), Prefixes::FeedEnd(turn));
  if (end <= turn.fed_end) return;
  Feed(turn, end, Scheduler::FeedKind::kPrefill);
}

void TurnCore::OnStep(TurnLane& lane, const v1::StepResult& result) {
  lane.scheduler.OnStepDone(result.step_id());
  lane.last_progress = Now();
  metrics_->last_step_timestamp_seconds.Set(absl::ToDoubleSeconds(lane.last_progress - absl::UnixEpoch()));
  for (const v1::EntryResult& entry : result.entries()) {
    const auto it = by_sequence_.find(entry.sequence());
    if (it == by_sequence_.end()) continue;  // Cancelled meanwhile.
    const TurnPtr turn = it->second;
    OnEntry(*turn, entry);
  }
}

void TurnCore::OnEntry(Turn& turn, const v1::EntryResult& result) {
  const absl::Status status = common::FromStatusProto(result.status());
  if (!status.ok()) return OnEntryFailed(turn, status);
  if (result.position() > turn.planned_end) {
    return OnEntryFailed(turn, absl::InternalError(absl::StrCat("a slot is at position ", result.position(),
                                                                " and was sent to ", turn.planned_end)));
  }
  turn.done_end = result.position();
  SettleStop(turn);
  turn.patience.Came(turn.done_end);
  turn.kind->OnResult(turn, result);
  if (result.has_token_id()) OnToken(turn, result);
}

void TurnCore::OnToken(Turn& turn, const v1::EntryResult& result) {
  // Of one that was told to stop: it counts all the same, since its slot has seen it.
  const bool wanted = turn.WantsToken() || (turn.stopped && turn.going_on.on && !turn.decided());
  if (!wanted || result.position() != turn.KnownEnd()) {
    return OnEntryFailed(turn, absl::InternalError(absl::StrCat("a token for position ", result.position(),
                                                                " came while ", turn.KnownEnd(), " are known")));
  }
  const absl::Time now = Now();
  if (turn.last_token.has_value()) {
    metrics_->inter_token_seconds.Observe(std::max(0.0, absl::ToDoubleSeconds(now - *turn.last_token)));
  }
  if (!turn.first_token.has_value()) turn.first_token = now;
  turn.last_token = now;
  metrics_->generated_tokens.Increment();
  ++tokens_drawn_;
  turn.answer->Push(result.token_id(), result.logprob(), {result.top_logprobs().begin(), result.top_logprobs().end()});
  if (turn.Going()) FollowStop(turn, result.token_id());
  if (turn.answer->finished() && !turn.HasLog()) metrics_->CountFinish(turn.answer->reason());
}

void TurnCore::OnEntryFailed(Turn& turn, const absl::Status& status) {
  common::LogWarning("step_entry_failed", {{"position", turn.done_end}, {"status", status}});
  RemoveSequence(turn);
  turn.no_warm = true;
  const Patience::Verdict verdict = turn.patience.EntryFailed(status.code());
  turn.not_before = Now() + options_.retry_delay * std::min(turn.patience.failures(), 5);
  Park(turn);
  if (verdict == Patience::Verdict::kRefused) {
    Refuse(turn, absl::Status(status.code(),
                              absl::StrCat("the model does not go on after ", turn.patience.furthest(), " tokens: ",
                                           absl::string_view(status.message()).substr(0, kMaxErrorBytes))));
  } else if (verdict == Patience::Verdict::kGiveUp) {
    Fail(turn, status);
  }
}

void TurnCore::OnLogits(const v1::LogitsRows& rows) {
  const auto it = by_sequence_.find(rows.sequence());
  if (it != by_sequence_.end()) it->second->kind->OnLogits(*it->second, rows);
}

void TurnCore::FillAttach(const AttachCommand& command, v1::AttachSequence* attach) {
  attach->set_slot(command.slot);
  attach->set_sequence(command.sequence);
  attach->set_position(command.position);
  if (command.warm_sequence.has_value()) attach->set_warm_sequence(*command.warm_sequence);
  const auto it = by_sequence_.find(command.sequence);
  if (it == by_sequence_.end()) {  // Cancelled before it was sent; its release follows.
    *attach->mutable_sampling() = common::CompleteSampling(v1::Sampling(), 0);
    if (!command.warm_sequence.has_value()) attach->set_fresh(true);
    return;
  }
  Turn& turn = *it->second;
  turn.attach_since = Now();
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

void TurnCore::FillStep(const StepCommand& command, v1::Step* step) {
  step->set_step_id(command.step_id);
  int rows = 0;
  for (const StepCommand::Entry& planned : command.entries) {
    Turn& turn = *by_sequence_.at(planned.sequence);
    v1::StepEntry& entry = *step->add_entries();
    entry.set_slot(planned.slot);
    entry.set_sequence(planned.sequence);
    entry.set_expected_position(planned.position);
    const uint64_t end = planned.position + planned.tokens;
    for (uint64_t position = planned.position; position < end; ++position) entry.add_token_ids(turn.TokenAt(position));
    turn.kind->Ask(turn, planned.position, end, &entry);
    entry.set_sample(turn.WantsToken() && end == turn.KnownEnd());
    turn.planned_end = end;
    if (entry.sample() && MayGoOn(turn)) BeginGoingOn(turn, &entry);
    if (end >= turn.begin && !turn.tail.empty()) std::vector<uint32_t>().swap(turn.tail);
    if (!turn.first_rows.has_value()) {
      turn.first_rows = Now();
      metrics_->queue_seconds.Observe(std::max(0.0, absl::ToDoubleSeconds(*turn.first_rows - turn.arrival)));
    }
    rows += planned.tokens;
  }
  metrics_->batch_rows.Observe(rows);
}

void TurnCore::SendCommands(TurnLane& lane) {
  for (const Command& planned : lane.scheduler.Plan()) {
    auto command = std::make_shared<v1::ExecuteRequest>();
    if (const auto* attach = std::get_if<AttachCommand>(&planned)) {
      FillAttach(*attach, command->mutable_attach());
    } else if (const auto* step = std::get_if<StepCommand>(&planned)) {
      FillStep(*step, command->mutable_step());
    } else if (const auto* save = std::get_if<SaveCommand>(&planned)) {
      const auto id = lane.save_ids.lower_bound({save->sequence, save->position});
      if (id == lane.save_ids.end() || id->first != std::make_pair(save->sequence, save->position)) continue;
      const PendingSave* const pending = saves_.Find(id->second);
      command->mutable_save()->set_keep(pending != nullptr && pending->prefix != nullptr);
      command->mutable_save()->set_slot(save->slot);
      command->mutable_save()->set_sequence(save->sequence);
      command->mutable_save()->set_expected_position(save->position);
      command->mutable_save()->set_snapshot_id(id->second);
      lane.save_ids.erase(id);
    } else if (const auto* release = std::get_if<ReleaseCommand>(&planned)) {
      command->mutable_release()->set_slot(release->slot);
      command->mutable_release()->set_sequence(release->sequence);
    } else if (const auto* go_on = std::get_if<GoOnCommand>(&planned)) {
      command->mutable_go_on()->set_slot(go_on->slot);
      command->mutable_go_on()->set_sequence(go_on->sequence);
      command->mutable_go_on()->set_until(go_on->until);
      const auto turn = by_sequence_.find(go_on->sequence);
      if (turn != by_sequence_.end()) command->mutable_go_on()->set_known(turn->second->done_end);
    }
    // Not sent: the epoch is over, and EpochDown is on its way.
    if (!world_->Send(lane.epoch, std::move(command))) return;
  }
}

}  // namespace rwkv::router
