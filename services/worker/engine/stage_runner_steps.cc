// Steps: the router's, those of sequences that decode by themselves, and what links have to do with them.
#include <thread>
#include <utility>

#include "absl/functional/function_ref.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "kernels/base/status_macros.h"
#include "kernels/base/stream.h"
#include "services/common/logging.h"
#include "services/worker/engine/stage_runner.h"

namespace rwkv::worker {
namespace {

constexpr absl::Duration kSpin = absl::Milliseconds(5);  // Longer than most steps.
constexpr absl::Duration kNap = absl::Microseconds(100);

double Seconds(absl::Time begin) { return absl::ToDoubleSeconds(absl::Now() - begin); }

// What the first stage needs of results to go on.
v1::StepResult DrawnOf(const v1::StepResult& result) {
  v1::StepResult drawn;
  for (const v1::EntryResult& entry : result.entries()) {
    v1::EntryResult& out = *drawn.add_entries();
    out.set_slot(entry.slot());
    out.set_sequence(entry.sequence());
    out.set_position(entry.position());
    if (entry.status().code() != 0) out.mutable_status()->set_code(entry.status().code());
    if (entry.has_token_id()) out.set_token_id(entry.token_id());
  }
  return drawn;
}

}  // namespace

absl::Status StageRunner::AwaitLinks(Epoch& epoch, absl::FunctionRef<bool()> done) {
  if (epoch.input_rows() == nullptr && epoch.output_rows() == nullptr) return absl::OkStatus();
  const absl::Time begin = absl::Now();
  while (!done()) {
    if (epoch.ended()) return absl::UnavailableError("link: the epoch has ended");
    absl::Status status;
    for (DeviceRows* rows : {epoch.input_rows(), epoch.output_rows()}) {
      if (rows != nullptr) status.Update(rows->Check());
    }
    const absl::Duration waited = absl::Now() - begin;
    if (status.ok() && waited > options_.link_timeout) {
      status =
          absl::UnavailableError(absl::StrCat("link: a step waits for ", absl::FormatDuration(options_.link_timeout),
                                              ", for a neighbour or for this stage's device"));
    }
    if (!status.ok()) {
      if (!epoch.ended()) metrics_->link_errors.Increment();
      return status;
    }
    waited < kSpin ? std::this_thread::yield() : absl::SleepFor(kNap);
  }
  return absl::OkStatus();
}

absl::Status StageRunner::SendFromDevice(Epoch& epoch) {
  // The header first: the other end takes part in the move once it knows of it.
  LinkFrame frame;
  frame.header = engine_->OutputHeader();
  frame.header.own_step = std::move(begun_.back().own_step);
  frame.header.commands_before = begun_.back().commands_before;
  frame.rows = epoch.output_rows();
  RWKV_RETURN_IF_ERROR(epoch.sender_->Send(frame));
  return engine_->MoveOutput(*frame.rows);
}

void StageRunner::BeginStep(const std::shared_ptr<Epoch>& epoch, v1::Step step) {
  LinkFrame* input = nullptr;
  if (epoch->receiver_ != nullptr) {
    input = Receive(epoch);
    while (input != nullptr && input->header.is_own()) {
      EnqueueStep(epoch, 0, input->header.own_step, input);
      input = Receive(epoch);
    }
    if (input == nullptr) return;
  } else if (!MakeRoom(epoch)) {
    return;
  }
  const uint64_t step_id = step.step_id();
  if (step_id != router_steps_ + 1) {
    return epoch->End(absl::InvalidArgumentError(absl::StrCat("step ", step_id, " after step ", router_steps_)));
  }
  router_steps_ = step_id;
  if (epoch->open().stage_count() > 1) {
    own_step_is_due_ = true;
    return EnqueueStep(epoch, step_id, std::move(step), input);
  }
  EnqueueStep(epoch, step_id, std::move(step), input);
  own_step_is_due_ = own_steps_.ready();  // There was no room for all of them.
}

void StageRunner::AddOwnEntries(v1::Step& step, BegunStep& begun) {
  int room = engine_->options().max_batch_tokens;
  for (const v1::StepEntry& entry : step.entries()) room -= entry.token_ids_size();
  if (room <= 0 || !own_steps_.ready()) return;
  const v1::Step own = own_steps_.Next(room);
  own_steps_.OnStep(own);
  for (const int slot : spans_.OnStep(own, true)) begun.traced_slots.push_back(slot);
  step.mutable_entries()->MergeFrom(own.entries());
}

void StageRunner::BeginOwnStep(const std::shared_ptr<Epoch>& epoch) {
  own_step_is_due_ = false;
  if (!MakeRoom(epoch) || !own_steps_.ready()) return;
  EnqueueStep(epoch, 0, own_steps_.Next(engine_->options().max_batch_tokens, epoch->open().stage_count()), nullptr);
}

bool StageRunner::MakeRoom(const std::shared_ptr<Epoch>& epoch) {
  if (engine_->pending_steps() == kMaxPendingSteps) FinishStep(epoch);
  return !epoch->ended();
}

LinkFrame* StageRunner::Receive(const std::shared_ptr<Epoch>& epoch) {
  if (!MakeRoom(epoch)) return nullptr;
  // The stage before may need what the next ones make of our results.
  while (engine_->pending_steps() > 0 && !epoch->ended() && !epoch->receiver_->Ready()) FinishStep(epoch);
  LinkFrame* const input = &engine_->input_frame();
  const absl::Time begin = absl::Now();
  const absl::Status status = epoch->receiver_->Receive(*input);
  metrics_->receive_wait_seconds.Observe(Seconds(begin));
  if (!CheckLink(*epoch, status)) return nullptr;
  epoch->TakeFrame();
  return input;
}

void StageRunner::FollowOwnStep(const std::shared_ptr<Epoch>& epoch) {
  LinkFrame* const input = Receive(epoch);
  if (input != nullptr) EnqueueStep(epoch, 0, input->header.own_step, input);
}

bool StageRunner::CheckLink(Epoch& epoch, const absl::Status& link) {
  if (!link.ok()) {
    if (!epoch.ended()) metrics_->link_errors.Increment();
    epoch.End(link);
  }
  return !epoch.ended();
}

void StageRunner::GoOn(const std::shared_ptr<Epoch>& epoch, const v1::GoOn& go_on) {
  if (!engine_->is_first()) return;
  SendStopped(*epoch, own_steps_.OnGoOn(go_on));
}

void StageRunner::SendResults(Epoch& epoch, HeldResults::Results results) {
  for (v1::StepResult& one : results) {
    v1::ExecuteResponse response;
    *response.mutable_step() = std::move(one);
    epoch.sink_->Send(std::move(response));
  }
}

void StageRunner::SendStopped(Epoch& epoch, OwnSteps::Stopped stopped) {
  for (v1::SequenceStopped& one : stopped) {
    v1::ExecuteResponse response;
    *response.mutable_stopped() = std::move(one);
    epoch.sink_->Send(std::move(response));
  }
}

void StageRunner::EnqueueStep(const std::shared_ptr<Epoch>& epoch, uint64_t step_id, v1::Step step, LinkFrame* input) {
  BegunStep begun;
  begun.id = step_id;
  begun.begin = absl::Now();
  begun.more = step_id == 0;
  for (const v1::StepEntry& entry : step.entries()) {
    begun.prefill |= entry.token_ids_size() > 1;
    begun.more &= entry.expected_position() + entry.token_ids_size() < entry.go_on_until();
  }
  if (engine_->is_first()) own_steps_.OnStep(step);
  begun.traced_slots = spans_.OnStep(step, step_id == 0);
  if (step_id > 0 && epoch->open().stage_count() == 1) AddOwnEntries(step, begun);
  if (step_id == 0 && epoch->sender_ != nullptr) {
    begun.own_step = step;
    begun.commands_before = input == nullptr ? epoch->commands_taken() : input->header.commands_before;
  }
  step.set_step_id(++engine_steps_);  // With own steps in between the engine's count is another.
  const bool output_stays = epoch->output_rows() != nullptr;
  absl::Status link;
  const auto await = [&](const kernels::Event& event) {
    return link = AwaitLinks(*epoch, [&event] { return event.Done(); });
  };
  if (absl::Status status = engine_->Enqueue(std::move(step), input, output_stays, await); !status.ok()) {
    if (!link.ok()) return epoch->End(link);
    metrics_->step_errors.Increment();
    common::LogError("step_failed", {{"step", step_id}, {"error", status}});
    return epoch->End(status);
  }
  begun_.push_back(std::move(begun));
  if (!output_stays) return;
  const absl::Time send_begin = absl::Now();
  const absl::Status status = SendFromDevice(*epoch);
  metrics_->send_wait_seconds.Observe(Seconds(send_begin));
  CheckLink(*epoch, status);
}

void StageRunner::FinishStep(const std::shared_ptr<Epoch>& epoch) {
  if (absl::Status link = AwaitLinks(*epoch, [this] { return engine_->IsOldestDone(); }); !link.ok()) {
    return epoch->End(link);
  }
  if (epoch->ended()) return;
  BegunStep begun = std::move(begun_.front());
  begun_.pop_front();
  absl::StatusOr<StepOutput> output = engine_->Finish();
  if (!output.ok()) {
    metrics_->step_errors.Increment();
    common::LogError("step_failed", {{"error", output.status()}});
    epoch->End(output.status());
    if (absl::IsDeadlineExceeded(output.status())) LoseDevice(output.status());
    return;
  }
  spans_.OnStepDone(begun.traced_slots);
  (begun.prefill ? metrics_->prefill_step_seconds : metrics_->decode_step_seconds).Observe(Seconds(begun.begin));
  metrics_->batch_rows.Observe(static_cast<double>(output->rows));
  metrics_->tokens.Increment(static_cast<double>(output->rows));
  for (RefusalCause cause : output->refused_here) {
    metrics_->refused_entries[static_cast<int>(cause)]->Increment();
  }
  if (epoch->output_rows() != nullptr || epoch->sender_ != nullptr) {
    const LinkShape shape = engine_->link_shape();
    metrics_->link_sent_bytes.Increment(static_cast<double>(output->rows) *
                                        static_cast<double>(shape.width + shape.v_first_width) * sizeof(float));
  }
  if (epoch->output_rows() != nullptr) return;  // They have left.
  if (epoch->sender_ != nullptr) {
    output->frame.header.own_step = std::move(begun.own_step);
    output->frame.header.commands_before = begun.commands_before;
    const absl::Time send_begin = absl::Now();
    const absl::Status status = epoch->sender_->Send(output->frame);
    metrics_->send_wait_seconds.Observe(Seconds(send_begin));
    CheckLink(*epoch, status);
    return;
  }
  // The first stage waits for it, and goes on before the router knows.
  if (epoch->receiver_ != nullptr && !CheckLink(*epoch, epoch->receiver_->Return(DrawnOf(output->result)))) return;
  for (v1::LogitsRows& rows : output->logits) {
    rows.set_step_id(begun.id);
    v1::ExecuteResponse response;
    *response.mutable_logits() = std::move(rows);
    epoch->sink_->Send(std::move(response));
  }
  output->result.set_step_id(begun.id);
  OwnSteps::Stopped stopped;
  if (engine_->is_first()) stopped = own_steps_.OnResult(output->result);
  for (const v1::EntryResult& entry : output->result.entries()) begun.more &= entry.status().code() == 0;
  // With one stage nobody waits for another process: results are there faster than the router's stream takes them.
  const bool more = begun.more && epoch->receiver_ != nullptr;
  SendResults(*epoch, held_results_.Add(std::move(output->result), more, absl::Now()));
  SendStopped(*epoch, std::move(stopped));
}

}  // namespace rwkv::worker
