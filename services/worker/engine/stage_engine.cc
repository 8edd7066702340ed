#include "services/worker/engine/stage_engine.h"

#include <algorithm>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "kernels/api/op_table.h"
#include "kernels/base/status_macros.h"
#include "services/common/logging.h"
#include "services/common/sampling/sampling_params.h"

namespace rwkv::worker {
namespace {

using kernels::DeviceArray;
using kernels::MemoryKind;

SlotTable::Limits LimitsOf(const StageEngine::Options& options, const StageModel& model) {
  SlotTable::Limits limits;
  limits.slots = options.slots;
  limits.step_rows = options.max_batch_tokens;
  limits.vocab_size = model.weights().config().vocab_size;
  limits.sequence_tokens = model.max_tokens();
  return limits;
}

}  // namespace

absl::StatusOr<std::unique_ptr<StageEngine>> StageEngine::Create(Options options,
                                                                 std::unique_ptr<kernels::Device> device,
                                                                 std::unique_ptr<StageModel> model,
                                                                 TunedStates tuned_states) {
  if (options.slots < 1 || options.max_batch_tokens < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("engine: ", options.slots, " slots, ", options.max_batch_tokens, " batch tokens"));
  }
  std::unique_ptr<StageEngine> engine(new StageEngine(std::move(options), std::move(device), std::move(model)));
  RWKV_RETURN_IF_ERROR(engine->Allocate(std::move(tuned_states)));
  return engine;
}

StageEngine::StageEngine(Options options, std::unique_ptr<kernels::Device> device, std::unique_ptr<StageModel> model)
    : options_(std::move(options)),
      device_(std::move(device)),
      model_(std::move(model)),
      width_(model_->weights().config().width),
      v_first_width_(model_->v_first_width()),
      vocab_size_(model_->weights().config().vocab_size),
      slots_(LimitsOf(options_, *model_)) {}

// Memory must live until the stream has passed what uses it.
StageEngine::~StageEngine() {
  if (stream_ != nullptr) (void)stream_->Synchronize();
}

absl::Status StageEngine::Allocate(TunedStates tuned_states) {
  RWKV_ASSIGN_OR_RETURN(stream_, device_->NewStream());
  answers_ = std::make_unique<StepAnswers>(width_, vocab_size_, model_->state_layout(), stream_->host_threads());
  if (stream_->Repeats()) repeating_ = dynamic_cast<kernels::RepeatingStream*>(stream_.get());
  RWKV_ASSIGN_OR_RETURN(pool_, StatePool::Create(*device_, *model_, options_.slots));
  copies_ = std::make_shared<StateCopies>(*device_, model_->state_layout(), model_->weights().layers());
  for (auto& [id, state] : tuned_states) {
    int64_t size = 0;
    for (const std::vector<float>& layer : state) size += static_cast<int64_t>(layer.size());
    RWKV_ASSIGN_OR_RETURN(DeviceArray<float> pinned, DeviceArray<float>::Create(*device_, size, MemoryKind::kPinned));
    float* at = pinned.data();
    for (const std::vector<float>& layer : state) at = std::copy(layer.begin(), layer.end(), at);
    tuned_states_.emplace(id, std::move(pinned));
    state.clear();
  }
  const int64_t rows = options_.max_batch_tokens;
  RWKV_ASSIGN_OR_RETURN(x_, DeviceArray<float>::Create(*device_, rows * width_));
  RWKV_ASSIGN_OR_RETURN(v_first_, DeviceArray<float>::Create(*device_, rows * v_first_width_));
  RWKV_ASSIGN_OR_RETURN(before_, device_->NewEvent());
  draws_here_ = is_last() && device_->ops().sample != nullptr;
  if (draws_here_) {
    RWKV_ASSIGN_OR_RETURN(logits_, DeviceArray<float>::Create(*device_, rows * vocab_size_));
    RWKV_ASSIGN_OR_RETURN(adjusted_, DeviceArray<float>::Create(*device_, MostDraws() * vocab_size_));
  }
  for (Place& place : places_) RWKV_RETURN_IF_ERROR(AllocatePlace(place));
  return absl::OkStatus();
}

absl::Status StageEngine::AllocatePlace(Place& place) {
  const int64_t rows = options_.max_batch_tokens;
  const int64_t frame = rows * (width_ + v_first_width_);
  RWKV_ASSIGN_OR_RETURN(place.done, device_->NewEvent());
  RWKV_ASSIGN_OR_RETURN(place.memory, DeviceArray<float>::Create(*device_, 2 * frame, MemoryKind::kPinned));
  float* at = place.memory.data();
  for (LinkFrame* side : {&place.input, &place.output}) {
    side->x = at;
    side->v_first = at + rows * width_;
    at += frame;
  }
  if (!is_last()) return absl::OkStatus();
  RWKV_ASSIGN_OR_RETURN(place.logits, DeviceArray<float>::Create(*device_, rows * vocab_size_, MemoryKind::kPinned));
  RWKV_ASSIGN_OR_RETURN(place.hidden, DeviceArray<float>::Create(*device_, rows * width_, MemoryKind::kPinned));
  if (draws_here_) {
    RWKV_ASSIGN_OR_RETURN(place.draws, DeviceDraws::Create(*device_, MostDraws()));
  }
  return absl::OkStatus();
}

int64_t StageEngine::MostDraws() const { return std::min<int64_t>(options_.slots, options_.max_batch_tokens); }

LinkShape StageEngine::link_shape() const { return {width_, v_first_width_, options_.max_batch_tokens}; }

std::vector<std::string> StageEngine::tuned_state_ids() const {
  std::vector<std::string> ids;
  for (const auto& [id, state] : tuned_states_) ids.push_back(id);
  return ids;
}

absl::Status StageEngine::Reset() {
  const absl::Status status = stream_->Synchronize();
  slots_.FreeAll();
  last_step_ = 0;
  finished_step_ = 0;
  return status;
}

absl::Status StageEngine::WarmUp() {
  // A full step's activations would be most of what loading a small model takes.
  int64_t many = std::min<int64_t>(options_.max_batch_tokens, device_->warm_up_rows());
  if (model_->max_tokens() != 0) many = std::min(many, model_->max_tokens());
  Place& place = places_[0];
  for (const int64_t rows : {many, int64_t{1}}) {
    RWKV_RETURN_IF_ERROR(pool_->Reset(0, nullptr, *stream_));
    RWKV_RETURN_IF_ERROR(stream_->Zero(x_.data(), Bytes(rows * width_)));
    RWKV_RETURN_IF_ERROR(stream_->Zero(v_first_.data(), Bytes(rows * v_first_width_)));
    const kernels::SequenceSpan span = {0, 0, rows};
    const std::vector<int32_t> tokens(rows, 0);
    std::vector<int64_t> logit_rows;
    if (is_last()) {
      for (int64_t row = 0; row < rows; ++row) logit_rows.push_back(row);
    }
    StageStep step;
    step.spans = absl::MakeConstSpan(&span, 1);
    step.rows = rows;
    step.tokens = tokens.data();
    step.x = x_.data();
    step.v_first = v_first_.data();
    step.logit_rows = logit_rows;
    step.logits = LogitsOf(place);
    RWKV_RETURN_IF_ERROR(model_->Forward(step, pool_->view(), *stream_));
    if (draws_here_) {
      place.draws.Clear();
      RWKV_ASSIGN_OR_RETURN(common::SamplingParams greedy, common::SamplingParams::Create({}, vocab_size_));
      place.draws.Add(Turn(std::move(greedy)), 0, 0);
      RWKV_RETURN_IF_ERROR(EnqueueDraws(place));
      RWKV_RETURN_IF_ERROR(stream_->Copy(place.logits.data(), logits_.data(), Bytes(rows * vocab_size_)));
    }
    RWKV_RETURN_IF_ERROR(stream_->Copy(place.output.x, x_.data(), Bytes(rows * width_)));
    RWKV_RETURN_IF_ERROR(stream_->Synchronize());
    if (is_last() ? IsBroken(place.logits.data(), rows * vocab_size_) : IsBroken(place.output.x, rows * width_)) {
      return absl::InternalError("warm-up: the model gives numbers that are not finite");
    }
  }
  if (repeating_ != nullptr) RWKV_RETURN_IF_ERROR(PrepareSteps(*repeating_));
  return Reset();
}

absl::Status StageEngine::PrepareSteps(kernels::RepeatingStream& stream) {
  const absl::Time begin = absl::Now();
  const int64_t rows = MostDraws();
  const int64_t every_row = 0;
  for (const Place& place : places_) {
    StageStep step;
    step.x = x_.data();
    step.v_first = v_first_.data();
    if (is_last()) step.logit_rows = absl::MakeConstSpan(&every_row, 1);
    step.logits = LogitsOf(place);
    step.hidden = place.hidden.data();
    RWKV_RETURN_IF_ERROR(model_->PrepareSteps(step, rows, pool_->view(), stream));
  }
  common::LogInfo("steps_prepared", {{"graphs", stream.repeated().ready},
                                     {"device_bytes", stream.repeated().device_bytes},
                                     {"seconds", absl::ToDoubleSeconds(absl::Now() - begin)}});
  TellOfFailures();
  return absl::OkStatus();
}

void StageEngine::TellOfFailures() {
  if (repeating_ == nullptr || repeating_->repeated().failures == told_failures_) return;
  const kernels::RepeatingStream::Repeated& repeated = repeating_->repeated();
  told_failures_ = repeated.failures;
  common::LogWarning("steps_not_repeated", {{"device", device_->name()},
                                            {"failures", repeated.failures},
                                            {"error", repeated.last_failure},
                                            {"instead", "kernel by kernel"}});
}

absl::Status StageEngine::CheckManifest(const v1::SnapshotManifest& manifest, uint64_t position) const {
  const std::string name = absl::StrCat("snapshot ", manifest.snapshot_id());
  if (manifest.model_fingerprint() != options_.fingerprint) {
    return absl::FailedPreconditionError(
        absl::StrCat(name, " is of model ", manifest.model_fingerprint(), ", this is ", options_.fingerprint));
  }
  if (manifest.position() != position) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, " is at position ", manifest.position(), ", the sequence at ", position));
  }
  const int layers = model_->weights().config().layer_count;
  if (manifest.records_size() != layers) {
    return absl::DataLossError(
        absl::StrCat(name, " has ", manifest.records_size(), " records, the model ", layers, " layers"));
  }
  for (int layer = 0; layer < layers; ++layer) {
    const v1::RecordInfo& record = manifest.records(layer);
    const int64_t bytes = model_->state_layout().record_bytes();
    if (record.layer() != layer || record.bytes() != static_cast<uint64_t>(bytes) ||
        record.snapshot_id() != manifest.snapshot_id()) {
      return absl::DataLossError(absl::StrCat(name, ": record ", layer, " is layer ", record.layer(), " of ",
                                              record.snapshot_id(), " with ", record.bytes(), " bytes, not ", bytes));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<const float*> StageEngine::FindTunedState(const std::string& id) const {
  if (id.empty()) return nullptr;
  const auto it = tuned_states_.find(id);
  if (it != tuned_states_.end()) return it->second.data();
  const std::string ids = absl::StrJoin(tuned_state_ids(), ", ");
  return absl::FailedPreconditionError(absl::StrCat("there is no tuned state \"", absl::CHexEscape(id),
                                                    "\" here; there are: ", ids.empty() ? "none" : ids));
}

absl::Status StageEngine::Attach(const v1::AttachSequence& attach) {
  RWKV_RETURN_IF_ERROR(slots_.CheckNumber(attach.slot()));
  for (uint32_t id : attach.turn_token_ids()) {
    if (id >= static_cast<uint64_t>(vocab_size_)) {
      return absl::InvalidArgumentError(absl::StrCat("turn token id ", id, " is not below ", vocab_size_));
    }
  }
  RWKV_ASSIGN_OR_RETURN(common::SamplingParams sampling,
                        common::SamplingParams::Create(attach.sampling(), vocab_size_, attach.banned_token_ids()));
  Slot& slot = slots_.at(attach.slot());
  Slot next;
  next.state = Slot::State::kReady;
  next.sequence = attach.sequence();
  next.position = attach.position();
  next.turn = std::make_shared<Turn>(std::move(sampling));
  next.turn->penalties = PenaltyState(next.turn->sampling, attach.turn_token_ids());
  switch (attach.source_case()) {
    case v1::AttachSequence::kFresh: {
      if (attach.position() != 0) {
        return absl::InvalidArgumentError(
            absl::StrCat("slot ", attach.slot(), ": a fresh sequence at position ", attach.position()));
      }
      RWKV_ASSIGN_OR_RETURN(const float* const tuned, FindTunedState(attach.initial_state()));
      RWKV_RETURN_IF_ERROR(pool_->Reset(attach.slot(), tuned, *stream_));
      break;
    }
    case v1::AttachSequence::kWarmSequence:
      if (slot.state != Slot::State::kReady || slot.sequence != attach.warm_sequence() ||
          slot.position != attach.position()) {
        return absl::AbortedError(absl::StrCat("slot ", attach.slot(), " does not hold sequence ",
                                               attach.warm_sequence(), " at position ", attach.position()));
      }
      break;
    case v1::AttachSequence::kSnapshot:
      RWKV_RETURN_IF_ERROR(CheckManifest(attach.snapshot(), attach.position()));
      next.state = Slot::State::kLoading;
      break;
    case v1::AttachSequence::SOURCE_NOT_SET:
      return absl::InvalidArgumentError(absl::StrCat("slot ", attach.slot(), ": no source for its state"));
  }
  slot = std::move(next);
  return absl::OkStatus();
}

absl::Status StageEngine::Install(int slot, uint64_t sequence, std::shared_ptr<StateCopy> state) {
  RWKV_RETURN_IF_ERROR(slots_.CheckNumber(slot));
  if (!slots_.IsLoading(slot, sequence)) {
    return absl::AbortedError(absl::StrCat("slot ", slot, " no longer waits for sequence ", sequence));
  }
  RWKV_RETURN_IF_ERROR(pool_->CopyIn(slot, state->values(), *stream_));
  RWKV_RETURN_IF_ERROR(stream_->Record(state->copied()));
  slots_.at(slot).state = Slot::State::kReady;
  return absl::OkStatus();
}

void StageEngine::AbandonLoad(int slot, uint64_t sequence) {
  if (slots_.CheckNumber(slot).ok() && slots_.IsLoading(slot, sequence)) slots_.Free(slot);
}

void StageEngine::Release(const v1::ReleaseSlot& release) {
  if (!slots_.CheckNumber(release.slot()).ok()) return;
  if (slots_.at(release.slot()).sequence == release.sequence()) slots_.Free(release.slot());
}

std::vector<v1::RecordInfo> StageEngine::RecordsOfStage(const v1::SnapshotManifest& manifest) const {
  const LayerRange layers = model_->weights().layers();
  return {manifest.records().begin() + layers.begin, manifest.records().begin() + layers.end};
}

absl::StatusOr<std::shared_ptr<StateCopy>> StageEngine::CopyState(const v1::SaveSnapshot& save) {
  if (absl::optional<Refusal> refusal = slots_.CheckHolder(save.slot(), save.sequence(), save.expected_position())) {
    return refusal->status;
  }
  RWKV_ASSIGN_OR_RETURN(std::shared_ptr<StateCopy> copy, copies_->Take());
  RWKV_RETURN_IF_ERROR(pool_->CopyOut(save.slot(), copy->values(), *stream_));
  RWKV_RETURN_IF_ERROR(stream_->Record(copy->copied()));
  return copy;
}

}  // namespace rwkv::worker
