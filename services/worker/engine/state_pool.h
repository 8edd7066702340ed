// The states of all slots of one stage, in a device's memory, in fp32 (wkv states in fp16 where the device stores them
// so). Per layer and tensor there is one array [slots, stride], so that a batch names slots and no state moves.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/api/cast_state.h"
#include "kernels/api/state_tensor.h"
#include "kernels/base/device.h"
#include "kernels/base/stream.h"
#include "services/worker/model/block/stage_model.h"
#include "services/worker/model/block/state_layout.h"

namespace rwkv::worker {

// Owned by the device's thread. Slots are 0 .. slots-1 and stage layers 0 .. layers-1 (the caller checks); `model`
// lives on. Reset and copies are enqueued, so memory that they name must live until the stream has passed them.
class StatePool {
 public:
  // A slot must be Reset or copied into before it is used: until then it takes address space, on a CPU no memory.
  // kResourceExhausted: no memory; names the bytes.
  static absl::StatusOr<std::unique_ptr<StatePool>> Create(kernels::Device& device, const StageModel& model, int slots);

  // The state of a fresh sequence: zeros, or the model's own tuned state, or `tuned` (of this model, pinned:
  // [layers, the matrix's size]; null: none) instead of its matrix.
  absl::Status Reset(int slot, const float* tuned, kernels::Stream& stream);

  // A slot in record order (StateLayout), layer by layer: [layers, layout.size()], pinned.
  absl::Status CopyOut(int slot, float* to, kernels::Stream& stream) const;
  absl::Status CopyIn(int slot, const float* from, kernels::Stream& stream);

  // The matrix of the last layer in fp32: [the matrix's size], pinned.
  absl::Status CopyLastMatrix(int slot, float* to, kernels::Stream& stream) const;

  const StateView& view() const { return view_; }
  int slots() const { return static_cast<int>(view_.slots); }
  int layers() const { return layers_; }
  int64_t bytes() const { return bytes_; }  // Of all slots.

 private:
  StatePool(const StageModel& model, kernels::CastStateOp* cast, int slots);

  // Between a slot's part of a pool and floats.
  absl::Status Read(const kernels::StateTensor& pool, int slot, float* to, int64_t size, kernels::Stream& stream) const;
  absl::Status Write(const kernels::StateTensor& pool, int slot, const float* from, int64_t size,
                     kernels::Stream& stream) const;
  absl::Status UploadInitialState(kernels::Device& device);
  // visit(stage_layer, tensor, its pool, how many numbers of a slot, its place in record order), until one fails.
  template <typename Visit>
  absl::Status ForEach(Visit visit) const;

  const StageModel& model_;
  kernels::CastStateOp* const cast_;  // Null: every tensor is in fp32.
  const int layers_;
  int64_t bytes_ = 0;
  std::vector<kernels::DeviceArray<float>> buffers_;
  std::vector<kernels::StateTensor> pools_;
  kernels::DeviceArray<float> initial_;  // [layers, layout.size()], pinned; empty: the model has none of its own.
  StateView view_;
};

}  // namespace rwkv::worker
