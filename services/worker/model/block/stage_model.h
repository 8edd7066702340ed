// One pipeline stage of a model, whatever its version: what the engine needs to run steps.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/api/sequence_span.h"
#include "kernels/base/device.h"
#include "kernels/base/repeating_stream.h"
#include "kernels/base/stream.h"
#include "services/worker/model/block/state_layout.h"
#include "services/worker/model/weights.h"

namespace rwkv::worker {

// One microbatch: packed rows, one per token. `R` rows in all, 1 <= R <= max_rows. What says which rows there are is
// host memory, and done with when Forward() returns; the floats are device memory, logits and hidden states perhaps
// pinned.
struct StageStep {
  absl::Span<const kernels::SequenceSpan> spans;  // Cover the rows in order; no slot twice, but kPaddingSlot.
  int64_t rows = 0;                               // R
  const int32_t* tokens = nullptr;                // [R], below V; padding has some, too.
  float* x = nullptr;                             // [R, D]: in on later stages; out.
  float* v_first = nullptr;                       // [R, v_first_width]: in on later stages, out on the first.
  absl::Span<const int64_t> logit_rows;           // Ascending. Last stage only: the rows that need logits.
  float* logits = nullptr;                        // [logit_rows.size(), V], out.
  absl::Span<const int64_t> hidden_rows;  // Ascending. Last stage only: the rows whose final hidden state is wanted.
  float* hidden = nullptr;                // [hidden_rows.size(), D], out: LN(x; ln_out).
};

// Owned by one thread at a time, as its stream is.
class StageModel {
 public:
  virtual ~StageModel() = default;

  virtual const StageWeights& weights() const = 0;
  virtual const StateLayout& state_layout() const = 0;

  // Channels of what the link carries beside x [rows, D]; 0: nothing.
  virtual int64_t v_first_width() const = 0;

  // Tokens a sequence may have in all; 0: no bound, as every recurrence. The engine refuses what would pass it.
  virtual int64_t max_tokens() const = 0;

  // What a fresh slot holds; empty: zeros. `stage_layer` counts from this stage's first layer, `tensor` as in the
  // layout.
  virtual absl::Span<const float> InitialState(int stage_layer, int tensor) const = 0;

  // Runs the rows through this stage's layers, and updates the states of their slots. Each row's results depend on its
  // own sequence alone, bit for bit. Enqueues on `stream`; buffers must live until it has passed them.
  // kInvalidArgument: our own bug, nothing has changed. Other codes: the device failed, states are undefined.
  virtual absl::Status Forward(const StageStep& step, const StateView& state, kernels::Stream& stream) = 0;

  // Whether Forward() waits for all that is enqueued before it, because it reads what is in states.
  virtual bool Waits() const { return false; }

  // Where the device repeats steps: makes ready those of up to `rows` rows of a token each, with the memory of `step`,
  // all of whose rows ask for logits or none; of nobody, they change no state. Forward() takes them from then on.
  virtual absl::Status PrepareSteps(const StageStep& step, int64_t rows, const StateView& state,
                                    kernels::RepeatingStream& stream) {
    return absl::OkStatus();
  }
};

struct StageModelOptions {
  int64_t max_rows = 1;  // Of a step, >= 1; sizes the activations.
  // Of the group norm ln_x, inside the root: 1e-5 * 8^2 in the reference; rwkv.cpp computes RWKV-5 with 1e-5.
  float group_norm_epsilon = 64e-5f;
  int64_t deep_embed_context = 4096;  // RWKV-7b: tokens of a sequence that a slot can cache, >= 1.
};

// By the version in the weights' config. `device` lives on. kUnimplemented: no block for this version.
// kResourceExhausted: no memory.
absl::StatusOr<std::unique_ptr<StageModel>> CreateStageModel(std::shared_ptr<const StageWeights> weights,
                                                             kernels::Device& device, const StageModelOptions& options);

}  // namespace rwkv::worker
