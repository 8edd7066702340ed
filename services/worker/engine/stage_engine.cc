#include "services/worker/engine/stage_engine.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/base/status_macros.h"
#include "services/common/grpc_status.h"
#include "services/common/sampling/sampling_params.h"

namespace rwkv::worker {
namespace {

constexpr int64_t kLogitsMessageBytes = 1 << 20;
constexpr int64_t kMaxWkvStateBytes = 1 << 20;

// NaN or +inf: no distribution. (-inf is a token that cannot be drawn.)
bool IsBroken(const float* logits, int64_t count) {
  bool broken = false;
  for (int64_t i = 0; i < count; ++i) broken |= !(logits[i] < std::numeric_limits<float>::infinity());
  return broken;
}

}  // namespace

absl::StatusOr<std::unique_ptr<StageEngine>> StageEngine::Create(Options options,
                                                                 std::unique_ptr<kernels::Device> device,
                                                                 std::unique_ptr<StageModel> model) {
  if (options.slots < 1 || options.max_batch_tokens < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("engine: ", options.slots, " slots, ", options.max_batch_tokens, " batch tokens"));
  }
  std::unique_ptr<StageEngine> engine(new StageEngine(std::move(options), std::move(device), std::move(model)));
  RWKV_RETURN_IF_ERROR(engine->Allocate());
  return engine;
}

StageEngine::StageEngine(Options options, std::unique_ptr<kernels::Device> device, std::unique_ptr<StageModel> model)
    : options_(std::move(options)),
      device_(std::move(device)),
      model_(std::move(model)),
      width_(model_->weights().config().width),
      v_first_width_(model_->v_first_width()),
      vocab_size_(model_->weights().config().vocab_size),
      slots_(options_.slots),
      slot_in_step_(options_.slots) {}

absl::Status StageEngine::Allocate() {
  RWKV_ASSIGN_OR_RETURN(stream_, device_->NewStream());
  RWKV_ASSIGN_OR_RETURN(pool_, StatePool::Create(*model_, options_.slots));
  const int64_t rows = options_.max_batch_tokens;
  RWKV_ASSIGN_OR_RETURN(x_, kernels::AlignedBuffer<float>::Create(rows * width_));
  RWKV_ASSIGN_OR_RETURN(v_first_, kernels::AlignedBuffer<float>::Create(rows * v_first_width_));
  RWKV_ASSIGN_OR_RETURN(logits_, kernels::AlignedBuffer<float>::Create(is_last() ? rows * vocab_size_ : 0));
  RWKV_ASSIGN_OR_RETURN(hidden_, kernels::AlignedBuffer<float>::Create(is_last() ? rows * width_ : 0));
  return absl::OkStatus();
}

LinkShape StageEngine::link_shape() const { return {width_, v_first_width_, options_.max_batch_tokens}; }

void StageEngine::Reset() {
  for (Slot& slot : slots_) slot = Slot();
  last_step_ = 0;
}

absl::Status StageEngine::WarmUp() {
  // Enough for the kernels of many rows; a full step's activations would be most of what loading a small model takes.
  int64_t many = std::min<int64_t>(options_.max_batch_tokens, 8);
  if (model_->max_tokens() != 0) many = std::min(many, model_->max_tokens());
  for (const int64_t rows : {many, int64_t{1}}) {
    pool_->Reset(0);
    std::fill_n(x_.begin(), rows * width_, 0.0f);
    std::fill_n(v_first_.begin(), rows * v_first_width_, 0.0f);
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
    step.logits = logits_.data();
    RWKV_RETURN_IF_ERROR(model_->Forward(step, pool_->view(), *stream_));
    RWKV_RETURN_IF_ERROR(stream_->Synchronize());
    if (is_last() ? IsBroken(logits_.data(), rows * vocab_size_) : IsBroken(x_.data(), rows * width_)) {
      return absl::InternalError("warm-up: the model gives numbers that are not finite");
    }
  }
  pool_->Reset(0);
  Reset();
  return absl::OkStatus();
}

absl::Status StageEngine::CheckSlotNumber(int slot) const {
  if (slot >= 0 && slot < options_.slots) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("slot ", slot, " is outside the pool of ", options_.slots));
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

absl::StatusOr<const TunedState*> StageEngine::FindTunedState(const std::string& id) const {
  if (id.empty()) return nullptr;
  const auto it = options_.tuned_states.find(id);
  if (it != options_.tuned_states.end()) return &it->second;
  const std::string ids =
      absl::StrJoin(options_.tuned_states, ", ", [](std::string* out, const auto& state) { out->append(state.first); });
  return absl::FailedPreconditionError(absl::StrCat("there is no tuned state \"", absl::CHexEscape(id),
                                                    "\" here; there are: ", ids.empty() ? "none" : ids));
}

absl::Status StageEngine::Attach(const v1::AttachSequence& attach) {
  RWKV_RETURN_IF_ERROR(CheckSlotNumber(attach.slot()));
  for (uint32_t id : attach.turn_token_ids()) {
    if (id >= static_cast<uint64_t>(vocab_size_)) {
      return absl::InvalidArgumentError(absl::StrCat("turn token id ", id, " is not below ", vocab_size_));
    }
  }
  RWKV_ASSIGN_OR_RETURN(common::SamplingParams sampling,
                        common::SamplingParams::Create(attach.sampling(), vocab_size_, attach.banned_token_ids()));
  Slot& slot = slots_[attach.slot()];
  Slot next;
  next.state = Slot::State::kReady;
  next.sequence = attach.sequence();
  next.position = attach.position();
  next.penalties = PenaltyState(sampling, attach.turn_token_ids());
  next.sampling = std::move(sampling);
  switch (attach.source_case()) {
    case v1::AttachSequence::kFresh: {
      if (attach.position() != 0) {
        return absl::InvalidArgumentError(
            absl::StrCat("slot ", attach.slot(), ": a fresh sequence at position ", attach.position()));
      }
      RWKV_ASSIGN_OR_RETURN(const TunedState* const tuned, FindTunedState(attach.initial_state()));
      pool_->Reset(attach.slot(), tuned);
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

absl::Status StageEngine::Install(int slot, uint64_t sequence, absl::Span<const std::string> records) {
  RWKV_RETURN_IF_ERROR(CheckSlotNumber(slot));
  if (slots_[slot].state != Slot::State::kLoading || slots_[slot].sequence != sequence) {
    return absl::AbortedError(absl::StrCat("slot ", slot, " no longer waits for sequence ", sequence));
  }
  if (static_cast<int>(records.size()) != pool_->layers()) {
    FreeSlot(slot);
    return absl::DataLossError(
        absl::StrCat("slot ", slot, ": ", records.size(), " records for ", pool_->layers(), " layers"));
  }
  for (int layer = 0; layer < pool_->layers(); ++layer) {
    if (absl::Status status = pool_->CopyIn(slot, layer, records[layer]); !status.ok()) {
      FreeSlot(slot);
      return status;
    }
  }
  slots_[slot].state = Slot::State::kReady;
  return absl::OkStatus();
}

void StageEngine::AbandonLoad(int slot, uint64_t sequence) {
  if (!CheckSlotNumber(slot).ok()) return;
  if (slots_[slot].state == Slot::State::kLoading && slots_[slot].sequence == sequence) FreeSlot(slot);
}

void StageEngine::FreeSlot(int slot) { slots_[slot] = Slot(); }

void StageEngine::Release(const v1::ReleaseSlot& release) {
  if (!CheckSlotNumber(release.slot()).ok()) return;
  if (slots_[release.slot()].sequence == release.sequence()) FreeSlot(release.slot());
}

std::vector<v1::RecordInfo> StageEngine::RecordsOfStage(const v1::SnapshotManifest& manifest) const {
  const LayerRange layers = model_->weights().layers();
  return {manifest.records().begin() + layers.begin, manifest.records().begin() + layers.end};
}

int StageEngine::slots_used() const {
  return static_cast<int>(
      std::count_if(slots_.begin(), slots_.end(), [](const Slot& slot) { return slot.state != Slot::State::kFree; }));
}

absl::optional<StageEngine::Refusal> StageEngine::CheckHolder(int slot, uint64_t sequence, uint64_t position) const {
  if (absl::Status status = CheckSlotNumber(slot); !status.ok()) return Refusal{RefusalCause::kSlot, status};
  const Slot& held = slots_[slot];
  if (held.state != Slot::State::kReady || held.sequence != sequence) {
    const char* const what = held.state == Slot::State::kFree      ? "nothing"
                             : held.state == Slot::State::kLoading ? "a sequence that is loading"
                                                                   : "another sequence";
    return Refusal{RefusalCause::kSequence,
                   absl::AbortedError(absl::StrCat("slot ", slot, " holds ", what, ", not sequence ", sequence))};
  }
  if (held.position != position) {
    return Refusal{RefusalCause::kPosition,
                   absl::AbortedError(absl::StrCat("slot ", slot, " is at position ", held.position, ", sequence ",
                                                   sequence, " expects ", position))};
  }
  return absl::nullopt;
}

absl::optional<StageEngine::Refusal> StageEngine::CheckEntry(const v1::StepEntry& entry, int64_t rows_before) const {
  if (absl::optional<Refusal> refusal = CheckHolder(entry.slot(), entry.sequence(), entry.expected_position())) {
    return refusal;
  }
  if (slot_in_step_[entry.slot()]) {
    return Refusal{RefusalCause::kSlot,
                   absl::InvalidArgumentError(absl::StrCat("slot ", entry.slot(), " is in the step twice"))};
  }
  const int64_t rows = entry.token_ids_size();
  if (rows == 0) {
    return Refusal{RefusalCause::kTokens,
                   absl::InvalidArgumentError(absl::StrCat("slot ", entry.slot(), ": an entry without tokens"))};
  }
  if (rows_before + rows > options_.max_batch_tokens) {
    return Refusal{RefusalCause::kRows, absl::InvalidArgumentError(
                                            absl::StrCat("slot ", entry.slot(), ": ", rows, " rows after ", rows_before,
                                                         ", a step has at most ", options_.max_batch_tokens))};
  }
  const uint64_t limit = model_->max_tokens();
  if (limit != 0 && entry.expected_position() + rows > limit) {
    return Refusal{RefusalCause::kContext,
                   absl::FailedPreconditionError(absl::StrCat("slot ", entry.slot(), ": ", rows, " tokens after ",
                                                              entry.expected_position(),
                                                              " pass the model's context of ", limit, " tokens"))};
  }
  const int scores = entry.score_token_ids_size();
  if (scores != 0 && scores != rows && scores != rows - 1) {
    return Refusal{RefusalCause::kTokens, absl::InvalidArgumentError(absl::StrCat("slot ", entry.slot(), ": ", scores,
                                                                                  " scores for ", rows, " tokens"))};
  }
  for (const auto* ids : {&entry.token_ids(), &entry.score_token_ids()}) {
    for (uint32_t id : *ids) {
      if (id < static_cast<uint64_t>(vocab_size_)) continue;
      return Refusal{RefusalCause::kTokens,
                     absl::InvalidArgumentError(
                         absl::StrCat("slot ", entry.slot(), ": token id ", id, " is not below ", vocab_size_))};
    }
  }
  return absl::nullopt;
}

absl::StatusOr<StepOutput> StageEngine::RunStep(const v1::Step& step, const LinkFrame* input) {
  if (step.step_id() != last_step_ + 1) {
    return absl::InvalidArgumentError(absl::StrCat("step ", step.step_id(), " after step ", last_step_));
  }
  if (is_first() != (input == nullptr)) return absl::InternalError("a step has input on every stage but the first");
  if (input != nullptr && input->step_id != step.step_id()) {
    return absl::InvalidArgumentError(absl::StrCat("step ", step.step_id(), " with input of ", input->step_id));
  }
  last_step_ = step.step_id();

  // Which entries are computed, and their rows packed one after the other.
  StepOutput output;
  std::vector<RefusedEntry> refused;
  spans_.clear();
  active_.clear();
  tokens_.clear();
  logit_rows_.clear();
  hidden_rows_.clear();
  std::fill(slot_in_step_.begin(), slot_in_step_.end(), false);
  int64_t rows = 0;
  int64_t input_row = 0;
  size_t next_refused = 0;  // Of the input's.
  for (int i = 0; i < step.entries_size(); ++i) {
    const v1::StepEntry& entry = step.entries(i);
    const int64_t count = entry.token_ids_size();
    if (input != nullptr && next_refused < input->refused.size() && input->refused[next_refused].entry == i) {
      refused.push_back(input->refused[next_refused++]);
      continue;
    }
    if (input != nullptr && input_row + count > input->rows) {
      return absl::InvalidArgumentError(
          absl::StrCat("step ", step.step_id(), ": input of ", input->rows, " rows ends in entry ", i));
    }
    const int64_t from_row = input_row;
    input_row += count;
    if (absl::optional<Refusal> refusal = CheckEntry(entry, rows)) {
      refused.push_back({i, std::move(refusal->status)});
      output.refused_here.push_back(refusal->cause);
      continue;
    }
    slot_in_step_[entry.slot()] = true;
    ActiveEntry active;
    active.entry = i;
    active.first_row = rows;
    if (is_last()) {
      // Scores need the rows before the scored tokens, a draw the last row, logits all; together they have no gap.
      const bool all = entry.logits() || entry.score_token_ids_size() == count;
      active.logit_row_begin = all || entry.score_token_ids_size() > 0 ? 0 : count - 1;
      active.logit_row_end = all || entry.sample() ? count : entry.score_token_ids_size();
      active.first_logit_row = static_cast<int64_t>(logit_rows_.size());
      for (int64_t row = active.logit_row_begin; row < active.logit_row_end; ++row) logit_rows_.push_back(rows + row);
      active.hidden_rows = entry.hidden_sum() ? count : entry.hidden_last() ? 1 : 0;
      active.first_hidden_row = static_cast<int64_t>(hidden_rows_.size());
      for (int64_t row = count - active.hidden_rows; row < count; ++row) hidden_rows_.push_back(rows + row);
    }
    if (input != nullptr) {
      std::copy_n(input->x.data() + from_row * width_, count * width_, x_.data() + rows * width_);
      std::copy_n(input->v_first.data() + from_row * v_first_width_, count * v_first_width_,
                  v_first_.data() + rows * v_first_width_);
    }
    for (uint32_t id : entry.token_ids()) tokens_.push_back(static_cast<int32_t>(id));
    spans_.push_back({entry.slot(), rows, count});
    active_.push_back(active);
    rows += count;
  }
  if (input != nullptr && (input_row != input->rows || next_refused != input->refused.size())) {
    return absl::InvalidArgumentError(absl::StrCat("step ", step.step_id(), ": input of ", input->rows, " rows and ",
                                                   input->refused.size(), " refused entries, the step has ", input_row,
                                                   " and ", next_refused));
  }
  output.rows = rows;

  if (rows > 0) {
    StageStep forward;
    forward.spans = spans_;
    forward.rows = rows;
    forward.tokens = tokens_.data();
    forward.x = x_.data();
    forward.v_first = v_first_.data();
    forward.logit_rows = logit_rows_;
    forward.logits = logits_.data();
    forward.hidden_rows = hidden_rows_;
    forward.hidden = hidden_.data();
    absl::Status status = model_->Forward(forward, pool_->view(), *stream_);
    if (status.ok()) status = stream_->Synchronize();
    if (!status.ok()) return absl::InternalError(absl::StrCat("step ", step.step_id(), ": ", status.message()));
    for (const ActiveEntry& active : active_) {
      const v1::StepEntry& entry = step.entries(active.entry);
      slots_[entry.slot()].position += entry.token_ids_size();
    }
  }

  if (!is_last()) {
    output.frame.step_id = step.step_id();
    output.frame.rows = rows;
    output.frame.x.assign(x_.data(), x_.data() + rows * width_);
    output.frame.v_first.assign(v_first_.data(), v_first_.data() + rows * v_first_width_);
    output.frame.refused = std::move(refused);
    return output;
  }

  output.result.set_step_id(step.step_id());
  size_t next_active = 0;
  next_refused = 0;
  for (int i = 0; i < step.entries_size(); ++i) {
    const v1::StepEntry& entry = step.entries(i);
    v1::EntryResult& result = *output.result.add_entries();
    result.set_slot(entry.slot());
    result.set_sequence(entry.sequence());
    absl::Status status;
    if (next_refused < refused.size() && refused[next_refused].entry == i) {
      status = std::move(refused[next_refused++].status);
    } else {
      status = Answer(entry, active_[next_active++], step.step_id(), output, result);
      if (!status.ok()) {
        output.refused_here.push_back(RefusalCause::kNumeric);
        result.clear_token_id();
        result.clear_logprob();
        result.clear_top_logprobs();
        result.clear_scores();
        result.clear_hidden_sum();
        result.clear_hidden_last();
      }
    }
    if (CheckSlotNumber(entry.slot()).ok() && slots_[entry.slot()].sequence == entry.sequence()) {
      result.set_position(slots_[entry.slot()].position);
    }
    *result.mutable_status() = common::ToStatusProto(status);
  }
  return output;
}

absl::Status StageEngine::Answer(const v1::StepEntry& entry, const ActiveEntry& active, uint64_t step_id,
                                 StepOutput& output, v1::EntryResult& result) {
  Slot& slot = slots_[entry.slot()];
  const int64_t count = entry.token_ids_size();
  for (int64_t row = active.logit_row_begin; row < active.logit_row_end; ++row) {
    if (IsBroken(LogitsOf(active, row), vocab_size_)) {
      return absl::InternalError(absl::StrCat("slot ", entry.slot(), ": the model's logits after position ",
                                              entry.expected_position() + row, " are not finite"));
    }
  }
  for (int i = 0; i < entry.score_token_ids_size(); ++i) {
    RWKV_ASSIGN_OR_RETURN(const float logprob, Sampler::Logprob(absl::MakeConstSpan(LogitsOf(active, i), vocab_size_),
                                                                entry.score_token_ids(i)));
    result.add_scores(logprob);
  }
  if (entry.sample()) {
    RWKV_ASSIGN_OR_RETURN(const SampledToken sampled,
                          sampler_.Sample(absl::MakeConstSpan(LogitsOf(active, count - 1), vocab_size_), *slot.sampling,
                                          slot.position, slot.penalties));
    result.set_token_id(sampled.token);
    result.set_logprob(sampled.logprob);
    for (const LogprobOf& top : sampled.top_logprobs) {
      v1::TokenLogprob& out = *result.add_top_logprobs();
      out.set_token_id(top.token);
      out.set_logprob(top.logprob);
    }
  }
  if (entry.logits()) {
    const int64_t row_bytes = vocab_size_ * static_cast<int64_t>(sizeof(float));
    const int64_t rows_per_message = std::max<int64_t>(1, kLogitsMessageBytes / row_bytes);
    for (int64_t row = 0; row < count; row += rows_per_message) {
      const int64_t rows = std::min(rows_per_message, count - row);
      v1::LogitsRows message;
      message.set_step_id(step_id);
      message.set_sequence(entry.sequence());
      message.set_first_position(entry.expected_position() + row);
      message.set_rows(static_cast<uint32_t>(rows));
      message.set_logits(LogitsOf(active, row), rows * row_bytes);
      output.logits.push_back(std::move(message));
    }
  }
  RWKV_RETURN_IF_ERROR(AnswerHidden(entry, active, result));
  return entry.wkv_state() ? AnswerWkvState(entry, result) : absl::OkStatus();
}

absl::Status StageEngine::AnswerHidden(const v1::StepEntry& entry, const ActiveEntry& active, v1::EntryResult& result) {
  const float* const hidden = hidden_.data() + active.first_hidden_row * width_;
  for (int64_t i = 0; i < active.hidden_rows * width_; ++i) {
    if (std::isfinite(hidden[i])) continue;
    return absl::InternalError(absl::StrCat("slot ", entry.slot(), ": a final hidden state is not finite"));
  }
  const size_t bytes = width_ * sizeof(float);
  if (entry.hidden_sum()) {
    std::vector<float>& sum = slots_[entry.slot()].hidden_sum;
    sum.resize(width_, 0.0f);
    for (int64_t row = 0; row < active.hidden_rows; ++row) {
      for (int64_t c = 0; c < width_; ++c) sum[c] += hidden[row * width_ + c];
    }
    result.set_hidden_sum(sum.data(), bytes);
  }
  if (entry.hidden_last()) result.set_hidden_last(hidden + (active.hidden_rows - 1) * width_, bytes);
  return absl::OkStatus();
}

absl::Status StageEngine::AnswerWkvState(const v1::StepEntry& entry, v1::EntryResult& result) const {
  const StateLayout& layout = model_->state_layout();
  if (layout.matrix() < 0) {
    return absl::FailedPreconditionError(absl::StrCat("slot ", entry.slot(), ": the model has no matrix state"));
  }
  const int64_t bytes = layout.tensors()[layout.matrix()].size() * static_cast<int64_t>(sizeof(float));
  if (bytes > kMaxWkvStateBytes) {
    return absl::FailedPreconditionError(absl::StrCat("slot ", entry.slot(), ": the matrix state has ", bytes,
                                                      " bytes, at most ", kMaxWkvStateBytes, " are sent"));
  }
  const kernels::StateTensor& pool = pool_->view().tensor(pool_->layers() - 1, layout.matrix());
  result.set_wkv_state(pool.data + entry.slot() * pool.stride, bytes);
  return absl::OkStatus();
}

absl::StatusOr<std::vector<std::string>> StageEngine::CopyState(const v1::SaveSnapshot& save) const {
  if (absl::optional<Refusal> refusal = CheckHolder(save.slot(), save.sequence(), save.expected_position())) {
    return refusal->status;
  }
  std::vector<std::string> records(pool_->layers());
  for (int layer = 0; layer < pool_->layers(); ++layer) {
    RWKV_RETURN_IF_ERROR(pool_->CopyOut(save.slot(), layer, &records[layer]));
  }
  return records;
}

}  // namespace rwkv::worker
