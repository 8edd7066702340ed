#include "services/worker/client/fake_stage.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"

namespace rwkv::worker {

v1::StatusProto ToProto(const absl::Status& status) {
  v1::StatusProto proto;
  proto.set_code(static_cast<int>(status.code()));
  proto.set_message(std::string(status.message()));
  return proto;
}

int FakeStage::slots_used() const {
  return static_cast<int>(std::count_if(slots_.begin(), slots_.end(), [](const Slot& slot) { return slot.held; }));
}

absl::Status FakeStage::Check(int slot, uint64_t sequence, uint64_t position) const {
  if (slot < 0 || slot >= options_.slots) {
    return absl::InvalidArgumentError(absl::StrCat("slot ", slot, " is outside the pool of ", options_.slots));
  }
  const Slot& held = slots_[slot];
  if (!held.held || held.sequence != sequence) {
    return absl::AbortedError(absl::StrCat("slot ", slot, " does not hold sequence ", sequence));
  }
  if (held.position != position) {
    return absl::AbortedError(absl::StrCat("slot ", slot, " is at position ", held.position, ", expected ", position));
  }
  return absl::OkStatus();
}

absl::Status FakeStage::Attach(const v1::AttachSequence& attach) {
  if (conditions_.attaches.Take()) return conditions_.attaches.status;
  if (attach.slot() < 0 || attach.slot() >= options_.slots) {
    return absl::InvalidArgumentError(absl::StrCat("slot ", attach.slot(), " is outside the pool of ", options_.slots));
  }
  Slot& slot = slots_[attach.slot()];
  Slot fresh;
  fresh.held = true;
  fresh.sequence = attach.sequence();
  fresh.position = attach.position();
  fresh.sampling = attach.sampling();
  fresh.counted =
      FakeModel::Feed(0, std::vector<uint32_t>(attach.turn_token_ids().begin(), attach.turn_token_ids().end()));
  fresh.banned.assign(attach.banned_token_ids().begin(), attach.banned_token_ids().end());
  switch (attach.source_case()) {
    case v1::AttachSequence::kFresh: {
      if (attach.position() != 0) return absl::InvalidArgumentError("a fresh sequence is at position 0");
      const std::vector<std::string>& known = conditions_.initial_states;
      if (!attach.initial_state().empty() && std::count(known.begin(), known.end(), attach.initial_state()) == 0) {
        return absl::FailedPreconditionError(absl::StrCat("no tuned state ", attach.initial_state()));
      }
      fresh.state = FakeModel::Fresh(attach.initial_state());
      if (is_last()) ++stats_.attaches_fresh;
      if (is_last() && !attach.initial_state().empty()) ++stats_.attaches_tuned;
      break;
    }
    case v1::AttachSequence::kWarmSequence:
      if (!slot.held || slot.sequence != attach.warm_sequence() || slot.position != attach.position()) {
        return absl::AbortedError(absl::StrCat("slot ", attach.slot(), " does not hold sequence ",
                                               attach.warm_sequence(), " at ", attach.position()));
      }
      fresh.state = slot.state;
      if (is_last()) ++stats_.attaches_warm;
      break;
    case v1::AttachSequence::kSnapshot:
      slot = Slot();
      if (absl::Status status = Load(attach, fresh.state); !status.ok()) return status;
      if (is_last()) ++stats_.attaches_snapshot;
      if (is_last() && attach.keep()) ++stats_.attaches_kept;
      break;
    case v1::AttachSequence::SOURCE_NOT_SET:
      return absl::InvalidArgumentError("no source");
  }
  slot = std::move(fresh);
  return absl::OkStatus();
}

absl::Status FakeStage::Load(const v1::AttachSequence& attach, uint64_t& state) const {
  const v1::SnapshotManifest& manifest = attach.snapshot();
  if (manifest.model_fingerprint() != conditions_.fingerprint) {
    return absl::FailedPreconditionError("the snapshot belongs to another model");
  }
  if (manifest.position() != attach.position() || manifest.records_size() != options_.layers) {
    return absl::DataLossError(absl::StrCat("snapshot ", manifest.snapshot_id(), ": manifest does not fit"));
  }
  for (int layer = first_layer(); layer < end_layer(); ++layer) {
    const absl::StatusOr<std::string> bytes = records_.Get(manifest.records(layer));
    if (!bytes.ok()) return bytes.status();
    if (bytes->size() != static_cast<size_t>(options_.record_bytes)) {
      return absl::DataLossError("record of a wrong size");
    }
    std::memcpy(&state, bytes->data(), sizeof(state));
  }
  return absl::OkStatus();
}

v1::StepResult FakeStage::Step(const v1::Step& step, Refusals& refusals, std::vector<v1::LogitsRows>& logits) {
  v1::StepResult result;
  result.set_step_id(step.step_id());
  for (int i = 0; i < step.entries_size(); ++i) {
    const v1::StepEntry& entry = step.entries(i);
    v1::EntryResult& out = *result.add_entries();
    out.set_slot(entry.slot());
    out.set_sequence(entry.sequence());
    if (!refusals.contains(i)) {
      absl::Status status = index_ == 0 && conditions_.entries.Take() ? conditions_.entries.status : Feed(entry);
      if (!status.ok()) refusals[i] = std::move(status);
    }
    if (entry.slot() >= 0 && entry.slot() < options_.slots) out.set_position(slots_[entry.slot()].position);
    const auto refused = refusals.find(i);
    *out.mutable_status() = ToProto(refused == refusals.end() ? absl::OkStatus() : refused->second);
    if (refused == refusals.end() && is_last()) Answer(entry, step.step_id(), out, logits);
  }
  return result;
}

absl::Status FakeStage::Feed(const v1::StepEntry& entry) {
  const absl::Status status = Check(entry.slot(), entry.sequence(), entry.expected_position());
  if (!status.ok()) return status;
  if (entry.token_ids_size() == 0) return absl::InvalidArgumentError("an entry without tokens");
  if (entry.score_token_ids_size() > entry.token_ids_size()) return absl::InvalidArgumentError("too many scores");
  for (uint32_t id : entry.token_ids()) {
    if (id >= static_cast<uint32_t>(options_.vocab_size)) {
      return absl::InvalidArgumentError(absl::StrCat("token id ", id, " is not below ", options_.vocab_size));
    }
  }
  Slot& slot = slots_[entry.slot()];
  if (options_.max_context_tokens != 0 && slot.position + entry.token_ids_size() > options_.max_context_tokens) {
    return absl::FailedPreconditionError(
        absl::StrCat("slot ", entry.slot(), ": pass the model's context of ", options_.max_context_tokens, " tokens"));
  }
  for (uint32_t id : entry.token_ids()) slot.state = FakeModel::Feed(slot.state, id);
  slot.position += entry.token_ids_size();
  return absl::OkStatus();
}

void FakeStage::Answer(const v1::StepEntry& entry, uint64_t step_id, v1::EntryResult& out,
                       std::vector<v1::LogitsRows>& logits) {
  Slot& slot = slots_[entry.slot()];
  const bool asks = entry.logits() || entry.sample() || entry.score_token_ids_size() > 0;
  if (asks && !conditions_.fail_beyond_with.ok() && slot.position > conditions_.fail_beyond) {
    *out.mutable_status() = ToProto(conditions_.fail_beyond_with);
    return;
  }
  if (entry.logits()) logits.push_back(LogitsOf(entry, step_id));
  for (uint32_t id : entry.score_token_ids()) out.add_scores(-static_cast<float>(id % 97) / 8.0f);
  if (!entry.sample()) return;
  out.set_token_id(
      FakeModel::Next(slot.state, slot.position, slot.sampling, options_.vocab_size, slot.banned, slot.counted));
  slot.counted = FakeModel::Feed(slot.counted, out.token_id());
  out.set_logprob(-static_cast<float>(out.token_id() % 97) / 8.0f);
  for (uint32_t n = 0; n < slot.sampling.top_logprobs(); ++n) {
    v1::TokenLogprob* top = out.add_top_logprobs();
    top->set_token_id((out.token_id() + n) % options_.vocab_size);
    top->set_logprob(-static_cast<float>(n) - 0.5f);
  }
}

// Not a distribution, but the same for the same entry.
v1::LogitsRows FakeStage::LogitsOf(const v1::StepEntry& entry, uint64_t step_id) const {
  v1::LogitsRows logits;
  logits.set_step_id(step_id);
  logits.set_sequence(entry.sequence());
  logits.set_first_position(entry.expected_position());
  logits.set_rows(entry.token_ids_size());
  std::vector<float> row(options_.vocab_size, 0.0f);
  std::string& bytes = *logits.mutable_logits();
  for (int t = 0; t < entry.token_ids_size(); ++t) {
    row[0] = static_cast<float>(entry.expected_position() + t);
    row[entry.token_ids(t)] += 1.0f;
    bytes.append(reinterpret_cast<const char*>(row.data()), row.size() * sizeof(float));
    row[entry.token_ids(t)] -= 1.0f;
  }
  return logits;
}

v1::SnapshotSaved FakeStage::Save(const v1::SaveSnapshot& save) {
  v1::SnapshotSaved saved;
  saved.set_snapshot_id(save.snapshot_id());
  absl::Status status = Check(save.slot(), save.sequence(), save.expected_position());
  if (status.ok() && conditions_.saves.Take()) status = conditions_.saves.status;
  for (int layer = first_layer(); status.ok() && layer < end_layer(); ++layer) {
    std::string bytes;
    for (uint64_t word = slots_[save.slot()].state; bytes.size() < static_cast<size_t>(options_.record_bytes); ++word) {
      bytes.append(reinterpret_cast<const char*>(&word), sizeof(word));
    }
    v1::RecordInfo& info = *saved.add_records();
    info.set_snapshot_id(save.snapshot_id());
    info.set_layer(layer);
    status = records_.Put(info, bytes);
  }
  if (!status.ok()) saved.clear_records();
  if (status.ok() && is_last()) ++stats_.saves;
  if (status.ok() && is_last() && save.keep()) ++stats_.saves_kept;
  *saved.mutable_status() = ToProto(status);
  return saved;
}

void FakeStage::Release(const v1::ReleaseSlot& release) {
  if (release.slot() < 0 || release.slot() >= options_.slots) return;
  Slot& slot = slots_[release.slot()];
  if (!slot.held || slot.sequence != release.sequence()) return;
  slot = Slot();
  if (is_last()) ++stats_.releases;
}

}  // namespace rwkv::worker
