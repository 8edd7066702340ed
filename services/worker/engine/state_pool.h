// The states of all slots of one stage, in fp32. Per layer and tensor there is one array [slots, stride], so that a
// batch names slots and no state moves.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/api/state_tensor.h"
#include "kernels/base/aligned_buffer.h"
#include "services/worker/model/block/stage_model.h"
#include "services/worker/model/block/state_layout.h"
#include "services/worker/model/tuned_states.h"

namespace rwkv::worker {

// Owned by the device's thread. Slots are 0 .. slots-1 and stage layers 0 .. layers-1 (the caller checks); `model`
// lives on.
class StatePool {
 public:
  // A slot must be Reset or copied into before it is used: until then it takes address space, no memory.
  // kResourceExhausted: no memory; names the bytes.
  static absl::StatusOr<std::unique_ptr<StatePool>> Create(const StageModel& model, int slots);

  // The state of a fresh sequence: zeros, or the model's own tuned state, or `tuned` (of this model; null: none)
  // instead.
  void Reset(int slot, const TunedState* tuned = nullptr);

  // One layer of a slot in record order (StateLayout). kInternal: it is not finite; a broken model must not be stored.
  absl::Status CopyOut(int slot, int stage_layer, std::string* record) const;

  // The opposite. kDataLoss: not record_bytes() long, or not finite; the slot is unchanged then.
  absl::Status CopyIn(int slot, int stage_layer, absl::string_view record);

  const StateView& view() const { return view_; }
  int slots() const { return static_cast<int>(view_.slots); }
  int layers() const { return layers_; }
  int64_t bytes() const { return bytes_; }  // Of all slots.

 private:
  StatePool(const StageModel& model, int slots);

  const StageModel& model_;
  const int layers_;
  int64_t bytes_ = 0;
  std::vector<kernels::AlignedBuffer<float>> buffers_;
  std::vector<kernels::StateTensor> pools_;
  StateView view_;
};

}  // namespace rwkv::worker
