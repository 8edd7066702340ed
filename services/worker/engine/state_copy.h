// States on their way between a device and the state store.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"
#include "kernels/base/device.h"
#include "kernels/base/stream.h"
#include "services/worker/model/block/state_layout.h"
#include "services/worker/model/layer_range.h"

namespace rwkv::worker {

// The state of one slot in pinned memory: one record per layer of the stage, one after the other.
class StateCopy {
 public:
  StateCopy(const StateLayout& layout, LayerRange layers, kernels::DeviceArray<float> values,
            std::unique_ptr<kernels::Event> copied);

  float* values() const { return values_.data(); }  // [layers, layout.size()]
  // Done once the stream has passed what it was asked to copy from or to here; recorded by who asks.
  kernels::Event& copied() const { return *copied_; }

  // One record per layer, of this object's memory, once the copy is there. Waits for the device.
  // kInternal: the device failed, or `slot`'s state is not finite: a broken model must not be stored.
  absl::StatusOr<std::vector<absl::Span<const char>>> Records(int slot) const;

  // The opposite, nothing being asked of a stream yet: where the record of each layer goes, layout.record_bytes() long.
  std::vector<absl::Span<char>> Room();
  // What came. kDataLoss: it is not finite.
  absl::Status CheckRoom() const;

 private:
  const StateLayout& layout_;
  const LayerRange layers_;
  const kernels::DeviceArray<float> values_;
  const std::unique_ptr<kernels::Event> copied_;
};

// Gives copies and takes them back, so that a save waits neither for memory nor for its pages. Thread-safe.
class StateCopies : public std::enable_shared_from_this<StateCopies> {
 public:
  // `device` and `layout` outlive it and its copies.
  StateCopies(kernels::Device& device, const StateLayout& layout, LayerRange layers);

  int64_t bytes() const;  // Of a copy.

  // Contents undefined. kResourceExhausted: no memory.
  absl::StatusOr<std::shared_ptr<StateCopy>> Take() ABSL_LOCKS_EXCLUDED(mu_);

 private:
  void GiveBack(std::unique_ptr<StateCopy> copy) ABSL_LOCKS_EXCLUDED(mu_);

  kernels::Device& device_;
  const StateLayout& layout_;
  const LayerRange layers_;
  absl::Mutex mu_;
  std::vector<std::unique_ptr<StateCopy>> free_ ABSL_GUARDED_BY(mu_);
};

}  // namespace rwkv::worker
