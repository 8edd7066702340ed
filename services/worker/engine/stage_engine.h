// The step logic of one pipeline stage: who holds which slot, at which position, and what a step does. No I/O, no
// threads; the device's thread owns it. proto/rwkv/v1/worker.proto says what commands mean.
//
// Law S4: a slot is reset when given out, and an entry whose slot, sequence or position does not fit is refused on this
// stage and skipped on later ones; a foreign or stale state is never computed on.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/optional.h"
#include "absl/types/span.h"
#include "kernels/api/sequence_span.h"
#include "kernels/base/aligned_buffer.h"
#include "kernels/base/device.h"
#include "kernels/base/stream.h"
#include "rwkv/v1/state_store.pb.h"
#include "rwkv/v1/worker.pb.h"
#include "services/worker/engine/state_pool.h"
#include "services/worker/link/link.h"
#include "services/worker/model/block/stage_model.h"
#include "services/worker/model/tuned_states.h"
#include "services/worker/sampler/sampler.h"

namespace rwkv::worker {

// Why this stage refused an entry, as metrics count it.
enum class RefusalCause { kSlot, kSequence, kPosition, kTokens, kRows, kContext, kNumeric };
constexpr int kRefusalCauses = 7;

struct StepOutput {
  LinkFrame frame;                         // For the next stage; not filled on the last.
  std::vector<v1::LogitsRows> logits;      // Last stage only; to be sent before `result`.
  v1::StepResult result;                   // Last stage only.
  std::vector<RefusalCause> refused_here;  // Those that this stage refused itself.
  int64_t rows = 0;                        // Computed.
};

class StageEngine {
 public:
  struct Options {
    int slots = 64;              // >= 1
    int max_batch_tokens = 128;  // Rows of a step, >= 1.
    std::string fingerprint;     // Of the model; snapshots of another are refused.
    TunedStates tuned_states;    // Of the model and this stage's layers: what fresh sequences may ask for.
  };

  // `model` is of this device. kResourceExhausted: no memory.
  static absl::StatusOr<std::unique_ptr<StageEngine>> Create(Options options, std::unique_ptr<kernels::Device> device,
                                                             std::unique_ptr<StageModel> model);

  // A new epoch: every slot is free, the next step is 1.
  void Reset();

  // Runs one full batch and one single row on throw-away states, so that the first request finds warm code and pages.
  // Ends with Reset(). kInternal: the model gives NaN.
  absl::Status WarmUp();

  // Gives the slot to the sequence, whoever held it before. `fresh` and `warm_sequence` are done when it returns OK;
  // `snapshot` only reserves the slot, and Install or AbandonLoad must follow. On error the slot is as it was.
  //   kInvalidArgument: slot, position or sampling. kAborted: the slot does not hold the warm sequence at the position.
  //   kFailedPrecondition: a snapshot of another model, a tuned state that is not among the options. kDataLoss: a
  //   manifest that does not fit the model.
  absl::Status Attach(const v1::AttachSequence& attach);

  // The state has come: one record per layer of this stage. kAborted: the slot was given away or released meanwhile.
  // kDataLoss: a record does not fit; the slot is free then.
  absl::Status Install(int slot, uint64_t sequence, absl::Span<const std::string> records);
  // It will not come: frees the slot, if it still waits for this sequence.
  void AbandonLoad(int slot, uint64_t sequence);

  // Computes one step. `input` is the stage before's frame of the same step, checked by its link; null on the first
  // stage. An error here ends the epoch (kInvalidArgument: step out of order or input that contradicts it; else the
  // device failed); what is wrong with one entry is told in the output and harms no other.
  absl::StatusOr<StepOutput> RunStep(const v1::Step& step, const LinkFrame* input);

  // A copy of the slot's state: one record per layer of this stage.
  //   kInvalidArgument, kAborted: as for a step's entry. kInternal: the state is not finite.
  absl::StatusOr<std::vector<std::string>> CopyState(const v1::SaveSnapshot& save) const;

  // Frees the slot if it holds the sequence.
  void Release(const v1::ReleaseSlot& release);

  // This stage's part of a manifest, which Attach has accepted.
  std::vector<v1::RecordInfo> RecordsOfStage(const v1::SnapshotManifest& manifest) const;

  int slots_used() const;
  const StageModel& model() const { return *model_; }
  const StatePool& pool() const { return *pool_; }
  const Options& options() const { return options_; }
  LinkShape link_shape() const;
  bool is_first() const { return model_->weights().is_first(); }
  bool is_last() const { return model_->weights().is_last(); }

 private:
  struct Slot {
    enum class State { kFree, kLoading, kReady };
    State state = State::kFree;
    uint64_t sequence = 0;
    uint64_t position = 0;  // Tokens the state has seen; when loading, those it will have seen.
    absl::optional<SamplingParams> sampling;
    PenaltyState penalties;
    std::vector<float> hidden_sum;  // [D] since the attach; empty: nobody asked. Last stage only.
  };
  // An entry of the running step that this stage computes.
  struct ActiveEntry {
    int entry = 0;
    int64_t first_row = 0;
    int64_t first_logit_row = -1;  // Place of its first row in the logits; its rows there are consecutive.
    int64_t logit_row_begin = 0;   // Its rows that need logits: [begin, end), counted from its first.
    int64_t logit_row_end = 0;
    int64_t first_hidden_row = 0;  // The same of its final hidden states: its last rows.
    int64_t hidden_rows = 0;
  };
  struct Refusal {
    RefusalCause cause;
    absl::Status status;
  };

  StageEngine(Options options, std::unique_ptr<kernels::Device> device, std::unique_ptr<StageModel> model);

  absl::Status Allocate();
  absl::Status CheckSlotNumber(int slot) const;
  // Null: the model's own.
  absl::StatusOr<const TunedState*> FindTunedState(const std::string& id) const;
  absl::Status CheckManifest(const v1::SnapshotManifest& manifest, uint64_t position) const;
  absl::optional<Refusal> CheckEntry(const v1::StepEntry& entry, int64_t rows_before) const;
  absl::optional<Refusal> CheckHolder(int slot, uint64_t sequence, uint64_t position) const;
  void FreeSlot(int slot);
  // Fills the entry's result from its logits; kInternal when they are not numbers.
  absl::Status Answer(const v1::StepEntry& entry, const ActiveEntry& active, uint64_t step_id, StepOutput& output,
                      v1::EntryResult& result);
  // The parts of Answer() that embeddings are made of.
  absl::Status AnswerHidden(const v1::StepEntry& entry, const ActiveEntry& active, v1::EntryResult& result);
  absl::Status AnswerWkvState(const v1::StepEntry& entry, v1::EntryResult& result) const;
  const float* LogitsOf(const ActiveEntry& active, int64_t row) const {
    return logits_.data() + (active.first_logit_row + row - active.logit_row_begin) * vocab_size_;
  }

  const Options options_;
  const std::unique_ptr<kernels::Device> device_;
  const std::unique_ptr<StageModel> model_;
  std::unique_ptr<kernels::Stream> stream_;
  const int64_t width_;
  const int64_t v_first_width_;
  const int64_t vocab_size_;
  std::unique_ptr<StatePool> pool_;
  std::vector<Slot> slots_;
  uint64_t last_step_ = 0;
  Sampler sampler_;

  // Of the running step, reused.
  std::vector<kernels::SequenceSpan> spans_;
  std::vector<ActiveEntry> active_;
  std::vector<int32_t> tokens_;
  std::vector<int64_t> logit_rows_;
  std::vector<int64_t> hidden_rows_;
  std::vector<bool> slot_in_step_;
  kernels::AlignedBuffer<float> x_;        // [max_batch_tokens, D]
  kernels::AlignedBuffer<float> v_first_;  // [max_batch_tokens, v_first_width]
  kernels::AlignedBuffer<float> logits_;   // [max_batch_tokens, V]; last stage only
  kernels::AlignedBuffer<float> hidden_;   // [max_batch_tokens, D]; last stage only
};

}  // namespace rwkv::worker
