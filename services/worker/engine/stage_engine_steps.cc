// Steps: what StageEngine enqueues for one, and what it answers.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/api/op_table.h"
#include "kernels/base/status_macros.h"
#include "services/common/grpc_status.h"
#include "services/worker/engine/stage_engine.h"

namespace rwkv::worker {

absl::Status StageEngine::Enqueue(v1::Step step, const LinkFrame* input, bool output_stays, Await await) {
  if (pending_steps() >= kMaxPendingSteps) {
    return absl::InternalError(absl::StrCat("step ", step.step_id(), " behind ", pending_steps(), " pending ones"));
  }
  if (step.step_id() != last_step_ + 1) {
    return absl::InvalidArgumentError(absl::StrCat("step ", step.step_id(), " after step ", last_step_));
  }
  if (is_first() != (input == nullptr)) return absl::InternalError("a step has input on every stage but the first");
  if (input != nullptr && input->header.step_id != step.step_id()) {
    return absl::InvalidArgumentError(absl::StrCat("step ", step.step_id(), " with input of ", input->header.step_id));
  }
  Place& place = places_[step.step_id() % kMaxPendingSteps];
  place.step = std::move(step);
  RWKV_RETURN_IF_ERROR(Pack(place, input == nullptr ? nullptr : &input->header));
  if (absl::Status status = EnqueueForward(place, input, output_stays, await); !status.ok()) {
    if (absl::IsUnavailable(status)) return status;  // The link.
    return absl::InternalError(absl::StrCat("step ", place.step.step_id(), ": ", status.message()));
  }
  last_step_ = place.step.step_id();
  return absl::OkStatus();
}

absl::Status StageEngine::Pack(Place& place, const LinkHeader* input) {
  spans_.clear();
  tokens_.clear();
  logit_rows_.clear();
  hidden_rows_.clear();
  slots_.BeginStep();
  place.rows = 0;
  place.computed = 0;
  place.refused.clear();
  place.refused_here.clear();
  place.active.clear();
  place.positions.clear();
  place.draws.Clear();
  const v1::Step& step = place.step;
  size_t next_refused = 0;  // Of the input's.
  for (int i = 0; i < step.entries_size(); ++i) {
    const int64_t count = step.entries(i).token_ids_size();
    absl::optional<Refusal> refusal = slots_.CheckRoom(step.entries(i), place.rows);
    // An entry without room has no rows, accepted or not: their number follows from the step.
    const bool has_rows = !refusal && count > 0;
    if (input != nullptr && next_refused < input->refused.size() && input->refused[next_refused].entry == i) {
      place.refused.push_back(input->refused[next_refused++]);
    } else {
      if (!refusal) refusal = slots_.CheckEntry(step.entries(i));
      if (!refusal) {
        PackEntry(place, i);
        continue;
      }
      place.refused.push_back({i, std::move(refusal->status)});
      place.refused_here.push_back(refusal->cause);
    }
    if (!has_rows) continue;
    spans_.push_back({kernels::kPaddingSlot, place.rows, count});
    tokens_.insert(tokens_.end(), count, 0);
    place.rows += count;
  }
  if (input != nullptr && (input->rows != place.rows || next_refused != input->refused.size())) {
    return absl::InvalidArgumentError(absl::StrCat("step ", step.step_id(), ": input of ", input->rows, " rows and ",
                                                   input->refused.size(), " refused entries, the step has ", place.rows,
                                                   " and ", next_refused));
  }
  for (const v1::StepEntry& entry : step.entries()) {
    const bool holds = slots_.CheckNumber(entry.slot()).ok() && slots_.at(entry.slot()).sequence == entry.sequence();
    place.positions.push_back(holds ? absl::make_optional(slots_.at(entry.slot()).position) : absl::nullopt);
  }
  return absl::OkStatus();
}

void StageEngine::PackEntry(Place& place, int i) {
  const v1::StepEntry& entry = place.step.entries(i);
  const int64_t count = entry.token_ids_size();
  slots_.Accept(entry);
  ActiveEntry active;
  active.entry = i;
  active.turn = slots_.at(entry.slot()).turn;
  if (is_last()) {
    active.numbers = StepAnswers::Needs(entry);
    PackLogits(place, entry, active);
    for (int64_t row = active.numbers.logit_row_begin; row < active.numbers.logit_row_end; ++row) {
      logit_rows_.push_back(place.rows + row);
    }
    active.numbers.hidden = place.hidden.data() + static_cast<int64_t>(hidden_rows_.size()) * width_;
    for (int64_t row = count - active.numbers.hidden_rows; row < count; ++row) {
      hidden_rows_.push_back(place.rows + row);
    }
  }
  for (uint32_t id : entry.token_ids()) tokens_.push_back(static_cast<int32_t>(id));
  spans_.push_back({entry.slot(), place.rows, count});
  place.active.push_back(std::move(active));
  place.rows += count;
  place.computed += count;
}

void StageEngine::PackLogits(Place& place, const v1::StepEntry& entry, ActiveEntry& active) {
  const auto first = static_cast<int64_t>(logit_rows_.size());
  active.numbers.logits = place.logits.data() + first * vocab_size_;
  if (draws_here_) {
    int draw = -1;
    // A token that is still to be counted is one that the penalties do not know of yet.
    if (StepAnswers::OnlyDraws(entry) && active.turn->pending_draws == 0) {
      const uint64_t position = entry.expected_position() + static_cast<uint64_t>(entry.token_ids_size());
      draw = place.draws.Add(*active.turn, position, first);
    }
    if (draw >= 0) active.numbers.drawn = &place.draws.at(draw);
    active.copies_logits = draw < 0 && active.numbers.logit_row_end > active.numbers.logit_row_begin;
  }
  if (entry.sample()) ++active.turn->pending_draws;
}

LinkHeader StageEngine::OutputHeader() const {
  const Place& place = places_[last_step_ % kMaxPendingSteps];
  return {last_step_, place.rows, place.refused};
}

absl::Status StageEngine::MoveOutput(DeviceRows& rows) {
  Place& place = places_[last_step_ % kMaxPendingSteps];
  if (place.rows > 0) RWKV_RETURN_IF_ERROR(rows.Move(place.rows, x_.data(), v_first_.data(), *stream_));
  return stream_->Record(*place.done);  // The step is done when its rows have left.
}

absl::Status StageEngine::EnqueueForward(Place& place, const LinkFrame* input, bool output_stays, Await await) {
  // Whatever comes of the step here: the stage before moves them in any case.
  if (input != nullptr && input->rows != nullptr && place.rows > 0) {
    RWKV_RETURN_IF_ERROR(input->rows->Move(place.rows, x_.data(), v_first_.data(), *stream_));
  }
  if (place.computed > 0) {
    if (input != nullptr && input->rows == nullptr) {
      RWKV_RETURN_IF_ERROR(stream_->Copy(x_.data(), input->x, Bytes(place.rows * width_)));
      RWKV_RETURN_IF_ERROR(stream_->Copy(v_first_.data(), input->v_first, Bytes(place.rows * v_first_width_)));
    }
    StageStep forward;
    forward.spans = spans_;
    forward.rows = place.rows;
    forward.tokens = tokens_.data();
    forward.x = x_.data();
    forward.v_first = v_first_.data();
    forward.logit_rows = logit_rows_;
    forward.logits = LogitsOf(place);
    forward.hidden_rows = hidden_rows_;
    forward.hidden = place.hidden.data();
    if (model_->Waits()) {
      RWKV_RETURN_IF_ERROR(stream_->Record(*before_));
      RWKV_RETURN_IF_ERROR(await(*before_));
    }
    RWKV_RETURN_IF_ERROR(model_->Forward(forward, pool_->view(), *stream_));
    TellOfFailures();
    if (is_last()) {
      RWKV_RETURN_IF_ERROR(EnqueueDraws(place));
      RWKV_RETURN_IF_ERROR(EnqueueMatrices(place));
    } else if (!output_stays) {
      RWKV_RETURN_IF_ERROR(stream_->Copy(place.output.x, x_.data(), Bytes(place.rows * width_)));
      RWKV_RETURN_IF_ERROR(stream_->Copy(place.output.v_first, v_first_.data(), Bytes(place.rows * v_first_width_)));
    }
  }
  return stream_->Record(*place.done);
}

absl::Status StageEngine::EnqueueDraws(Place& place) {
  if (!draws_here_) return absl::OkStatus();
  for (const ActiveEntry& active : place.active) {
    if (!active.copies_logits) continue;
    const int64_t rows = active.numbers.logit_row_end - active.numbers.logit_row_begin;
    const int64_t offset = active.numbers.logits - place.logits.data();
    RWKV_RETURN_IF_ERROR(
        stream_->Copy(place.logits.data() + offset, logits_.data() + offset, Bytes(rows * vocab_size_)));
  }
  return place.draws.Enqueue(device_->ops().sample, vocab_size_, logits_.data(), adjusted_.data(), *stream_);
}

absl::Status StageEngine::EnqueueMatrices(Place& place) {
  const auto is_asked = [this, &place](const ActiveEntry& active) {
    const v1::StepEntry& entry = place.step.entries(active.entry);
    return entry.wkv_state() && answers_->CheckMatrix(entry.slot()).ok();
  };
  const int64_t count = std::count_if(place.active.begin(), place.active.end(), is_asked);
  if (count == 0) return absl::OkStatus();
  const StateLayout& layout = model_->state_layout();
  const int64_t size = layout.tensors()[layout.matrix()].size();
  if (place.matrices.size() < count * size) {
    RWKV_ASSIGN_OR_RETURN(place.matrices,
                          kernels::DeviceArray<float>::Create(*device_, count * size, kernels::MemoryKind::kPinned));
  }
  float* at = place.matrices.data();
  for (ActiveEntry& active : place.active) {
    if (!is_asked(active)) continue;
    const int slot = place.step.entries(active.entry).slot();
    RWKV_RETURN_IF_ERROR(pool_->CopyLastMatrix(slot, at, *stream_));
    active.numbers.matrix = at;
    at += size;
  }
  return absl::OkStatus();
}

absl::StatusOr<StepOutput> StageEngine::Finish() {
  if (pending_steps() == 0) return absl::InternalError("no step is pending");
  Place& place = places_[(finished_step_ + 1) % kMaxPendingSteps];
  if (absl::Status status = place.done->WaitOnHost(); !status.ok()) {
    const bool hangs = absl::IsDeadlineExceeded(status);
    return absl::Status(hangs ? status.code() : absl::StatusCode::kInternal,
                        absl::StrCat("step ", place.step.step_id(), ": ", status.message()));
  }
  StepOutput output;
  output.rows = place.computed;
  output.refused_here = std::move(place.refused_here);
  if (is_last()) {
    AnswerAll(place, output);
  } else {
    output.frame = place.output;
    output.frame.header.step_id = place.step.step_id();
    output.frame.header.rows = place.rows;
    output.frame.header.refused = std::move(place.refused);
  }
  place.active.clear();  // And with it the turns of slots that are free by now.
  ++finished_step_;
  return output;
}

void StageEngine::AnswerAll(Place& place, StepOutput& output) {
  const v1::Step& step = place.step;
  output.result.set_step_id(step.step_id());
  answering_.clear();
  size_t next_active = 0;
  size_t next_refused = 0;
  for (int i = 0; i < step.entries_size(); ++i) {
    const v1::StepEntry& entry = step.entries(i);
    v1::EntryResult& result = *output.result.add_entries();
    result.set_slot(entry.slot());
    result.set_sequence(entry.sequence());
    if (place.positions[i].has_value()) result.set_position(*place.positions[i]);
    if (next_refused < place.refused.size() && place.refused[next_refused].entry == i) {
      *result.mutable_status() = common::ToStatusProto(place.refused[next_refused++].status);
      continue;
    }
    const ActiveEntry& active = place.active[next_active++];
    if (entry.sample()) --active.turn->pending_draws;
    answering_.push_back({&entry, &active, &result, true, {}});
  }
  stream_->RunOnHost(static_cast<int64_t>(answering_.size()), [&](int64_t i, int thread) {
    Answering& one = answering_[i];
    one.is_number = answers_->Answer(step.step_id(), *one.entry, one.active->numbers, *one.active->turn, thread,
                                     one.logits, *one.result);
  });
  for (Answering& one : answering_) {
    if (!one.is_number) output.refused_here.push_back(RefusalCause::kNumeric);
    std::move(one.logits.begin(), one.logits.end(), std::back_inserter(output.logits));
  }
}

}  // namespace rwkv::worker
