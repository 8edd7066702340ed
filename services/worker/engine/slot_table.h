// Who holds which slot of a stage, at which position, and which entries of a step fit.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/optional.h"
#include "rwkv/v1/worker.pb.h"
#include "services/worker/sampler/sampler.h"

namespace rwkv::worker {

// Why this stage refused an entry, as metrics count it.
enum class RefusalCause { kSlot, kSequence, kPosition, kTokens, kRows, kContext, kNumeric };
constexpr int kRefusalCauses = 7;

struct Refusal {
  RefusalCause cause;
  absl::Status status;
};

// What a holder's tokens are drawn by, and what adds up since its attach. A step that is not finished keeps its own:
// the slot may be another's by then.
struct Turn {
  explicit Turn(SamplingParams params) : sampling(std::move(params)) {}

  SamplingParams sampling;
  PenaltyState penalties;
  int pending_draws = 0;          // Of steps that are not finished: `penalties` has not counted their tokens.
  std::vector<float> hidden_sum;  // [D]; empty: nobody asked.
};

struct Slot {
  enum class State { kFree, kLoading, kReady };
  State state = State::kFree;
  uint64_t sequence = 0;
  uint64_t position = 0;  // Tokens the state has seen once all that is enqueued has run; when loading, will have seen.
  std::shared_ptr<Turn> turn;
};

class SlotTable {
 public:
  struct Limits {
    int slots = 1;
    int64_t step_rows = 1;
    int64_t vocab_size = 1;
    uint64_t sequence_tokens = 0;  // 0: none.
  };

  explicit SlotTable(const Limits& limits);

  absl::Status CheckNumber(int slot) const;
  Slot& at(int slot) { return slots_[slot]; }
  const Slot& at(int slot) const { return slots_[slot]; }
  bool IsLoading(int slot, uint64_t sequence) const;
  int used() const;

  void Free(int slot) { slots_[slot] = Slot(); }
  void FreeAll();

  absl::optional<Refusal> CheckHolder(int slot, uint64_t sequence, uint64_t position) const;

  // The entries of one step, in order.
  void BeginStep();
  // Depends on the step alone, not on who holds what.
  absl::optional<Refusal> CheckRoom(const v1::StepEntry& entry, int64_t rows_before) const;
  absl::optional<Refusal> CheckEntry(const v1::StepEntry& entry) const;
  // The slot stands behind the entry's tokens from now on, and may not come again in this step.
  void Accept(const v1::StepEntry& entry);

 private:
  const Limits limits_;
  std::vector<Slot> slots_;
  std::vector<bool> in_step_;
};

}  // namespace rwkv::worker
