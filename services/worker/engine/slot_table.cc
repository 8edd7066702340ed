#include "services/worker/engine/slot_table.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace rwkv::worker {

SlotTable::SlotTable(const Limits& limits) : limits_(limits), slots_(limits.slots), in_step_(limits.slots) {}

absl::Status SlotTable::CheckNumber(int slot) const {
  if (slot >= 0 && slot < limits_.slots) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("slot ", slot, " is outside the pool of ", limits_.slots));
}

bool SlotTable::IsLoading(int slot, uint64_t sequence) const {
  return slots_[slot].state == Slot::State::kLoading && slots_[slot].sequence == sequence;
}

int SlotTable::used() const {
  return static_cast<int>(
      std::count_if(slots_.begin(), slots_.end(), [](const Slot& slot) { return slot.state != Slot::State::kFree; }));
}

void SlotTable::FreeAll() {
  for (Slot& slot : slots_) slot = Slot();
}

void SlotTable::BeginStep() { std::fill(in_step_.begin(), in_step_.end(), false); }

void SlotTable::Accept(const v1::StepEntry& entry) {
  in_step_[entry.slot()] = true;
  slots_[entry.slot()].position += entry.token_ids_size();
}

absl::optional<Refusal> SlotTable::CheckHolder(int slot, uint64_t sequence, uint64_t position) const {
  if (absl::Status status = CheckNumber(slot); !status.ok()) return Refusal{RefusalCause::kSlot, status};
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

absl::optional<Refusal> SlotTable::CheckRoom(const v1::StepEntry& entry, int64_t rows_before) const {
  const int64_t rows = entry.token_ids_size();
  if (rows_before + rows <= limits_.step_rows) return absl::nullopt;
  return Refusal{RefusalCause::kRows,
                 absl::InvalidArgumentError(absl::StrCat("slot ", entry.slot(), ": ", rows, " rows after ", rows_before,
                                                         ", a step has at most ", limits_.step_rows))};
}

absl::optional<Refusal> SlotTable::CheckEntry(const v1::StepEntry& entry) const {
  if (absl::Status status = CheckNumber(entry.slot()); !status.ok()) return Refusal{RefusalCause::kSlot, status};
  if (in_step_[entry.slot()]) {
    return Refusal{RefusalCause::kSlot,
                   absl::InvalidArgumentError(absl::StrCat("slot ", entry.slot(), " is in the step twice"))};
  }
  if (absl::optional<Refusal> refusal = CheckHolder(entry.slot(), entry.sequence(), entry.expected_position())) {
    return refusal;
  }
  const int64_t rows = entry.token_ids_size();
  if (rows == 0) {
    return Refusal{RefusalCause::kTokens,
                   absl::InvalidArgumentError(absl::StrCat("slot ", entry.slot(), ": an entry without tokens"))};
  }
  const uint64_t limit = limits_.sequence_tokens;
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
      if (id < static_cast<uint64_t>(limits_.vocab_size)) continue;
      return Refusal{RefusalCause::kTokens,
                     absl::InvalidArgumentError(
                         absl::StrCat("slot ", entry.slot(), ": token id ", id, " is not below ", limits_.vocab_size))};
    }
  }
  return absl::nullopt;
}

}  // namespace rwkv::worker
