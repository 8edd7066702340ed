#include "tests/simulator/model_lane.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "services/common/grpc_status.h"
#include "services/worker/client/fake_worker.h"

namespace rwkv::simulator {
namespace {

using worker::FakeModel;

constexpr absl::Duration kStep = absl::Milliseconds(1);  // Of one stage.
constexpr size_t kMostKept = 3;

}  // namespace

v1::Sampling OfFamily(v1::Sampling sampling, int family) {
  sampling.set_seed(sampling.seed() + 7919 * family);
  return sampling;
}

float ModelValue(uint64_t state, uint32_t token_id, int family) {
  return static_cast<float>(FakeModel::Next(FakeModel::Feed(state, token_id + 7919 * family), 0, {}, 1 << 16));
}

ModelLane::ModelLane(const Options& options, World world)
    : options_(options), world_(std::move(world)), stages_(options.stages) {
  for (Stage& stage : stages_) {
    stage.slots.resize(options_.slots);
    stage.from_router = world_.draw_delay();
    stage.to_router = world_.draw_delay();
    stage.to_next = world_.draw_delay();
  }
  back_ = options_.stages == 1 ? absl::ZeroDuration() : world_.draw_delay();
}

void ModelLane::Send(const std::shared_ptr<const v1::ExecuteRequest>& command) {
  for (int index = 0; index < options_.stages; ++index) {
    world_.after(stages_[index].from_router, [this, index, command] {
      stages_[index].commands.push_back(command);
      Run(index);
    });
  }
}

void ModelLane::Thawed() {
  for (int index = 0; index < options_.stages; ++index) {
    while (!stages_[index].held.empty() && !world_.is_frozen(index)) {
      const std::function<void()> work = std::move(stages_[index].held.front());
      stages_[index].held.pop_front();
      work();
    }
    Run(index);
  }
}

void ModelLane::Do(int index, std::function<void()> work) {
  if (!world_.is_frozen(index)) return work();
  stages_[index].held.push_back(std::move(work));
}

void ModelLane::Answer(int index, v1::ExecuteResponse response) {
  world_.after(stages_[index].to_router,
               [this, index, response = std::move(response)] { world_.answer(index, response); });
}

void ModelLane::SendStopped(const worker::OwnSteps::Stopped& stopped) {
  if (options_.broken.stops_in_silence) return;
  for (const v1::SequenceStopped& one : stopped) {
    v1::ExecuteResponse response;
    *response.mutable_stopped() = one;
    Answer(0, std::move(response));
  }
}

void ModelLane::Run(int index) {
  while (!stages_[index].computes && !world_.is_frozen(index) && RunOne(index)) {
  }
}

bool ModelLane::RunOne(int index) {
  Stage& stage = stages_[index];
  if (!stage.frames.empty() && stage.frames.front().is_own &&
      stage.frames.front().commands_before <= stage.commands_taken) {
    Frame frame = std::move(stage.frames.front());
    stage.frames.pop_front();
    BeginStep(index, std::move(frame));
    return true;
  }
  const bool is_step = !stage.commands.empty() && stage.commands.front()->has_step();
  if (!stage.commands.empty() && !(is_step && index > 0 && stage.frames.empty())) {
    const auto command = std::move(stage.commands.front());
    stage.commands.pop_front();
    ++stage.commands_taken;
    RunCommand(index, *command);
    return true;
  }
  if (index > 0 || !own_steps_.ready()) return false;
  Frame own;
  own.step = own_steps_.Next(kMaxRows, options_.stages);
  own.is_own = true;
  own.commands_before = stage.commands_taken;
  BeginStep(0, std::move(own));
  return true;
}

void ModelLane::RunCommand(int index, const v1::ExecuteRequest& request) {
  Stage& stage = stages_[index];
  v1::ExecuteResponse response;
  if (request.has_attach()) {
    const absl::Status status = Attach(index, request.attach());
    if (status.ok() && index == 0) own_steps_.OnAttach(request.attach());
    response.mutable_attached()->set_slot(request.attach().slot());
    response.mutable_attached()->set_sequence(request.attach().sequence());
    *response.mutable_attached()->mutable_status() = common::ToStatusProto(status);
    return Answer(index, std::move(response));
  }
  if (request.has_step()) {
    Frame frame;
    if (index > 0) {
      frame = std::move(stage.frames.front());
      stage.frames.pop_front();
    }
    frame.step = request.step();
    return BeginStep(index, std::move(frame));
  }
  if (request.has_go_on() && index == 0) return SendStopped(own_steps_.OnGoOn(request.go_on()));
  if (request.has_save()) {
    const absl::Status status = Save(index, request.save());
    v1::SnapshotSaved& saved = *response.mutable_saved();
    saved.set_snapshot_id(request.save().snapshot_id());
    *saved.mutable_status() = common::ToStatusProto(status);
    if (status.ok()) {
      v1::RecordInfo& record = *saved.add_records();
      record.set_snapshot_id(request.save().snapshot_id());
      record.set_layer(index);
      record.set_bytes(8);
    }
    return Answer(index, std::move(response));
  }
  if (request.has_release()) {
    if (index == 0) own_steps_.OnRelease(request.release());
    Slot& slot = stage.slots.at(request.release().slot());
    if (slot.sequence == request.release().sequence()) slot.held = false;
  }
}

void ModelLane::BeginStep(int index, Frame frame) {
  if (index == 0) own_steps_.OnStep(frame.step);
  v1::StepResult result;
  result.set_step_id(frame.step.step_id());
  for (int i = 0; i < frame.step.entries_size(); ++i) {
    v1::EntryResult& out = *result.add_entries();
    const v1::StepEntry& entry = frame.step.entries(i);
    const auto refused = frame.refused.find(i);
    if (refused == frame.refused.end()) {
      out = Compute(index, entry, &frame.logits);
      if (out.status().code() != 0) frame.refused[i] = common::FromStatusProto(out.status());
      continue;
    }
    out.set_slot(entry.slot());
    out.set_sequence(entry.sequence());
    out.set_position(entry.expected_position());
    *out.mutable_status() = common::ToStatusProto(refused->second);
  }
  stages_[index].computes = true;
  world_.after(kStep, [this, index, frame = std::move(frame), result = std::move(result)] {
    Do(index, [this, index, frame, result] { FinishStep(index, frame, result); });
  });
}

void ModelLane::FinishStep(int index, Frame frame, v1::StepResult result) {
  Stage& stage = stages_[index];
  stage.computes = false;
  if (!IsLast(index)) {
    world_.after(stage.to_next, [this, next = index + 1, frame = std::move(frame)] {
      stages_[next].frames.push_back(frame);
      Run(next);
    });
    return Run(index);
  }
  for (v1::LogitsRows& rows : frame.logits) {
    v1::ExecuteResponse response;
    *response.mutable_logits() = std::move(rows);
    Answer(index, std::move(response));
  }
  v1::ExecuteResponse response;
  *response.mutable_step() = result;
  if (options_.stages > 1) {
    world_.after(back_, [this, result = std::move(result)] { Do(0, [this, result] { Drawn(result); }); });
    Answer(index, std::move(response));
    return Run(index);
  }
  Answer(index, std::move(response));
  Drawn(std::move(result));
}

void ModelLane::Drawn(v1::StepResult result) {
  SendStopped(own_steps_.OnResult(result));
  Run(0);
  if (!options_.broken.feeds_unasked) return;
  world_.after(back_ + kStep, [this, result = std::move(result)]() mutable {
    for (v1::EntryResult& entry : *result.mutable_entries()) {
      const Slot& slot = stages_[0].slots.at(entry.slot());
      entry.set_sequence(slot.sequence);
      entry.set_position(slot.position);
    }
    SendStopped(own_steps_.OnResult(result));
    Run(0);
  });
}

absl::Status ModelLane::CheckSlot(const Stage& stage, int slot, uint64_t sequence, uint64_t position) const {
  const Slot& held = stage.slots.at(slot);
  if (options_.broken.keeps_foreign_states) return absl::OkStatus();
  if (!held.held || held.sequence != sequence || held.position != position) {
    return absl::AbortedError(absl::StrCat("slot ", slot, " holds sequence ", held.sequence, " at ", held.position,
                                           ", not ", sequence, " at ", position));
  }
  return absl::OkStatus();
}

void ModelLane::Keep(int index, const std::string& snapshot_id, uint64_t state) const {
  KeptStates& kept = *world_.kept(index);
  kept[snapshot_id] = state;
  if (kept.size() > kMostKept) kept.erase(kept.begin()->first == snapshot_id ? std::prev(kept.end()) : kept.begin());
}

absl::StatusOr<uint64_t> ModelLane::Load(int index, const v1::AttachSequence& attach) const {
  const std::string& id = attach.snapshot().snapshot_id();
  if (attach.keep()) {
    const KeptStates& kept = *world_.kept(index);
    if (const auto state = kept.find(id); state != kept.end()) return state->second;
  }
  const uint64_t* const state = world_.store->FindState(id);
  if (state == nullptr) return absl::DataLossError("a record is missing");
  if (world_.store->IsDamaged(id) && !options_.broken.checks_no_sums) return absl::DataLossError("a record is damaged");
  if (attach.keep()) Keep(index, id, *state);
  return *state;
}

absl::Status ModelLane::Attach(int index, const v1::AttachSequence& attach) {
  Stage& stage = stages_[index];
  Slot& slot = stage.slots.at(attach.slot());
  if (attach.has_warm_sequence()) {
    if (absl::Status status = CheckSlot(stage, attach.slot(), attach.warm_sequence(), attach.position());
        !status.ok()) {
      slot = Slot();
      return status;
    }
  } else {
    const uint64_t before = slot.state;
    slot = Slot();
    slot.state = options_.broken.clears_nothing ? before : FakeModel::Fresh();
    if (attach.has_snapshot()) {
      RWKV_ASSIGN_OR_RETURN(slot.state, Load(index, attach));
    }
    slot.position = attach.position();
  }
  slot.held = true;
  slot.sequence = attach.sequence();
  slot.sampling = attach.sampling();
  return absl::OkStatus();
}

void ModelLane::FeedAndAnswer(const v1::StepEntry& entry, Slot& slot, v1::EntryResult* result,
                              std::vector<v1::LogitsRows>* logits) const {
  v1::LogitsRows rows;
  rows.set_sequence(entry.sequence());
  rows.set_first_position(entry.expected_position());
  const bool wants_hidden = entry.hidden_sum() || entry.hidden_last() || entry.logits();
  float hidden = 0;
  for (int t = 0; t < entry.token_ids_size(); ++t) {
    const uint64_t before = slot.state;
    slot.state = FakeModel::Feed(slot.state, entry.token_ids(t));
    const uint64_t said = options_.broken.answers_early ? before : slot.state;
    if (wants_hidden) hidden = ModelValue(said, kVocabulary, options_.family);
    if (t < entry.score_token_ids_size()) {
      result->add_scores(ModelValue(said, entry.score_token_ids(t), options_.family));
    }
    if (entry.hidden_sum()) slot.hidden_sum += hidden;
    if (!entry.logits()) continue;
    rows.set_rows(rows.rows() + 1);
    rows.mutable_logits()->append(reinterpret_cast<const char*>(&hidden), sizeof(hidden));
    rows.mutable_logits()->append((kVocabulary - 1) * sizeof(float), '\0');
  }
  const auto bytes = [](float value) { return std::string(reinterpret_cast<const char*>(&value), sizeof(value)); };
  if (entry.hidden_sum()) result->set_hidden_sum(bytes(slot.hidden_sum));
  if (entry.hidden_last()) result->set_hidden_last(bytes(hidden));
  if (entry.logits()) logits->push_back(std::move(rows));
}

v1::EntryResult ModelLane::Compute(int index, const v1::StepEntry& entry, std::vector<v1::LogitsRows>* logits) {
  Stage& stage = stages_[index];
  v1::EntryResult result;
  result.set_slot(entry.slot());
  result.set_sequence(entry.sequence());
  const absl::Status status = CheckSlot(stage, entry.slot(), entry.sequence(), entry.expected_position());
  if (!status.ok()) {
    result.set_position(entry.expected_position());
    *result.mutable_status() = common::ToStatusProto(status);
    return result;
  }
  Slot& slot = stage.slots.at(entry.slot());
  result.set_position(entry.expected_position() + entry.token_ids_size());
  const bool is_asked = entry.sample() || entry.score_token_ids_size() > 0 || entry.logits() || entry.hidden_sum();
  if (IsLast(index) && !is_asked && !entry.hidden_last() && world_.loses()) return result;
  if (IsLast(index)) {
    FeedAndAnswer(entry, slot, &result, logits);
  } else {
    slot.state = FakeModel::Feed(slot.state, {entry.token_ids().data(), static_cast<size_t>(entry.token_ids_size())});
  }
  slot.position = result.position();
  if (IsLast(index) && entry.sample()) {
    result.set_token_id(
        FakeModel::Next(slot.state, slot.position, OfFamily(slot.sampling, options_.family), kVocabulary));
    result.set_logprob(-1);
  }
  return result;
}

absl::Status ModelLane::Save(int index, const v1::SaveSnapshot& save) {
  const Stage& stage = stages_[index];
  RWKV_RETURN_IF_ERROR(CheckSlot(stage, save.slot(), save.sequence(), save.expected_position()));
  uint64_t state = stage.slots.at(save.slot()).state;
  if (options_.broken.saves_late) state = FakeModel::Feed(state, 1);
  world_.store->PutState(save.snapshot_id(), state);
  if (save.keep()) Keep(index, save.snapshot_id(), state);
  return absl::OkStatus();
}

}  // namespace rwkv::simulator
