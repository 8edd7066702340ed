// The step logic of one pipeline stage: attach, step, save, release. Enqueues on its device, whose memory the host
// never touches: what goes in and comes out lies in pinned memory. No I/O; one thread owns it, the device's, but for
// copies(). proto/rwkv/v1/worker.proto says what commands mean.
//
// Law S4: a slot is reset when given out, and an entry whose slot, sequence or position does not fit is refused on this
// stage and skipped on later ones; a foreign or stale state is never computed on.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/optional.h"
#include "kernels/api/sequence_span.h"
#include "kernels/base/device.h"
#include "kernels/base/repeating_stream.h"
#include "kernels/base/stream.h"
#include "rwkv/v1/state_store.pb.h"
#include "rwkv/v1/worker.pb.h"
#include "services/worker/engine/device_draws.h"
#include "services/worker/engine/slot_table.h"
#include "services/worker/engine/state_copy.h"
#include "services/worker/engine/state_pool.h"
#include "services/worker/engine/step_answers.h"
#include "services/worker/link/link.h"
#include "services/worker/model/block/stage_model.h"
#include "services/worker/model/tuned_states.h"

namespace rwkv::worker {

// Steps that are enqueued and not finished: one runs, the next waits behind it.
constexpr int kMaxPendingSteps = 2;

struct StepOutput {
  LinkFrame frame;                         // For the next stage, until kMaxPendingSteps more were enqueued.
  std::vector<v1::LogitsRows> logits;      // Last stage only; to be sent before `result`.
  v1::StepResult result;                   // Last stage only.
  std::vector<RefusalCause> refused_here;  // Those that this stage refused itself.
  int64_t rows = 0;                        // Computed, without padding.
};

class StageEngine {
 public:
  struct Options {
    int slots = 64;              // >= 1
    int max_batch_tokens = 128;  // Rows of a step, >= 1.
    std::string fingerprint;     // Of the model; snapshots of another are refused.
  };

  // `model` is of this device, `tuned_states` of the model and this stage's layers: what fresh sequences may ask for.
  // kResourceExhausted: no memory.
  static absl::StatusOr<std::unique_ptr<StageEngine>> Create(Options options, std::unique_ptr<kernels::Device> device,
                                                             std::unique_ptr<StageModel> model,
                                                             TunedStates tuned_states);
  ~StageEngine();

  // A new epoch: every slot is free, no step is pending, the next step is 1. Waits for the device; an error: it faulted
  // or hangs, for good.
  absl::Status Reset();

  // Runs one full batch and one single row on throw-away states, so that the first request finds warm code and pages.
  // Where the device repeats steps, makes ready all decode steps that ask for the logits of every row: a line in the
  // log says how many there are and what memory they took. Ends with Reset(). kInternal: the model gives NaN.
  absl::Status WarmUp();

  // Gives the slot to the sequence, whoever held it before. `fresh` and `warm_sequence` are done when it returns OK;
  // `snapshot` only reserves the slot, and Install or AbandonLoad must follow. On error the slot is as it was.
  //   kInvalidArgument: slot, position or sampling. kAborted: the slot does not hold the warm sequence at the position.
  //   kFailedPrecondition: a snapshot of another model, a tuned state that there is none of. kDataLoss: a manifest that
  //   does not fit the model.
  absl::Status Attach(const v1::AttachSequence& attach);

  // The state has come. kAborted: the slot was given away or released meanwhile.
  absl::Status Install(int slot, uint64_t sequence, std::shared_ptr<StateCopy> state);
  // It will not come: frees the slot, if it still waits for this sequence.
  void AbandonLoad(int slot, uint64_t sequence);

  // Validates, packs and enqueues one step behind those that are pending, fewer than kMaxPendingSteps; positions
  // advance here. `input` is the stage before's frame of the same step, checked by its link, whose memory must live
  // until the step is finished (input_frame()); null on the first stage. An error ends the epoch (kInvalidArgument:
  // step out of order or input that contradicts it; else the device failed); what is wrong with one entry is told in
  // the output and harms no other. `output_stays`: the rows for the next stage stay in the device's memory, and
  // MoveOutput() follows. Of a model that waits for what was enqueued before, `await` is called first, with an event
  // that is done when all of it has run: it returns when that is so, or with an error, which Enqueue gives back.
  using Await = absl::FunctionRef<absl::Status(const kernels::Event&)>;
  static absl::Status AwaitNothing(const kernels::Event&) { return absl::OkStatus(); }
  absl::Status Enqueue(v1::Step step, const LinkFrame* input, bool output_stays = false, Await await = AwaitNothing);
  // What the next stage must know of the step that was enqueued last, and the move of its rows behind it.
  LinkHeader OutputHeader() const;
  absl::Status MoveOutput(DeviceRows& rows);
  // The results of the oldest pending step; waits for the device. An error ends the epoch; kDeadlineExceeded: the device
  // hangs.
  absl::StatusOr<StepOutput> Finish();
  int pending_steps() const { return static_cast<int>(last_step_ - finished_step_); }
  // Whether Finish() would not wait.
  bool IsOldestDone() const { return places_[(finished_step_ + 1) % kMaxPendingSteps].done->Done(); }
  // Pinned memory for the input of the step that is enqueued next; fewer than kMaxPendingSteps are pending.
  LinkFrame& input_frame() { return places_[(last_step_ + 1) % kMaxPendingSteps].input; }

  // Enqueues a copy of the slot's state behind all steps so far.
  //   kInvalidArgument, kAborted: as for a step's entry. kResourceExhausted: no memory.
  absl::StatusOr<std::shared_ptr<StateCopy>> CopyState(const v1::SaveSnapshot& save);
  // For states that come, too; any thread may take some.
  StateCopies& copies() const { return *copies_; }

  // Frees the slot if it holds the sequence.
  void Release(const v1::ReleaseSlot& release);

  // This stage's part of a manifest, which Attach has accepted.
  std::vector<v1::RecordInfo> RecordsOfStage(const v1::SnapshotManifest& manifest) const;

  int slots_used() const { return slots_.used(); }
  kernels::Device& device() const { return *device_; }
  const StageModel& model() const { return *model_; }
  const StatePool& pool() const { return *pool_; }
  // Null: of a device that enqueues every step anew.
  const kernels::RepeatingStream* repeating() const { return repeating_; }
  const Options& options() const { return options_; }
  std::vector<std::string> tuned_state_ids() const;
  LinkShape link_shape() const;
  bool is_first() const { return model_->weights().is_first(); }
  bool is_last() const { return model_->weights().is_last(); }

 private:
  // An entry of a pending step that this stage computes.
  struct ActiveEntry {
    int entry = 0;
    bool copies_logits = false;  // From the device, where it draws, into numbers.logits.
    EntryNumbers numbers;
    std::shared_ptr<Turn> turn;
  };
  // An active entry that is being answered.
  struct Answering {
    const v1::StepEntry* entry;
    const ActiveEntry* active;
    v1::EntryResult* result;
    bool is_number;
    std::vector<v1::LogitsRows> logits;
  };
  // A pending step, and the pinned memory of one.
  struct Place {
    v1::Step step;
    int64_t rows = 0;      // With padding.
    int64_t computed = 0;  // Without.
    std::vector<RefusedEntry> refused;
    std::vector<RefusalCause> refused_here;
    std::vector<ActiveEntry> active;
    std::vector<absl::optional<uint64_t>> positions;  // By entry: the slot's after the step, if it holds the sequence.
    std::unique_ptr<kernels::Event> done;

    LinkFrame input;
    LinkFrame output;
    kernels::DeviceArray<float> memory;    // Of input and output.
    kernels::DeviceArray<float> logits;    // [max_batch_tokens, V]; last stage only, of rows that the host needs
    DeviceDraws draws;                     // Last stage only, where the device draws.
    kernels::DeviceArray<float> hidden;    // [max_batch_tokens, D]; last stage only
    kernels::DeviceArray<float> matrices;  // Of the entries that ask for theirs; grows.
  };

  StageEngine(Options options, std::unique_ptr<kernels::Device> device, std::unique_ptr<StageModel> model);

  static int64_t Bytes(int64_t floats) { return floats * static_cast<int64_t>(sizeof(float)); }

  int64_t MostDraws() const;  // Of a step.
  absl::Status Allocate(TunedStates tuned_states);
  absl::Status AllocatePlace(Place& place);
  absl::Status PrepareSteps(kernels::RepeatingStream& stream);
  // Steps that the device cannot repeat are slower, and right: a line in the log.
  void TellOfFailures();
  // Null: the model's own.
  absl::StatusOr<const float*> FindTunedState(const std::string& id) const;
  absl::Status CheckManifest(const v1::SnapshotManifest& manifest, uint64_t position) const;

  // Which entries are computed, and their rows packed one after the other, into `place` and the vectors below.
  absl::Status Pack(Place& place, const LinkHeader* input);
  void PackEntry(Place& place, int entry);
  // Its rows of logits; the step's logit rows do not have them yet.
  void PackLogits(Place& place, const v1::StepEntry& entry, ActiveEntry& active);
  // Where Forward() leaves logits: [rows, V].
  float* LogitsOf(const Place& place) const { return draws_here_ ? logits_.data() : place.logits.data(); }
  absl::Status EnqueueForward(Place& place, const LinkFrame* input, bool output_stays, Await await);
  absl::Status EnqueueDraws(Place& place);
  absl::Status EnqueueMatrices(Place& place);
  void AnswerAll(Place& place, StepOutput& output);

  const Options options_;
  const std::unique_ptr<kernels::Device> device_;
  const std::unique_ptr<StageModel> model_;
  std::unique_ptr<kernels::Stream> stream_;
  kernels::RepeatingStream* repeating_ = nullptr;  // The same, if it repeats.
  const int64_t width_;
  const int64_t v_first_width_;
  const int64_t vocab_size_;
  std::unique_ptr<StatePool> pool_;
  std::map<std::string, kernels::DeviceArray<float>> tuned_states_;  // Pinned: [layers, the matrix's size].
  std::shared_ptr<StateCopies> copies_;
  SlotTable slots_;
  std::unique_ptr<StepAnswers> answers_;
  std::vector<Answering> answering_;            // Of AnswerAll().
  uint64_t last_step_ = 0;                      // Enqueued.
  uint64_t finished_step_ = 0;                  // <= last_step_
  int64_t told_failures_ = 0;                   // Of the stream's repeated().
  std::unique_ptr<kernels::Event> before_;      // Of a model that waits: all that its step is behind.
  std::array<Place, kMaxPendingSteps> places_;  // Step n has place n % kMaxPendingSteps.

  // Of the step that is being packed, reused.
  std::vector<kernels::SequenceSpan> spans_;
  std::vector<int32_t> tokens_;
  std::vector<int64_t> logit_rows_;
  std::vector<int64_t> hidden_rows_;
  kernels::DeviceArray<float> x_;         // [max_batch_tokens, D]
  kernels::DeviceArray<float> v_first_;   // [max_batch_tokens, v_first_width]
  bool draws_here_ = false;               // The device draws; then:
  kernels::DeviceArray<float> logits_;    // [max_batch_tokens, V]
  kernels::DeviceArray<float> adjusted_;  // [draws of a step, V]
};

}  // namespace rwkv::worker
