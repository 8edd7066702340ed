#include "tests/simulator/model_lane.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "services/common/grpc_status.h"
#include "services/worker/client/fake_worker.h"

namespace rwkv::simulator {

using worker::FakeModel;

v1::Sampling OfFamily(v1::Sampling sampling, int family) {
  sampling.set_seed(sampling.seed() + 7919 * family);
  return sampling;
}

absl::Status ModelLane::CheckSlot(int slot, uint64_t sequence, uint64_t position) const {
  const Slot& held = slots_.at(slot);
  if (broken_.keeps_foreign_states) return absl::OkStatus();
  if (!held.held || held.sequence != sequence || held.position != position) {
    return absl::AbortedError(absl::StrCat("slot ", slot, " holds sequence ", held.sequence, " at ", held.position,
                                           ", not ", sequence, " at ", position));
  }
  return absl::OkStatus();
}

absl::Status ModelLane::Attach(const v1::AttachSequence& attach) {
  Slot& slot = slots_.at(attach.slot());
  if (attach.has_warm_sequence()) {
    if (absl::Status status = CheckSlot(attach.slot(), attach.warm_sequence(), attach.position()); !status.ok()) {
      slot = Slot();
      return status;
    }
  } else {
    const uint64_t before = slot.state;
    slot = Slot();
    slot.state = broken_.clears_nothing ? before : FakeModel::Fresh();
    if (attach.has_snapshot()) {
      const uint64_t* const state = store_->FindState(attach.snapshot().snapshot_id());
      if (state == nullptr) return absl::DataLossError("a record is missing");
      slot.state = *state;
    }
    slot.position = attach.position();
  }
  slot.held = true;
  slot.sequence = attach.sequence();
  slot.sampling = attach.sampling();
  return absl::OkStatus();
}

v1::EntryResult ModelLane::Compute(const v1::StepEntry& entry) {
  v1::EntryResult result;
  result.set_slot(entry.slot());
  result.set_sequence(entry.sequence());
  const absl::Status status = CheckSlot(entry.slot(), entry.sequence(), entry.expected_position());
  Slot& slot = slots_.at(entry.slot());
  if (!status.ok()) {
    result.set_position(entry.expected_position());
    *result.mutable_status() = common::ToStatusProto(status);
    return result;
  }
  if (!entry.sample() && loses_()) {
    result.set_position(entry.expected_position() + entry.token_ids_size());
    return result;
  }
  slot.state = FakeModel::Feed(slot.state, {entry.token_ids().data(), static_cast<size_t>(entry.token_ids_size())});
  slot.position = entry.expected_position() + entry.token_ids_size();
  result.set_position(slot.position);
  if (entry.sample()) {
    result.set_token_id(FakeModel::Next(slot.state, slot.position, OfFamily(slot.sampling, family_), kVocabulary));
    result.set_logprob(-1);
  }
  return result;
}

absl::Status ModelLane::Save(const v1::SaveSnapshot& save) {
  RWKV_RETURN_IF_ERROR(CheckSlot(save.slot(), save.sequence(), save.expected_position()));
  uint64_t state = slots_.at(save.slot()).state;
  if (broken_.saves_late) state = FakeModel::Feed(state, 1);
  store_->PutState(save.snapshot_id(), state);
  return absl::OkStatus();
}

void ModelLane::AddStopped(const worker::OwnSteps::Stopped& stopped, std::vector<Answer>* answers) {
  for (const v1::SequenceStopped& one : stopped) {
    *answers->emplace_back(Answer{0, {}}).response.mutable_stopped() = one;
  }
}

std::vector<ModelLane::Answer> ModelLane::DoStep(const v1::Step& step) {
  own_steps_.OnStep(step);
  v1::StepResult result;
  result.set_step_id(step.step_id());
  for (const v1::StepEntry& entry : step.entries()) *result.add_entries() = Compute(entry);
  std::vector<Answer> answers;
  *answers.emplace_back(Answer{stages_ - 1, {}}).response.mutable_step() = result;
  AddStopped(own_steps_.OnResult(result), &answers);
  return answers;
}

std::vector<ModelLane::Answer> ModelLane::Do(const v1::ExecuteRequest& request) {
  std::vector<Answer> answers;
  if (request.has_attach()) {
    const absl::Status status = Attach(request.attach());
    if (status.ok()) own_steps_.OnAttach(request.attach());
    for (int stage = 0; stage < stages_; ++stage) {
      v1::SequenceAttached& attached = *answers.emplace_back(Answer{stage, {}}).response.mutable_attached();
      attached.set_slot(request.attach().slot());
      attached.set_sequence(request.attach().sequence());
      *attached.mutable_status() = common::ToStatusProto(status);
    }
  } else if (request.has_step()) {
    answers = DoStep(request.step());
  } else if (request.has_go_on()) {
    AddStopped(own_steps_.OnGoOn(request.go_on()), &answers);
  } else if (request.has_save()) {
    const absl::Status status = Save(request.save());
    for (int stage = 0; stage < stages_; ++stage) {
      v1::SnapshotSaved& saved = *answers.emplace_back(Answer{stage, {}}).response.mutable_saved();
      saved.set_snapshot_id(request.save().snapshot_id());
      *saved.mutable_status() = common::ToStatusProto(status);
      if (!status.ok()) continue;
      v1::RecordInfo& record = *saved.add_records();
      record.set_snapshot_id(request.save().snapshot_id());
      record.set_layer(stage);
      record.set_bytes(8);
    }
  } else if (request.has_release()) {
    own_steps_.OnRelease(request.release());
    Slot& slot = slots_.at(request.release().slot());
    if (slot.sequence == request.release().sequence()) slot.held = false;
  }
  return answers;
}

}  // namespace rwkv::simulator
