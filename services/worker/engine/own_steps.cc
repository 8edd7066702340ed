#include "services/worker/engine/own_steps.h"

#include <algorithm>
#include <utility>

namespace rwkv::worker {

OwnSteps::Sequence* OwnSteps::Find(int slot, uint64_t sequence) {
  const auto it = sequences_.find(slot);
  return it == sequences_.end() || it->second.id != sequence ? nullptr : &it->second;
}

v1::SequenceStopped OwnSteps::StoppedAt(int slot, const Sequence& sequence) {
  v1::SequenceStopped stopped;
  stopped.set_slot(slot);
  stopped.set_sequence(sequence.id);
  stopped.set_position(sequence.position);
  return stopped;
}

void OwnSteps::OnAttach(const v1::AttachSequence& attach) {
  Sequence& sequence = sequences_[attach.slot()];
  sequence = Sequence();
  sequence.id = attach.sequence();
  sequence.position = attach.position();
  sequence.stop_token_ids.assign(attach.stop_token_ids().begin(), attach.stop_token_ids().end());
  sequence.pause_token_ids.assign(attach.pause_token_ids().begin(), attach.pause_token_ids().end());
}

void OwnSteps::OnRelease(const v1::ReleaseSlot& release) {
  if (Find(release.slot(), release.sequence()) != nullptr) sequences_.erase(release.slot());
}

void OwnSteps::OnStep(const v1::Step& step) {
  for (const v1::StepEntry& entry : step.entries()) {
    Sequence* const sequence = Find(entry.slot(), entry.sequence());
    if (sequence == nullptr) continue;
    ++sequence->in_flight;
    sequence->token = absl::nullopt;
    sequence->until = entry.go_on_until();
    sequence->paused = false;
  }
}

OwnSteps::Stopped OwnSteps::OnResult(const v1::StepResult& result) {
  Stopped stopped;
  ++last_turn_;
  for (const v1::EntryResult& entry : result.entries()) {
    Sequence* const sequence = Find(entry.slot(), entry.sequence());
    if (sequence == nullptr) continue;
    --sequence->in_flight;
    sequence->waits_since = last_turn_;
    if (entry.status().code() != 0) {
      sequence->until = 0;
    } else {
      sequence->position = entry.position();
      const std::vector<uint32_t>& stops = sequence->stop_token_ids;
      if (entry.has_token_id() && !std::binary_search(stops.begin(), stops.end(), entry.token_id())) {
        sequence->token = entry.token_id();
        const std::vector<uint32_t>& pauses = sequence->pause_token_ids;
        sequence->paused =
            sequence->known < sequence->position && std::binary_search(pauses.begin(), pauses.end(), entry.token_id());
      }
    }
    if (sequence->in_flight == 0 && std::exchange(sequence->stopping, false)) {
      stopped.push_back(StoppedAt(entry.slot(), *sequence));
    }
  }
  return stopped;
}

OwnSteps::Stopped OwnSteps::OnGoOn(const v1::GoOn& go_on) {
  Sequence* const sequence = Find(go_on.slot(), go_on.sequence());
  if (sequence == nullptr) return {};  // Nobody waits for an answer.
  sequence->until = go_on.until();
  sequence->known = std::max<uint64_t>(sequence->known, go_on.known());
  if (sequence->known >= sequence->position) sequence->paused = false;
  if (go_on.until() > 0) return {};
  if (sequence->in_flight == 0) return {StoppedAt(go_on.slot(), *sequence)};
  sequence->stopping = true;
  return {};
}

bool OwnSteps::ready() const {
  return std::any_of(sequences_.begin(), sequences_.end(), [](const auto& one) { return one.second.MayGoOn(); });
}

v1::Step OwnSteps::Next(int max_entries, int stages) {
  std::vector<std::pair<uint64_t, int>> waiting;  // Since when, which slot.
  int going = 0;
  for (const auto& [slot, sequence] : sequences_) {
    going += sequence.Goes();
    if (sequence.MayGoOn()) waiting.emplace_back(sequence.waits_since, slot);
  }
  std::sort(waiting.begin(), waiting.end());
  const size_t limit = std::min(max_entries, (going + stages - 1) / stages);
  if (waiting.size() > limit) waiting.resize(limit);
  v1::Step step;
  for (const auto& [since, slot] : waiting) {
    const Sequence& sequence = sequences_.at(slot);
    v1::StepEntry& entry = *step.add_entries();
    entry.set_slot(slot);
    entry.set_sequence(sequence.id);
    entry.set_expected_position(sequence.position);
    entry.add_token_ids(*sequence.token);
    entry.set_sample(true);
    entry.set_go_on_until(sequence.until);
  }
  return step;
}

}  // namespace rwkv::worker
