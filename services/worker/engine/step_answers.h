// What the last stage answers to the entries of a step, from logits and hidden states in host memory.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/api/sample.h"
#include "rwkv/v1/worker.pb.h"
#include "services/worker/engine/slot_table.h"
#include "services/worker/model/block/state_layout.h"
#include "services/worker/sampler/sampler.h"

namespace rwkv::worker {

// Where the numbers of an entry lie. Of logits that the device has drawn from nothing is there.
struct EntryNumbers {
  const float* logits = nullptr;  // [logit_row_end - logit_row_begin, V]
  int64_t logit_row_begin = 0;    // Its rows that have logits: [begin, end), counted from its first.
  int64_t logit_row_end = 0;
  const float* hidden = nullptr;  // [hidden_rows, D], of its last rows
  int64_t hidden_rows = 0;
  const kernels::SampleResult* drawn = nullptr;  // What the device drew of its one row of logits; null: the host draws.
  const float* matrix = nullptr;                 // Its matrix state; null: not asked, or CheckMatrix() says no.
};

// Entries of one step may be answered side by side, each by another thread.
class StepAnswers {
 public:
  // `layout` lives on.
  StepAnswers(int64_t width, int64_t vocab_size, const StateLayout& layout, int threads);

  // Whether all that the entry needs of logits is what may be drawn from the last row.
  static bool OnlyDraws(const v1::StepEntry& entry);
  // Which numbers the entry needs: logit_row_begin, logit_row_end and hidden_rows.
  static EntryNumbers Needs(const v1::StepEntry& entry);

  // kFailedPrecondition: a slot of this model has no matrix state, or one too large to be sent.
  absl::Status CheckMatrix(int slot) const;

  // Fills the entry's values and status; on an error it has no values. Rows of logits come apart. False: the numbers
  // are none. `thread` in [0, threads): what it computes with is its own.
  bool Answer(uint64_t step_id, const v1::StepEntry& entry, const EntryNumbers& numbers, Turn& turn, int thread,
              std::vector<v1::LogitsRows>& logits, v1::EntryResult& result);

 private:
  absl::StatusOr<SampledToken> Draw(const v1::StepEntry& entry, const EntryNumbers& numbers, Turn& turn, int thread);
  absl::Status Fill(uint64_t step_id, const v1::StepEntry& entry, const EntryNumbers& numbers, Turn& turn, int thread,
                    std::vector<v1::LogitsRows>& logits, v1::EntryResult& result);
  absl::Status FillHidden(const v1::StepEntry& entry, const EntryNumbers& numbers, Turn& turn,
                          v1::EntryResult& result) const;

  const int64_t width_;
  const int64_t vocab_size_;
  const StateLayout& layout_;
  std::vector<Sampler> samplers_;  // One a thread.
};

// NaN or +inf: no distribution. (-inf is a token that cannot be drawn.)
bool IsBroken(const float* logits, int64_t count);

}  // namespace rwkv::worker
