// A whole random model of any version on a device, fed step by step: what tests of the blocks share.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/api/sequence_span.h"
#include "kernels/api/state_tensor.h"
#include "kernels/base/device.h"
#include "kernels/base/stream.h"
#include "services/checkpoint/model_tensors.h"
#include "services/worker/model/block/stage_model.h"

namespace rwkv::worker {

class TestStage {
 public:
  static constexpr int64_t kSlots = 4;
  static constexpr int64_t kMaxRows = 24;

  // All layers of a model of two. The states of all slots are zeros, as fresh ones are but RWKV-4's.
  static absl::StatusOr<std::unique_ptr<TestStage>> Create(std::unique_ptr<kernels::Device> device,
                                                           checkpoint::ModelVersion version);

  // One step. Token t of a sequence in slot s is 10 (s + 1) + t. Ends when the stream has passed it.
  absl::Status Step(const std::vector<kernels::SequenceSpan>& spans);
  // Spans of `lengths[i]` rows for slot i.
  static std::vector<kernels::SequenceSpan> Spans(const std::vector<int64_t>& lengths);

  // Of the last step, of the rows of all its sequences; of padding there are none.
  std::vector<float> logits() const;
  // What all slots hold.
  std::vector<float> states() const;

  StageModel& model() { return *model_; }

 private:
  explicit TestStage(std::unique_ptr<kernels::Device> device) : device_(std::move(device)) {}

  absl::StatusOr<float*> Zeros(int64_t count);
  std::vector<float> Get(const float* from, int64_t count) const;

  const std::unique_ptr<kernels::Device> device_;
  std::unique_ptr<kernels::Stream> stream_;
  std::unique_ptr<StageModel> model_;
  std::vector<kernels::DeviceArray<float>> buffers_;
  std::vector<kernels::StateTensor> states_;  // [layers, tensors]
  std::vector<int32_t> tokens_;
  std::vector<int64_t> logit_rows_;
  float* x_ = nullptr;
  float* v_first_ = nullptr;
  float* logits_ = nullptr;
};

}  // namespace rwkv::worker
